"""Attention within windows that are folded into the batch: whole windows are computed, and nothing outside the mask."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fisedit_compile as fisedit
from support.harness import MaskRecipe, compiled
from support.reference import Reference
from support.tolerances import assert_identical, assert_near

CHANNELS, HEADS = 12, 3
KINDS = ("pixel", "border", "rectangle", "per-sample")


def partition(x: Tensor, side: int, across: int | None = None) -> Tensor:
    """``[B, H, W, C]`` to ``[B * windows, side * across, C]``."""
    batch, height, width, channels = x.shape
    across = across or side
    x = x.view(batch, height // side, side, width // across, across, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, side * across, channels)


def together(windows: Tensor, height: int, width: int, side: int, across: int | None = None) -> Tensor:
    """The inverse."""
    channels, across = windows.shape[-1], across or side
    x = windows.reshape(-1, height // side, width // across, side, across, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, height, width, channels)


def apart(height: int, width: int, side: int, shift: int) -> Tensor:
    """A mask ``[windows, T, T]`` of what a cyclic shift brought together, -100 where it applies."""
    regions = torch.zeros(1, height, width, 1)
    for row, rows in enumerate((slice(0, -side), slice(-side, -shift), slice(-shift, None))):
        for column, columns in enumerate((slice(0, -side), slice(-side, -shift), slice(-shift, None))):
            regions[:, rows, columns] = 3 * row + column
    windows = partition(regions, side)[..., 0]
    return (windows[:, None] != windows[:, :, None]) * -100.0


class Block(nn.Module):
    """A block of Swin.

    Args:
        side: of the windows.
        shift: by which the map is rolled.
        way: how attention is written: ``"product"``, ``"fused"`` or ``"cosine"``.
    """

    def __init__(self, side: int, shift: int, way: str) -> None:
        super().__init__()
        self.side, self.shift, self.way = side, shift, way
        self.first, self.second = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)
        self.packed, self.last = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.bias = nn.Parameter(torch.randn(1, HEADS, side**2, side**2))
        self.mlp = nn.Sequential(nn.Linear(CHANNELS, 20), nn.GELU(), nn.Linear(20, CHANNELS))

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Within windows ``[B * windows, T, C]``; the mask is ``[windows, T, T]``."""
        count, tokens, _ = x.shape
        query, key, value = self.packed(x).reshape(count, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        if self.way == "fused":
            bias = self.bias
            if mask is not None:
                samples = count // mask.shape[0]
                bias = bias + mask[None, :, None].expand(samples, -1, HEADS, -1, -1).reshape(
                    count, HEADS, tokens, tokens
                )
            found = functional.scaled_dot_product_attention(query, key, value, bias)
        else:
            if self.way == "cosine":
                query, key = functional.normalize(query, dim=-1), functional.normalize(key, dim=-1)
            scores = (query * 0.5) @ key.transpose(-2, -1) + self.bias
            if mask is not None:
                scores = scores.view(count // mask.shape[0], mask.shape[0], HEADS, tokens, tokens)
                scores = (scores + mask[None, :, None]).view(count, HEADS, tokens, tokens)
            found = scores.softmax(-1) @ value
        return self.last(found.transpose(1, 2).reshape(count, tokens, CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        side, shift = self.side, self.shift
        padded = functional.pad(self.first(x), (0, 0, 0, -width % side, 0, -height % side))
        size = padded.shape[1:3]
        moved = torch.roll(padded, (-shift, -shift), (1, 2)) if shift else padded
        mask = apart(*size, side, shift) if shift else None
        attended = together(self.attend(partition(moved, side), mask), *size, side)
        back = torch.roll(attended, (shift, shift), (1, 2)) if shift else attended
        x = x + back[:, :height, :width]
        return x + self.mlp(self.second(x))


class Swin(nn.Module):
    """Convolutions around blocks, the second of which is shifted."""

    def __init__(self, side: int = 4, way: str = "product", shift: int = 1) -> None:
        super().__init__()
        self.before, self.after = nn.Conv2d(3, CHANNELS, 3, padding=1), nn.Conv2d(CHANNELS, 5, 3, padding=1)
        self.blocks = nn.Sequential(Block(side, 0, way), Block(side, shift, way))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.blocks(self.before(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class Kernels(nn.Module):
    """Linear layers within windows of the padded map, without attention."""

    def __init__(self, side: int, across: int) -> None:
        super().__init__()
        self.side, self.across = side, across
        self.mix, self.last = nn.Linear(side * across, side * across), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        padded = functional.pad(x.permute(0, 2, 3, 1), (0, 0, 0, -width % self.across, 0, -height % self.side))
        windows = partition(padded, self.side, self.across)
        mixed = windows + self.mix(windows.transpose(1, 2)).transpose(1, 2)
        back = together(mixed, *padded.shape[1:3], self.side, self.across)[:, :height, :width]
        return self.last(back.permute(0, 3, 1, 2))


class Crossed(nn.Module):
    """Queries of windows, keys and values of another projection, packed apart in front of the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.pair = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.last = nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        shape = (batch, -1, height // 3, 3, width // 5, 5)
        query = self.query(x).view(shape).permute(0, 2, 4, 3, 5, 1).reshape(-1, 15, 4)
        pair = self.pair(x).view(batch, 2, 4, *shape[2:]).permute(1, 0, 3, 5, 4, 6, 2)
        key, value = pair.reshape(2, -1, 15, 4).unbind(0)
        found = ((query @ key.transpose(1, 2)).softmax(-1) @ value).view(batch, height // 3, width // 5, 3, 5, 4)
        return self.last(found.permute(0, 5, 1, 3, 2, 4).reshape(batch, 4, height, width))


class Grid(nn.Module):
    """Attention between positions that lie at the same place of each of 4x4 blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.packed = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 12)
        self.last = nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        x = self.before(x).permute(0, 2, 3, 1)
        grid = x.view(batch, 4, height // 4, 4, width // 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, 16, 4)
        found = functional.scaled_dot_product_attention(*self.packed(grid).chunk(3, -1))
        found = found.view(batch, height // 4, width // 4, 4, 4, 4).permute(0, 3, 1, 4, 2, 5)
        return self.last((x + found.reshape(batch, height, width, 4)).permute(0, 3, 1, 2))


NETWORKS: dict[str, tuple[tuple[int, int], Callable[[], nn.Module]]] = {
    "product": ((22, 27), lambda: Swin(4)),
    "fused": ((22, 27), lambda: Swin(4, "fused", 2)),
    "cosine": ((23, 17), lambda: Swin(7, "cosine", 3)),
    "one row of windows": ((7, 25), lambda: Swin(8, "fused", 3)),
    "linear": ((13, 17), lambda: Kernels(3, 3)),
    "not square": ((13, 19), lambda: Kernels(2, 4)),
    "keys apart": ((21, 25), Crossed),
    "grid": ((20, 28), Grid),
}


def draw(size: tuple[int, int], seed: int) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_whole_windows_are_computed(name: str) -> None:
    torch.manual_seed(3)
    size, make = NETWORKS[name]
    module = make().requires_grad_(False).eval()
    base, new = draw(size, 1), draw(size, 2)
    reference = Reference(module, [base])
    recording = reference.record([base])
    runtime = fisedit.Runtime()
    network = compiled(module, runtime, convolution="rows")
    with runtime.record("base"):
        recorded = network(base)
    assert_near(recorded, module(base), "recorded")
    for kind in KINDS:
        mask = MaskRecipe(kind, 5).draw(size, 2)
        with runtime.edit("base", mask=mask):
            edited = network(new)
        (inside,) = reference.inside(mask)
        assert inside is not None
        outside = ~inside.expand(edited.shape)
        assert_identical(edited[outside], recorded[outside], f"outside the mask, {kind}")
        assert (edited[~outside] != recorded[~outside]).all()
        assert_near(edited, reference.edit(recording, [new], mask).outputs[0], f"against the reference, {kind}")
        with runtime.edit("base", mask=mask):
            assert_near(network(base), recorded, f"unchanged inputs, {kind}")
    with runtime.edit("base", mask=torch.ones(size)):
        assert_near(network(new), module(new), "everything")
    assert runtime.stats.calls["dense"] == 0
    assert fisedit.explain(module, base).sparse_mac_fraction > 0.9
