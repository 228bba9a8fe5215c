"""How many graphs of one network there may be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fisedit_compile as fisedit
from fisedit_compile.errors import CallMismatchError
from fisedit_compile.runtime import recompiles


class Small(nn.Module):
    """A class of its own: the limit is one of its forward function."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.convolution(x))


def picture(width: int) -> Tensor:
    return torch.randn(2, 3, 13, width, generator=torch.Generator().manual_seed(0))


def test_more_sizes_than_dynamo_keeps_by_default() -> None:
    runtime = fisedit.Runtime()
    compiled = torch.compile(Small(), backend="fisedit", options={"runtime": runtime})
    widths = range(5, 6 + torch._dynamo.config.recompile_limit)
    for width in widths:
        with runtime.record(str(width)):
            compiled(picture(width))
    assert runtime.stats.calls["record"] == len(runtime.bases) == len(widths)


def test_a_call_beyond_the_limit_of_graphs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo would run the network eagerly: that call would be missing from the recording."""
    monkeypatch.setattr(recompiles, "GRAPHS", 2)
    runtime = fisedit.Runtime()
    compiled = torch.compile(Small(), backend="fisedit", options={"runtime": runtime})
    with torch._dynamo.config.patch(recompile_limit=1):
        for width in (5, 6):
            with runtime.record("base"):
                compiled(picture(width))
        with pytest.raises(CallMismatchError, match="its limit of 2 graphs"), runtime.record("other"):
            compiled(picture(7))
    assert runtime.bases == ("base",)
