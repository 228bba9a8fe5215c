"""Networks with operators of which it is not known how they move positions: right, slow, and said so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fisedit_compile as fisedit
from support.harness import compiled
from support.tolerances import assert_identical, assert_near

SIZE = (18, 22)


class Sorted(nn.Module):
    """Two convolutions, and columns in the order of what one channel holds between them."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Conv2d(2, 3, 3, padding=1).requires_grad_(False)
            self.last = nn.Conv2d(3, 2, 3, padding=1).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.first(x)
        order = hidden[0, 0].mean(0).argsort()
        result: Tensor = self.last(hidden[:, :, :, order])
        return result


@torch.no_grad()
def test_all_positions_behind_are_computed_and_a_warning_says_so(caplog: pytest.LogCaptureFixture) -> None:
    module, runtime = Sorted(), fisedit.Runtime()
    network = compiled(module, runtime)
    old, new = (torch.randn(1, 2, *SIZE, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[4:12, 3:15] = True
    with runtime.record("base"):
        recorded = network(old)
    with runtime.edit("base", mask=mask):
        edited = network(new)
    # What the output shows inside the mask is that of the picture as it now is, wherever it came from.
    mixed = torch.where(mask, new, old)
    hidden = torch.where(mask, module.first(mixed), module.first(old))
    order = hidden[0, 0].mean(0).argsort()
    assert_near(edited[..., mask], module.last(hidden[:, :, :, order])[..., mask], "inside the mask")
    assert_identical(edited[..., ~mask], recorded[..., ~mask], "outside the mask")
    (message,) = [text for text in caplog.messages if "moves positions in a way that is not known" in text]
    assert "aten.index.Tensor" in message and "its order or its places come from the values" in message
    explanation = fisedit.explain(module, old)
    assert [miss.target for miss in explanation.lost] == ["aten.index.Tensor"]
    assert "Where positions go is not known" in str(explanation)
