"""Class and register tokens in front of the picture's: the picture's part of what is returned is masked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fisedit_compile as fisedit
from support.harness import compiled
from support.reference import Reference
from support.tolerances import assert_identical, assert_near

HEIGHT, WIDTH, CHANNELS, PATCH = 38, 22, 12, 4
POSITIONS = (HEIGHT // PATCH) * (WIDTH // PATCH)


class Attention(nn.Module):
    """Attention of two heads, with a bias for each pair of tokens or none."""

    def __init__(self, tokens: int, bias: bool) -> None:
        super().__init__()
        self.packed, self.last = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.bias = nn.Parameter(torch.randn(2, tokens, tokens)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.packed(x).unflatten(2, (3, 2, CHANNELS // 2)).permute(2, 0, 3, 1, 4)
        mask = None if self.bias is None else self.bias[None]
        attended = functional.scaled_dot_product_attention(query, key, value, mask)
        return self.last(attended.transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Patches with ``front`` tokens before them; returns all of them joined.

    ``turn`` is what happens to the tokens of each block before the others, as of rotary positions.
    """

    def __init__(self, front: int, bias: bool, turn: Callable[[Tensor, int], Tensor] = lambda x, front: x) -> None:
        super().__init__()
        self.front, self.turn = front, turn
        self.patches = nn.Conv2d(3, CHANNELS, PATCH, PATCH)
        self.tokens = nn.Parameter(torch.randn(1, front, CHANNELS))
        self.places = nn.Parameter(torch.randn(1, front + POSITIONS, CHANNELS))
        self.norms = nn.ModuleList(nn.LayerNorm(CHANNELS) for _ in range(4))
        self.attentions = nn.ModuleList(Attention(front + POSITIONS, bias) for _ in range(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(CHANNELS, 20), nn.GELU(), nn.Linear(20, CHANNELS)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.tokens.expand(x.shape[0], -1, -1), x], 1) + self.places
        for first, attention, second, mlp in zip(
            self.norms[:2], self.attentions, self.norms[2:], self.mlps, strict=True
        ):
            x = x + attention(self.turn(first(x), self.front))
            x = x + mlp(second(x))
        return x


class Plain(nn.Module):
    """A class token and a linear layer, without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.linear = nn.Conv2d(3, CHANNELS, PATCH, PATCH), nn.Linear(CHANNELS, CHANNELS)
        self.token = nn.Parameter(torch.randn(1, 1, CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.linear(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1))


def rotated(x: Tensor, front: int) -> Tensor:
    """Other signs for every second channel of the picture's tokens."""
    turned = torch.stack([-x[:, front:, 1::2], x[:, front:, ::2]], -1).flatten(2)
    return torch.cat([x[:, :front], turned], 1)


NETWORKS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "a class token": (1, lambda: Transformer(1, bias=False)),
    "a bias for each pair": (2, lambda: Transformer(2, bias=True)),
    "registers and rotary positions": (5, lambda: Transformer(5, bias=False, turn=rotated)),
    "no attention": (1, Plain),
}


def draw(seed: int) -> Tensor:
    return torch.randn(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_the_part_of_the_picture_is_masked(name: str) -> None:
    torch.manual_seed(3)
    front, make = NETWORKS[name]
    module = make().requires_grad_(False).eval()
    reference = Reference(module, [draw(1)])
    runtime = fisedit.Runtime()
    network = compiled(module, runtime, convolution="rows")
    with runtime.record("base"):
        recorded = network(draw(1))
    mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    mask[9:17, 3:14] = True
    with runtime.edit("base", mask=mask):
        edited = network(draw(2))
    kept = ~nn.functional.max_pool2d(mask[None].float(), PATCH).bool().flatten()
    assert_identical(edited[:, front:][:, kept], recorded[:, front:][:, kept], "outside the mask")
    assert (edited[:, front:][:, ~kept] != recorded[:, front:][:, ~kept]).all()
    (expected,) = reference.edit(reference.record([draw(1)]), [draw(2)], mask).outputs
    assert_near(edited, expected, "against the reference")
    assert_near(recorded, module(draw(1)), "recorded")
    with runtime.edit("base", mask=torch.ones(HEIGHT, WIDTH)):
        assert_near(network(draw(2)), module(draw(2)), "everything")
    assert runtime.stats.calls["edit"] == 2
    assert fisedit.explain(module, draw(1)).sparse_mac_fraction > 0.8
