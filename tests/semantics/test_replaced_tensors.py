"""Networks that replace tensors of their own by equal ones as they run, and tensors that were replaced by others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisedit_compile as fisedit
from fisedit_compile.errors import WeightsChangedError
from fisedit_compile.executing.prologues import prologues
from support.harness import compiled
from support.tolerances import assert_identical, assert_near

SIZE = (13, 9)
MASK = torch.zeros(SIZE, dtype=torch.bool)
MASK[3:8, 2:6] = True


class Shifted(nn.Module):
    """A convolution of what is shifted by a mean that the network holds."""

    def __init__(self, replace: Callable[[Any, Tensor], None], buffer: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.inner = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
        mean = torch.arange(4.0).reshape(1, 4, 1, 1)
        if buffer:
            self.register_buffer("mean", mean)
        else:
            self.mean = mean
        self.tensors = {"mean": mean.clone()}
        self.replace = replace

    def forward(self, x: Tensor) -> Tensor:
        self.replace(self, x)
        result: Tensor = self.inner(x - self.mean) + self.tensors["mean"]
        return result


def cast(net: Shifted, x: Tensor) -> None:
    net.mean = net.mean.type_as(x)


def moved(net: Shifted, x: Tensor) -> None:
    net.mean = net.mean.to(x.device, x.dtype).clone()


def computed(net: Shifted, x: Tensor) -> None:
    net.mean = net.mean * 1


def within(net: Shifted, x: Tensor) -> None:
    net.tensors["mean"] = net.tensors["mean"].to(x.device).contiguous() + 0


def picture(seed: int) -> Tensor:
    return torch.randn(2, 4, *SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("buffer", [False, True])
@pytest.mark.parametrize("replace", [cast, moved, computed, within], ids=lambda function: function.__name__)
@torch.no_grad()
def test_equal_tensors_in_place_of_others_change_nothing(replace: Any, buffer: bool) -> None:
    module, runtime = Shifted(replace, buffer), fisedit.Runtime()
    network = compiled(module, runtime, packing=True)
    prologues.clear()
    with runtime.record("base"):
        recorded = [network(picture(seed)) for seed in (0, 1)]
    for _ in range(3):
        with runtime.edit("base", mask=MASK):
            edited = [network(picture(seed)) for seed in (2, 3)]
        for before, now, seed in zip(recorded, edited, (2, 3), strict=True):
            assert_identical(now[..., ~MASK], before[..., ~MASK], "outside the mask")
            assert_near(now[..., 4:7, 3:5], module(picture(seed))[..., 4:7, 3:5], "inside the mask")
    assert runtime.stats.calls == {"record": 2, "edit": 6, "dense": 0}
    assert len(prologues) == 1


@pytest.mark.parametrize("buffer", [False, True])
@torch.no_grad()
def test_other_tensors_are_found(buffer: bool) -> None:
    module, runtime = Shifted(cast, buffer), fisedit.Runtime()
    network = compiled(module, runtime)
    with runtime.record("base"):
        recorded = network(picture(0))
    held = module.mean
    for change in (lambda: held + 1, lambda: held.clone().index_fill_(1, torch.tensor([2]), 7.0)):
        module.mean = change()
        with pytest.raises(WeightsChangedError, match="replaced"), runtime.edit("base", mask=MASK):
            network(picture(1))
    module.mean = held.clone()
    module.mean[0, 1] += 1
    with pytest.raises(WeightsChangedError), runtime.edit("base", mask=MASK):
        network(picture(1))
    module.mean = held
    with runtime.edit("base", mask=MASK):
        assert_near(network(picture(0)), recorded, "put back")
    module.mean.data += 1
    with pytest.raises(WeightsChangedError), runtime.edit("base", mask=MASK):
        network(picture(1))


@torch.no_grad()
def test_a_parameter_in_place_of_another_is_found() -> None:
    module, runtime = Shifted(cast), fisedit.Runtime()
    network = compiled(module, runtime)
    with runtime.record("base"):
        network(picture(0))
    module.inner.weight = nn.Parameter(module.inner.weight + 1, requires_grad=False)
    with pytest.raises(WeightsChangedError), runtime.edit("base", mask=MASK):
        network(picture(1))


@torch.no_grad()
def test_states_that_differ_from_call_to_call_have_recordings_of_their_own() -> None:
    """What counts is another tensor at each call; an edit that starts from the same one finds each of them."""

    def counted(net: Shifted, x: Tensor) -> None:
        net.mean = net.mean + 1

    module, runtime = Shifted(counted), fisedit.Runtime()
    network = compiled(module, runtime)
    start = module.mean
    with runtime.record("base"):
        recorded = [network(picture(0)) for _ in range(3)]
    with pytest.raises(WeightsChangedError), runtime.edit("base", mask=MASK):
        network(picture(0))
    module.mean = start.clone()
    with runtime.edit("base", mask=MASK):
        for before in recorded:
            assert_near(network(picture(0)), before, "again")
