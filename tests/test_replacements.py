"""Calls that are replaced so that a graph can be made functional."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fisedit_compile.description import UntraceableGraph
from fisedit_compile.tracing import capture

from tolerances import assert_identical


class Diagonals(nn.Module):
    """As masks of attention are made: the diagonal of a part of a matrix."""

    def forward(self, x: Tensor) -> Tensor:
        """A picture with the mask added; the part is returned by the call that fills it."""
        mask = torch.zeros(x.shape[-2:])
        part = mask[1:, 1:]
        part[:, :] = -9.0
        return x + mask + part.fill_diagonal_(2).sum()


def test_the_diagonal_of_a_part_can_be_filled() -> None:
    for height, width in ((8, 9), (9, 5)):
        x = torch.randn(2, 3, height, width)
        torch.compiler.reset()
        (traced,) = capture(Diagonals(), x)
        assert_identical(traced.gm(x)[0], Diagonals()(x), "traced graph")


def test_other_forms_are_left_as_they_are() -> None:
    class Wrapped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.zeros(x.shape[-2:]).fill_diagonal_(2, wrap=True)

    with pytest.raises(UntraceableGraph, match="as_strided.default looks at other values"):
        capture(Wrapped(), torch.randn(1, 2, 9, 3))
