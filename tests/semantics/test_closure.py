"""Behind windows that leave out their own position: active positions by closure, and operators that depend on more.

Positions outside the mask whose windows reach into it are active by closure. So all that the last kernel reads is that
of the dense network on the mixed picture, up to the outline of the mask.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fisedit_compile as fisedit
from support.harness import compiled
from support.tolerances import assert_identical, assert_near

SIZE = (17, 23)

BEHIND: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax over channels": lambda x: x.softmax(1),
    "scan of channels": lambda x: x.cumsum(1),
    "product with a matrix of the map": lambda x: torch.matmul(
        x.permute(0, 2, 3, 1), x.mean((0, 2, 3)).outer(x.mean((0, 2, 3)))
    ).permute(0, 3, 1, 2),
    "group norm": nn.GroupNorm(2, 4),
    "scale of the map": lambda x: x * x.mean((2, 3), keepdim=True),
}


class Gap(nn.Module):
    """A 2x2 kernel with a dilation of 4 reads positions around its own, which it leaves out; then an operator."""

    def __init__(self, behind: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Conv2d(2, 4, 2, padding=2, dilation=4).requires_grad_(False)
            self.last = nn.Conv2d(4, 3, 3, padding=1).requires_grad_(False)
        self.behind = behind

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.behind(self.first(x)))
        return result


@pytest.mark.parametrize("name", BEHIND)
@torch.no_grad()
def test_an_edit_behind_a_gap(name: str) -> None:
    module, runtime = Gap(BEHIND[name]), fisedit.Runtime()
    network = compiled(module, runtime, convolution="rows")
    old, new = (torch.randn(1, 2, *SIZE, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[2:13, 3:17] = True
    with runtime.record("base"):
        recorded = network(old)
    with runtime.edit("base", mask=mask):
        edited = network(new)
    with runtime.edit("base", mask=torch.ones(SIZE)):
        assert_near(network(new), module(new), "full mask")
    with runtime.edit("base", mask=mask):
        assert_near(network(old), recorded, "unchanged inputs")
    assert_identical(edited[..., ~mask], recorded[..., ~mask], "outside the mask")
    inside = mask
    if "channels" not in name:
        # Behind what depends on everything, positions outside the mask stay, and the last kernel reads the next ones.
        inside = torch.zeros_like(mask)
        inside[3:12, 4:16] = True
    assert_near(edited[..., inside], module(torch.where(mask, new, old))[..., inside], "inside the mask")
    assert not torch.equal(edited, recorded)
