"""Maps that are products of queries and a map, or have a frame inside, where queries, channels and sizes are equal.

What a mask leaves is the dense network on the mixed picture: in front of the operator each position is computed for
itself.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fisedit_compile as fisedit
from support.harness import compiled
from support.tolerances import assert_identical, assert_near

#: batch, channels, queries, height, width
SIZES = [(2, 5, 6, 6, 11), (2, 5, 8, 8, 8), (2, 6, 6, 6, 11), (2, 64, 8, 8, 8), (1, 8, 64, 8, 8), (2, 8, 8, 8, 8)]


class Queried(nn.Module):
    """A convolution for each position, then a function of it, of queries, and of queries that depend on the picture."""

    def __init__(self, function: Callable[[Queried, Tensor], Tensor], channels: int, queries: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Conv2d(3, channels, 1)
            self.queries = nn.Parameter(torch.randn(queries, channels))
            self.scale = nn.Linear(channels, queries)
            self.frames = nn.Conv3d(channels, channels, 1)
            self.last = nn.Conv2d(queries, 2, 1)
        self.function = function

    def of_picture(self, hidden: Tensor) -> Tensor:
        """``[B, queries, channels]``, made of the means of the map."""
        return self.scale(hidden.mean((2, 3)))[:, :, None] * self.queries

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.function(self, self.first(x))


def as_map(flat: Tensor, hidden: Tensor) -> Tensor:
    return flat.reshape(hidden.shape[0], -1, *hidden.shape[2:])


def frame_of_tokens(network: Queried, hidden: Tensor) -> Tensor:
    batch, channels, height, width = hidden.shape
    tokens = network.frames(hidden.unsqueeze(2)).permute(0, 2, 3, 4, 1).reshape(batch, height * width, channels)
    attended = functional.scaled_dot_product_attention(tokens, tokens, tokens)
    return attended.reshape(batch, 1, height, width, channels).permute(0, 4, 1, 2, 3)[:, :, 0]


FUNCTIONS: dict[str, Callable[[Queried, Tensor], Tensor]] = {
    "product with queries": lambda n, h: as_map(n.queries @ h.flatten(2), h),
    "product with queries of the picture": lambda n, h: as_map(n.of_picture(h) @ h.flatten(2), h),
    "batches of products": lambda n, h: as_map(torch.bmm(n.of_picture(h), h.flatten(2)), h).sigmoid(),
    "masks by einsum": lambda n, h: torch.einsum("bqc,bchw->bqhw", n.of_picture(h), h),
    "masks by einsum of parameters": lambda n, h: torch.einsum("qc,bchw->bqhw", n.queries, h),
    "masks of attending queries": lambda n, h: torch.einsum(
        "bqc,bchw->bqhw",
        functional.scaled_dot_product_attention(
            n.queries.expand(h.shape[0], -1, -1), h.flatten(2).transpose(1, 2), h.flatten(2).transpose(1, 2)
        ),
        h,
    ),
    "a frame": lambda n, h: n.frames(h.unsqueeze(2)).squeeze(2),
    "a frame that is returned": lambda n, h: n.frames(h.unsqueeze(2)),
    "a frame of tokens": frame_of_tokens,
}


def draw(batch: int, size: tuple[int, int], seed: int) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FUNCTIONS)
@torch.no_grad()
def test_they_are_masked(name: str) -> None:
    for batch, channels, queries, height, width in SIZES:
        torch.compiler.reset()
        module, runtime = Queried(FUNCTIONS[name], channels, queries).requires_grad_(False), fisedit.Runtime()
        network = compiled(module, runtime)
        old, new = (draw(batch, (height, width), seed) for seed in range(2))
        mask = torch.zeros(height, width, dtype=torch.bool)
        mask[1:4, 2:7] = True
        with runtime.record("base"):
            recorded = network(old)
        with runtime.edit("base", mask=mask):
            edited = network(new)
        assert_identical(edited[..., ~mask], recorded[..., ~mask], "outside the mask")
        assert_near(edited[..., mask], module(torch.where(mask, new, old))[..., mask], "inside the mask")
        with runtime.edit("base", mask=mask):
            assert_near(network(old), recorded, "unchanged inputs")
        assert runtime.stats.calls["edit"] == 2, "the network runs densely"


@torch.no_grad()
def test_what_also_reads_them_reads_them_whole() -> None:
    """The masks are returned, and a convolution reads them, which tells nothing of where positions are."""

    def both(network: Queried, hidden: Tensor) -> tuple[Tensor, Tensor]:
        masks = torch.einsum("bqc,bchw->bqhw", network.of_picture(hidden), hidden)
        return masks, masks.softmax(1).amax((2, 3))

    module, runtime = Queried(both, 64, 8).requires_grad_(False), fisedit.Runtime()
    network = compiled(module, runtime)
    old, new = (draw(2, (8, 8), seed) for seed in range(2))
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[1:4, 2:7] = True
    with runtime.record("base"):
        recorded, _ = network(old)
    with runtime.edit("base", mask=mask):
        edited, greatest = network(new)
    masks, wanted = module(torch.where(mask, new, old))
    assert_identical(edited[..., ~mask], recorded[..., ~mask], "outside the mask")
    assert_near(edited[..., mask], masks[..., mask], "inside the mask")
    assert_near(greatest, wanted, "what is made of all positions")
