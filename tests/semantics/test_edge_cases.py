"""Shapes and settings at the edge of what networks have: no channels, no outputs, two ways to run one network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisedit_compile as fisedit
from fisedit_compile.executing.prologues import prologues
from support.harness import compiled
from support.tolerances import assert_identical, assert_near

SIZE = (13, 9)
MASK = torch.zeros(SIZE, dtype=torch.bool)
MASK[3:8, 2:7] = True


class Network(nn.Module):
    """A convolution, and a function of the network and what the convolution gives."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
            self.nothing = nn.Linear(4, 0, bias=False).requires_grad_(False)
            self.of_nothing = nn.Linear(0, 4).requires_grad_(False)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.conv(x))


def by_sample(net: Network, c: Tensor) -> Tensor:
    return c * c.flatten(2).mean(1).sum(1)[:, None, None, None]


def by_plane(net: Network, c: Tensor) -> Tensor:
    return c * c.mean(1).sum((1, 2))[:, None, None, None]


def through_nothing(net: Network, c: Tensor) -> Tensor:
    empty = net.of_nothing(net.nothing(c.permute(0, 2, 3, 1)))
    return c + empty.permute(0, 3, 1, 2)


def picture(seed: int) -> Tensor:
    return torch.randn(2, 4, *SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("packing", ["auto", True, False])
@pytest.mark.parametrize("function", [by_sample, by_plane, through_nothing], ids=lambda function: function.__name__)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@torch.no_grad()
def test_maps_without_channels_and_layers_without_outputs(function: Any, packing: str | bool) -> None:
    module, runtime = Network(function), fisedit.Runtime()
    network = compiled(module, runtime, packing=packing, convolution="rows")
    with runtime.record("base"):
        recorded = network(picture(0))
    assert_near(recorded, module(picture(0)), "recorded")
    with runtime.edit("base", mask=MASK, save_as="saved"):
        edited = network(picture(1))
    assert_identical(edited[..., ~MASK], recorded[..., ~MASK], "outside the mask")
    with runtime.edit("saved", mask=MASK):
        assert_near(network(picture(1)), edited, "unchanged since it was saved")
    with runtime.edit("saved", mask=torch.ones(SIZE)):
        assert_near(network(picture(1)), module(picture(1)), "a mask of everything")


@pytest.mark.parametrize("first", ["inductor", "plain"])
@torch.no_grad()
def test_two_lowerings_of_one_network_share_recordings_but_no_weights(first: str) -> None:
    """Tiles, of the plain lowering only, need weights of their own."""
    module, runtime = Network(lambda net, c: net.conv(c.relu())), fisedit.Runtime()
    names = [first, "plain" if first == "inductor" else "inductor"]
    networks = [compiled(module, runtime, lowering=name, convolution="tiles", packing=True) for name in names]
    results = []
    prologues.clear()
    for name, network in zip(names, networks, strict=True):
        with runtime.record(name):
            assert_near(network(picture(0)), module(picture(0)), "recorded")
        for base in runtime.bases:
            with runtime.edit(base, mask=MASK):
                results.append(network(picture(1)))
    for result in results:
        assert_near(result, results[0], "edited")
    assert len(prologues) == 2


class Queried(nn.Module):
    """Masks made of queries and a map, as segmentation networks do."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1).requires_grad_(False)
        self.queries = nn.Parameter(torch.randn(1, 5, channels), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.queries.expand(x.shape[0], -1, -1)
        return torch.einsum("bqc,bchw->bqhw", queries, self.conv(x))


@torch.no_grad()
def test_masks_of_queries_are_masked_also_where_channels_are_as_many_as_rows() -> None:
    runtime, mask = fisedit.Runtime(), torch.zeros(4, 6, dtype=torch.bool)
    mask[1:3, 2:5] = True
    network = compiled(Queried(4), runtime)
    with runtime.record("base"):
        recorded = network(torch.randn(2, 4, 4, 6))
    with runtime.edit("base", mask=mask):
        edited = network(torch.randn(2, 4, 4, 6))
    assert_identical(edited[..., ~mask], recorded[..., ~mask], "outside the mask")
    assert runtime.stats.calls["edit"] == 1
