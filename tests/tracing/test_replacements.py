"""Calls that are replaced so that a graph can be made functional."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fisedit_compile.tracing.description import UntraceableGraph
from fisedit_compile.tracing.trace import capture
from support.tolerances import assert_identical


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


class Dropping(nn.Module):
    """What dropped elements in training is changed in place."""

    def __init__(self, *between: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 3, 1), *between, nn.Conv2d(3, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x)
        return result


class Dropped(nn.Module):
    """A dropout by one of PyTorch's functions, changed in place, and the value that it was made of."""

    def __init__(self, drop: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        return self.drop(x).relu_() + x


@pytest.mark.parametrize(
    "module",
    [
        Dropping(nn.Dropout(0.3), nn.ReLU(inplace=True)).eval(),
        Dropping(nn.Dropout(0.0), nn.SiLU(inplace=True)),
        Dropping(nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Dropout2d(0.3), nn.Hardswish(inplace=True)).eval(),
        Dropping(nn.Dropout(0.3, inplace=True), nn.ReLU(inplace=True)).eval(),
        Dropped(lambda x: functional.dropout(x, training=False)),
        Dropped(lambda x: functional.dropout(input=x, p=0.0)),
        Dropped(lambda x: torch.dropout(x, 0.5, False)),
        Dropped(lambda x: torch.dropout(x, p=0.5, train=False)),
    ],
    ids=["dropout", "no probability", "several", "in place", "function", "keywords", "operator", "its keywords"],
)
@torch.no_grad()
def test_what_comes_behind_an_idle_dropout_may_be_in_place(module: nn.Module) -> None:
    torch.compiler.reset()
    x = torch.randn(2, 3, 5, 7)
    (traced,) = capture(module, x)
    parameters = [value for name, value in module.named_parameters()]
    inputs = [x if info.kind == "user" else parameters.pop(0) for info in traced.input_infos]
    assert_identical(traced.gm(*inputs)[0], module(x), "traced graph")


def test_random_dropouts_stay_random() -> None:
    with pytest.raises(UntraceableGraph, match="dropout.default is random"):
        capture(Dropping(nn.Dropout(0.3)).train(), torch.randn(2, 3, 5, 7))
