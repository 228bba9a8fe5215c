"""Networks unlike U-Nets: transformers over patches, window by window, prompts that are images, batch norms.

Each has its own sizes, mutually distinct, and one compilation; the masks are those that found mistakes.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fisedit_compile as fisedit
from support.harness import MaskRecipe, compile_network
from support.networks import Network

CHANNELS = 8


class PatchTransformer(nn.Module):
    """Patches by a convolution, attention between them, pixels by an einsum and reshapes (DiT, PixArt)."""

    def __init__(self, token: bool = False) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 16, 2, 2)
        self.token = nn.Parameter(torch.randn(1, 1, 16)) if token else None
        self.norm, self.packed, self.output = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.feed = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 40), nn.GELU(), nn.Linear(40, 16))
        self.leave = nn.Linear(16, 2 * 2 * 3)

    def _attend(self, hidden: Tensor) -> Tensor:
        packed = self.packed(self.norm(hidden)).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(*packed.unbind(0))
        return self.output(attended.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, prompt: Tensor | None = None) -> Tensor:
        batch, _, height, width = x.shape
        hidden = self.enter(x).flatten(2).transpose(1, 2)
        count = hidden.shape[1]
        if self.token is not None:
            hidden = torch.cat([self.token.expand(batch, -1, -1), hidden], dim=1)
        if prompt is not None:
            hidden = torch.cat([prompt, hidden], dim=1)
        for _ in range(2):
            hidden = hidden + self._attend(hidden)
            hidden = hidden + self.feed(hidden)
        hidden = hidden[:, -count:]
        pixels = self.leave(hidden).reshape(batch, height // 2, width // 2, 2, 2, 3)
        return torch.einsum("nhwpqc->nchpwq", pixels).reshape(x.shape)


class Overwritten(nn.Module):
    """Channels, and queries of the picture behind those of a prompt, are overwritten in place (FreeU, CogView)."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, CHANNELS, 3, padding=1), nn.Conv2d(CHANNELS, 3, 3, padding=1)
        self.packed = nn.Linear(CHANNELS, 3 * CHANNELS)
        self.turn = nn.Parameter(torch.randn(2, 1, 13 * 9, CHANNELS))

    def _turned(self, hidden: Tensor) -> Tensor:
        first, second = hidden.chunk(2, dim=-1)
        return hidden * self.turn[0] + torch.cat([-second, first], dim=-1) * self.turn[1]

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        hidden = self.enter(x)
        hidden[:, : CHANNELS // 2] = hidden[:, : CHANNELS // 2] * 1.3
        hidden[:, -1] = hidden[:, 0].sin()
        count = prompt.shape[1]
        joined = torch.cat([prompt, hidden.flatten(2).transpose(1, 2)], dim=1)
        query, key, value = self.packed(joined).chunk(3, dim=-1)
        query, key = query.clone(), key.clone()
        query[:, count:] = self._turned(query[:, count:])
        key[:, count:] = self._turned(key[:, count:])
        attended = functional.scaled_dot_product_attention(*(part.unsqueeze(1) for part in (query, key, value)))
        return self.leave(hidden + attended[:, 0, count:].transpose(1, 2).reshape(hidden.shape))


class ImagePrompt(nn.Module):
    """Cross-attention to tokens of several images, which come as [B, images, tokens, C] (IP-Adapter)."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(4, CHANNELS, 3, padding=1), nn.Conv2d(CHANNELS, 4, 3, padding=1)
        self.query, self.packed = nn.Linear(CHANNELS, CHANNELS), nn.Linear(20, 2 * CHANNELS)

    def forward(self, x: Tensor, images: Tensor) -> Tensor:
        hidden = self.enter(x)
        query = self.query(hidden.flatten(2).transpose(1, 2)).unsqueeze(1)
        key, value = self.packed(images).flatten(1, 2).unsqueeze(1).chunk(2, dim=-1)
        attended = functional.scaled_dot_product_attention(query, key, value)
        return self.leave(hidden + attended.squeeze(1).transpose(1, 2).reshape(hidden.shape))


class Normed(nn.Module):
    """A U-Net with batch norms, transposed convolutions, and a gate from the mean of a small map."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS), nn.ReLU())
        self.down = nn.Sequential(nn.Conv2d(CHANNELS, 12, 3, 2, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, 12, 1), nn.Sigmoid())
        self.up = nn.ConvTranspose2d(12, CHANNELS, 2, 2)
        self.leave = nn.Conv2d(2 * CHANNELS, 3, 1)
        for norm in (self.enter[1], self.down[1]):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.enter(x)
        coarse = self.down(fine)
        return self.leave(torch.cat([fine, self.up(coarse * self.gate(coarse))], dim=1))


class EncoderLayers(nn.Module):
    """Layers that inference makes one operator, and attention that puts positions first, between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 3, 3, padding=1)
        self.first = nn.TransformerEncoderLayer(12, 2, 20, batch_first=True)
        self.second = nn.TransformerEncoderLayer(12, 4, 20, activation="gelu", norm_first=True, batch_first=True)

        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.enter(x)
        tokens = self.first(hidden.flatten(2).transpose(1, 2))
        tokens = self.second(tokens + self.attention(tokens, tokens, tokens)[0])
        return self.leave(tokens.transpose(1, 2).reshape(hidden.shape))


def pixart() -> nn.Module:
    """PixArt of diffusers, one block."""
    from diffusers import PixArtTransformer2DModel

    class Positional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = PixArtTransformer2DModel(
                num_attention_heads=2,
                attention_head_dim=8,
                in_channels=4,
                out_channels=8,
                num_layers=1,
                cross_attention_dim=16,
                caption_channels=20,
                sample_size=20,
                use_additional_conditions=False,
            )

        def forward(self, x: Tensor, prompt: Tensor, timestep: Tensor) -> Tensor:
            unused = {"resolution": None, "aspect_ratio": None}
            return self.network(x, prompt, timestep, added_cond_kwargs=unused).sample

    return Positional()


NETWORKS = [
    (Network("patches", PatchTransformer, ((2, 3, 14, 10),)), 1.0),
    (Network("patches and a token", lambda: PatchTransformer(token=True), ((2, 3, 14, 10),)), 0.9),
    (Network("patches and a prompt", PatchTransformer, ((2, 3, 14, 10), (2, 11, 16))), 0.7),
    (Network("image prompt", ImagePrompt, ((2, 4, 13, 9), (2, 3, 7, 20))), 0.7),
    (Network("written in place", Overwritten, ((2, 3, 13, 9), (2, 7, CHANNELS))), 0.9),
    (Network("batch norms", Normed, ((2, 3, 14, 10),)), 0.9),
    (Network("encoder layers", EncoderLayers, ((2, 3, 13, 9),)), 1.0),
    (Network("pixart", pixart, ((2, 4, 22, 18), (2, 7, 20), (2,)), fixed=(2,)), 0.9),
]


@pytest.mark.parametrize(("network", "share"), NETWORKS, ids=[network.name for network, _ in NETWORKS])
def test_other_networks(network: Network, share: float) -> None:
    case = compile_network(network, convolution="rows")  # a mask of everything runs the sparse graph, too
    case.check_edits(MaskRecipe("per-sample", 5), MaskRecipe("rectangle", 4))
    assert fisedit.explain(network.module(), *network.inputs(0)).sparse_mac_fraction >= share


Build = Callable[[], nn.Module]


@pytest.mark.parametrize(
    ("build", "shapes", "dense"),
    [
        (PatchTransformer, ((2, 3, 14, 10),), set()),
        (
            Overwritten,
            ((2, 3, 13, 9), (2, 7, CHANNELS)),
            {"aten.cat.default: values are joined along positions or samples"},
        ),
        (Normed, ((2, 3, 14, 10),), {"aten.adaptive_avg_pool2d.default: it pools the whole map"}),
    ],
)
def test_what_stays_dense(build: Build, shapes: tuple[tuple[int, ...], ...], dense: set[str]) -> None:
    report = fisedit.explain(build().eval().requires_grad_(False), *map(torch.randn, shapes))
    assert {f"{miss.target}: {miss.reason}" for miss in report.dense_nodes} == dense
