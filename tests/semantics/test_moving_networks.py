"""Positions that move: right where they must be, the recording elsewhere, the masked reference everywhere.

docs/testing.md ("Positions that move") has the definition. It is tried by itself, without any compiler, and then
compiled networks are held to it: thousands by ``tools/check_moving_networks.py``, some of them here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings, strategies
from torch import Tensor, nn
from torch.nn import functional

from support.blocks import Map
from support.harness import compile_network
from support.moving_checks import Counts, check, compile_graph, compile_with_dynamo
from support.moving_networks import Seeded, draw
from support.networks import Network, convolution, plain
from support.tolerances import assert_identical, assert_near

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"


class Drawn:
    """Choices that hypothesis makes, and makes simpler when a network fails."""

    def __init__(self, data: strategies.DataObject) -> None:
        self.data = data

    def whole(self, least: int, most: int) -> int:
        return self.data.draw(strategies.integers(least, most))

    def one(self, values: Sequence[Any]) -> Any:
        return self.data.draw(strategies.sampled_from(list(values)))


def counted(seeds: range, *compilers: Callable[..., Any], joined: bool = False) -> Counts:
    """Networks of some seeds, checked."""
    counts = Counts()
    for seed in seeds:
        choices = Seeded(seed)
        network = draw(choices, joined)
        counts.add(check(network, network.mask(choices), compilers))
    return counts


def test_the_definition_by_itself() -> None:
    """Without a compiler: what is right equals the dense network, what is inside the mask is right, little is idle."""
    counts = counted(range(400 if THOROUGH else 40))
    assert counts.right > 1000 * counts.networks and counts.owed > 100 * counts.networks
    assert counts.idle < 0.02 * counts.active


def test_compiled_graphs() -> None:
    counts = counted(range(1000, 1400 if THOROUGH else 1030), compile_graph)
    assert counts.returned > 30 * counts.networks


def test_attention_and_norms_join_in() -> None:
    """What reads the whole map is right nowhere; outside it is the recording, and everywhere the reference."""
    counts = counted(range(3000, 3200 if THOROUGH else 3015), compile_graph, joined=True)
    assert counts.networks > 10


def test_compiled_as_users_do() -> None:
    assert counted(range(2000, 2040 if THOROUGH else 2004), compile_with_dynamo).returned > 0


@given(data=strategies.data())
@settings(max_examples=settings().max_examples + 5, phases=list(Phase) if THOROUGH else [Phase.generate])
def test_drawn_networks(data: strategies.DataObject) -> None:
    choices = Drawn(data)
    network = draw(choices)
    check(network, network.mask(choices), [compile_graph])


def flipped(x: Tensor) -> Tensor:
    """The picture from right to left."""
    return x.flip(-1)


def to_multiple(x: Tensor) -> Tensor:
    """Padding at the right and below, to multiples of eight."""
    return functional.pad(x, (0, -x.shape[3] % 8, 0, -x.shape[2] % 8))


def movements(name: str, size: tuple[int, int], *blocks: Callable[[], nn.Module]) -> Network:
    """A network between a convolution on each side."""
    return plain(name, convolution, *blocks, convolution, size=size, batch=1)


EXAMPLES = [
    movements("flip", (40, 60), lambda: Map(flipped), convolution, lambda: Map(flipped)),
    movements(
        "pad and crop",
        (40, 60),
        lambda: Map(lambda x: functional.pad(x, (9, 0, 5, 0))),
        convolution,
        lambda: Map(lambda x: x[:, :, 5:, 9:]),
    ),
    movements(
        "crop and pad back",
        (40, 60),
        lambda: Map(lambda x: x[:, :, 3:, 5:]),
        convolution,
        lambda: Map(lambda x: functional.pad(x, (5, 0, 3, 0))),
    ),
    movements(
        "multiples of eight",
        (61, 83),
        lambda: Map(to_multiple),
        lambda: convolution(stride=2),
        lambda: Map(nn.Upsample(scale_factor=2)),
        lambda: Map(lambda x: x[:, :, :61, :83]),
    ),
]


@pytest.mark.parametrize("network", EXAMPLES, ids=lambda network: network.name)
@pytest.mark.parametrize("corner", [(4, 6), (22, 38)])
def test_examples(network: Network, corner: tuple[int, int]) -> None:
    """What lies far enough inside the mask equals the dense network; nothing outside the mask changes."""
    height, width = network.resolution
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[corner[0] : corner[0] + 12, corner[1] : corner[1] + 18] = True
    case = compile_network(network, traced_once=True)
    (first,), (second,) = network.inputs(0), network.inputs(1)
    (output,) = case.edit((second,), mask)
    with torch.no_grad():
        dense = network.module()(torch.where(mask, second, first))
    reach = 4 if network.name == "multiples of eight" else 3
    inside = ~functional.max_pool2d((~mask)[None, None].float(), 2 * reach + 1, 1, reach)[0, 0].bool()
    assert inside.sum() >= 6
    assert_near(output[..., inside], dense[..., inside], "inside")
    assert_identical(output[..., ~mask], case.recorded[0][..., ~mask], "outside")
    case.assert_all_near((output,), case.expected((second,), mask), "against the reference")


def test_the_last_columns_of_a_padded_picture_are_edited() -> None:
    """A mask at the right border of 83 columns: all of them are edited, also in the last position of each level."""
    network = EXAMPLES[-1]
    mask = torch.zeros(network.resolution, dtype=torch.bool)
    mask[20:40, 60:] = True
    case = compile_network(network)
    (first,), (second,) = network.inputs(0), network.inputs(1)
    (output,) = case.edit((second,), mask)
    with torch.no_grad():
        dense = network.module()(torch.where(mask, second, first))
    assert_near(output[:, :, 27:33, 68:], dense[:, :, 27:33, 68:], "the last columns")
