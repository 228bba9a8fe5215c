"""Networks that compute with negative and complex numbers: calls that run as PyTorch made the graph have no say of
their own in what a number means."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fisedit_compile as fisedit
from fisedit_compile.private.dynamo import INTEGERS_CHOOSE_GRAPHS
from support.harness import compiled
from support.tolerances import assert_identical, assert_near

SIZE = (13, 9)
MASK = torch.zeros(SIZE, dtype=torch.bool)
MASK[3:8, 2:6] = True
Scale = Callable[[Tensor], Tensor]


def powers(number: complex) -> Scale:
    """Channels times the powers of a number."""

    def scale(x: Tensor) -> Tensor:
        exponents = torch.arange(4, device=x.device) + 1
        factors = number**exponents
        if factors.is_complex():
            factors = torch.view_as_real(factors).sum(1)
        return x * factors.clamp(-9, 9).reshape(1, 4, 1, 1)

    return scale


def reflected(x: Tensor) -> Tensor:
    return x * torch.arange(4, device=x.device).__rpow__(-1).reshape(1, 4, 1, 1)


def rotated(x: Tensor) -> Tensor:
    return (x * complex(-0.0, -2.0)).imag + x


def branched(x: Tensor) -> Tensor:
    result: Tensor = torch.cond(x.sum() > 0, powers(-1), powers(-2), (x,))
    return result


def repeated(x: Tensor) -> Tensor:
    result: Tensor = checkpoint(powers(-1), x, use_reentrant=False)
    return result


def noisy(x: Tensor) -> Tensor:
    return powers(-1)(x) + 0 * torch.rand_like(x)


def chosen(x: Tensor) -> Tensor:
    """What ``branched`` computes. PyTorch runs its branches by the code that it writes, also without a compiler."""
    return torch.where(x.sum() > 0, powers(-1)(x), powers(-2)(x))


SCALES: dict[str, Scale] = {
    **{f"powers of {number}": powers(number) for number in (-1, -2, -1.5, -0.0, -math.inf, complex(-1.0, -0.0))},
    "reflected": reflected,
    "rotated": rotated,
    "branched": branched,
    "repeated": repeated,
    "noisy": noisy,
}


class Scaled(nn.Module):
    """A convolution whose channels are scaled; weights are equal for all scales."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.inner = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.inner(x))


def picture(seed: int) -> Tensor:
    return torch.randn(2, 4, *SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SCALES)
@torch.no_grad()
def test_every_call_computes_what_the_network_does(name: str) -> None:
    module = Scaled(SCALES[name])
    expected = Scaled(chosen) if name == "branched" else module
    base, new = expected(picture(0)), expected(picture(1))
    runtime = fisedit.Runtime()
    network = compiled(module, runtime)
    assert_near(network(picture(0)), base, "outside of contexts")
    with runtime.record("base"):
        recorded = network(picture(0))
    assert_near(recorded, base, "recorded")
    with runtime.edit("base", mask=torch.ones(SIZE)):
        assert_near(network(picture(1)), new, "a mask of everything")
    with runtime.edit("base"):
        assert_near(network(picture(1)), new, "no mask")
    with runtime.edit("base", mask=MASK):
        edited = network(picture(1))
    assert_identical(edited[..., ~MASK], recorded[..., ~MASK], "outside the mask")
    # Positions two within the mask read new positions only.
    assert_near(edited[..., 4:7, 3:5], new[..., 4:7, 3:5], "inside the mask")


class Alternating(nn.Module):
    """A convolution whose sign a Python number tells."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)

    def forward(self, x: Tensor, number: int) -> Tensor:
        return self.inner(x) * (-1) ** number


@pytest.mark.skipif(not INTEGERS_CHOOSE_GRAPHS, reason="this PyTorch has changing integers refused")
@torch.no_grad()
def test_powers_by_a_python_number_that_changes() -> None:
    module = Alternating()
    runtime = fisedit.Runtime()
    network = compiled(module, runtime)
    numbers = (3, 4, 5, 6)
    with runtime.record("base"):
        for number in numbers:
            assert_near(network(picture(0), number), module(picture(0), number), "recorded")
    with runtime.edit("base", mask=torch.ones(SIZE)):
        for number in numbers:
            assert_near(network(picture(1), number), module(picture(1), number), "edited")
    for number in numbers:
        assert_near(network(picture(1), number), module(picture(1), number), "outside of contexts")
