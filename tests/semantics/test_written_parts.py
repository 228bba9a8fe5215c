"""Networks that write over a part of a map in place: what is written counts, wherever its values come from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fisedit_compile as fisedit
from support.harness import compiled
from support.tolerances import assert_identical, assert_near

SIZE = (19, 27)
MASK = torch.zeros(SIZE, dtype=torch.bool)
MASK[3:13, 4:18] = True


class Network(nn.Module):
    """A function of two convolutions' results."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Conv2d(2, 3, 3, padding=1).requires_grad_(False)
            self.second = nn.Conv2d(2, 3, 3, padding=1).requires_grad_(False)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.first(x), self.second(x))


def rows_of_another_map(x: Tensor, y: Tensor) -> Tensor:
    x[:, :, 5:15] = y[:, :, 5:15]
    return x


def every_second_row(x: Tensor, y: Tensor) -> Tensor:
    x[:, :, ::2] *= 2
    return x + y


def a_crop_that_is_added_to(x: Tensor, y: Tensor) -> Tensor:
    cropped = functional.pad(x, (0, 3, 0, 2), "reflect")[:, :, : SIZE[0], : SIZE[1]]
    cropped += y
    return cropped


def the_middle_of_zeros(x: Tensor, y: Tensor) -> Tensor:
    around = torch.zeros(x.shape[0], 3, SIZE[0] + 4, SIZE[1] + 6)
    around[:, :, 2:-2, 3:-3] = x + y
    return around[:, :, 2:-2, 3:-3]


@pytest.mark.parametrize(
    "function",
    [rows_of_another_map, every_second_row, a_crop_that_is_added_to, the_middle_of_zeros],
    ids=lambda function: function.__name__,
)
@torch.no_grad()
def test_what_is_written_over_a_part_is_computed(function: Any) -> None:
    module, runtime = Network(function), fisedit.Runtime()
    network = compiled(module, runtime)
    old, new = (torch.randn(1, 2, *SIZE, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    with runtime.record("base"):
        recorded = network(old)
    with runtime.edit("base", mask=MASK):
        edited = network(new)
    assert_identical(edited[..., ~MASK], recorded[..., ~MASK], "outside the mask")
    inside = (..., slice(4, 12), slice(5, 17))  # a convolution's reach away from the mask's outline
    assert_near(edited[inside], module(torch.where(MASK, new, old))[inside], "inside the mask")
