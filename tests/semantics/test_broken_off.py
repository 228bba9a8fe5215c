"""Networks whose graphs differ from call to call: the error says why, and what it advises works."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisedit_compile as fisedit
from fisedit_compile.errors import FisEditError
from support.harness import compiled
from support.tolerances import assert_identical

SIZE = (13, 9)
MASK = torch.zeros(SIZE, dtype=torch.bool)
MASK[3:8, 2:7] = True


class Network(nn.Module):
    """A convolution before and behind a function of what it gives."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.function(self.conv(x)))


def scaled(x: Tensor) -> Tensor:
    return x / x.abs().max().item()


def counted(x: Tensor) -> Tensor:
    return x / (x > 0.1).nonzero().shape[0]


def picture(seed: int) -> Tensor:
    return torch.randn(2, 4, *SIZE, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def edits(function: Any, calls: int = 1) -> None:
    runtime = fisedit.Runtime()
    network = compiled(Network(function), runtime)
    with runtime.record("base"):
        recorded = [network(picture(seed)) for seed in range(calls)]
    with runtime.edit("base", mask=MASK):
        # The greatest value lies within the mask.
        edited = [network(9 * picture(calls + seed)) for seed in range(calls)]
    for before, now in zip(recorded, edited, strict=True):
        assert_identical(now[..., ~MASK], before[..., ~MASK], "outside the mask")


@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("function", [scaled, counted], ids=lambda function: function.__name__)
def test_a_number_read_from_a_tensor(function: Any, calls: int, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(FisEditError) as caught:
        edits(function, calls)
    message = str(caught.value)
    (line,) = re.findall(
        rf"broke the network off in (line \d+ of \S*{re.escape(__file__.rpartition('/')[2])})", message
    )
    assert "Compute with tensors in that line" in message and "record again" not in message
    warned = [record.getMessage() for record in caplog.records if "broke it off" in record.getMessage()]
    assert warned and all(__file__ in words for words in warned), line


def test_what_is_advised_works() -> None:
    edits(lambda x: x / x.abs().amax())
    edits(lambda x: x / (x > 0.1).sum())
