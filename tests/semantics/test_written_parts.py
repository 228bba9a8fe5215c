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


def a_corner_that_is_added_to(x: Tensor, y: Tensor) -> Tensor:
    x[:, :, :11, :17] += y[:, :, :11, :17]
    return x


def rows_from_elsewhere(x: Tensor, y: Tensor) -> Tensor:
    x[:, :, 2:9] = y[:, :, 10:17]
    return x


#: Writes of a map over rows or columns of another one; the others make everything behind them active.
JOINED = [rows_of_another_map, a_corner_that_is_added_to]


@pytest.mark.parametrize("function", JOINED, ids=lambda function: function.__name__)
def test_a_map_that_is_written_over_a_part_stays_where_it_is(function: Any) -> None:
    report = fisedit.explain(Network(function), torch.zeros(1, 2, *SIZE))
    assert not report.lost and not [miss for miss in report.dense_nodes if "scatter" in str(miss.target)]
    assert report.sparse_mac_fraction > 0.99


@torch.no_grad()
def test_rows_from_elsewhere_depend_on_where_they_came_from() -> None:
    """What is written over is of no use to anybody: new values there change nothing, neither inside the mask."""
    module, runtime = Network(rows_from_elsewhere), fisedit.Runtime()
    network = compiled(module, runtime)
    old, new = (torch.randn(1, 2, *SIZE, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    with runtime.record("base"):
        recorded = network(old)
    over, source = (torch.zeros(SIZE, dtype=torch.bool) for _ in range(2))
    over[3:8, 4:18] = True
    source[3:16, 4:18] = True
    with runtime.edit("base", mask=over):
        assert_identical(network(new), recorded, "what is written over")
    with runtime.edit("base", mask=source):
        edited = network(new)
    assert_identical(edited[..., ~source], recorded[..., ~source], "outside the mask")
    for rows in (slice(4, 7), slice(10, 15)):  # rows 4 to 6 are those of 12 to 14
        inner = (..., rows, slice(5, 17))
        assert_near(edited[inner], module(torch.where(source, new, old))[inner], "inside the mask")


@pytest.mark.parametrize(
    "function",
    [*JOINED, every_second_row, a_crop_that_is_added_to, the_middle_of_zeros],
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
