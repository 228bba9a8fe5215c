"""Building blocks of the test networks: modules ``forward(x, embedding, tokens)`` from map to map.

``x`` is ``[B, C, H, W]``, ``embedding`` ``[B, EMBEDDING]`` (a timestep embedding) and ``tokens`` ``[B, T, TOKENS]``
(a prompt); most blocks read the map alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CHANNELS = 8
EMBEDDING = 10
TOKENS = 6
HEADS = 2


class Map(nn.Module):
    """A block from any module or function of the map alone."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, embedding: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
        return self.function(x)


class Chain(nn.Module):
    """Blocks one after another; gives the blocks that want them the embedding and the tokens."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, embedding: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, embedding, tokens)
        return x


def convolution(channels_in: int = CHANNELS, channels_out: int = CHANNELS, kernel: Any = 3, **options: Any) -> Map:
    """A convolution that keeps the resolution unless told otherwise."""
    options.setdefault("padding", kernel // 2 if isinstance(kernel, int) else tuple(size // 2 for size in kernel))
    return Map(nn.Conv2d(channels_in, channels_out, kernel, **options))


def transposed(channels_in: int = CHANNELS, channels_out: int = CHANNELS, **options: Any) -> Map:
    """A transposed convolution."""
    return Map(nn.ConvTranspose2d(channels_in, channels_out, **options))


def activation(function: Callable[[Tensor], Tensor] = functional.silu) -> Map:
    """A function of each element."""
    return Map(function)


def to_tokens(x: Tensor) -> Tensor:
    """``[B, C, H, W]`` to ``[B, HW, C]``."""
    return x.flatten(2).transpose(1, 2)


def to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """``[B, HW, C]`` to ``[B, C, H, W]``."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], height, width)


class OnTokens(nn.Module):
    """Applies a module to the map as tokens ``[B, HW, C]``, with a residual connection."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, embedding: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
        return x + to_map(self.inner(to_tokens(x)), *x.shape[2:])


class OnChannelsLast(nn.Module):
    """Applies a module to the map as ``[B, H, W, C]``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, embedding: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
        return self.inner(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Residual(nn.Module):
    """``x + inner(x)``."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = Chain(*inner)

    def forward(self, x: Tensor, embedding: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
        return x + self.inner(x, embedding, tokens)


class ResnetBlock(nn.Module):
    """Norm, activation, convolution, time embedding, norm, activation, convolution, residual or its projection."""

    def __init__(self, channels_in: int = CHANNELS, channels_out: int = CHANNELS, scale_shift: bool = False) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.first_norm = nn.GroupNorm(2, channels_in)
        self.first = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.embed = nn.Linear(EMBEDDING, channels_out * (2 if scale_shift else 1))
        self.second_norm = nn.GroupNorm(4, channels_out)
        self.second = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor, tokens: Tensor | None = None) -> Tensor:
        hidden = self.first(functional.silu(self.first_norm(x)))
        embedded = self.embed(functional.silu(embedding))[:, :, None, None]
        if self.scale_shift:
            scale, shift = embedded.chunk(2, dim=1)
            hidden = self.second_norm(hidden) * (1 + scale) + shift
        else:
            hidden = self.second_norm(hidden + embedded)
        return self.shortcut(x) + self.second(functional.silu(hidden))


class ChannelNorm(nn.Module):
    """A layer norm over the channels of ``[B, C, H, W]``, written out (ConvNeXt)."""

    def __init__(self, channels: int = CHANNELS) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels))
        self.bias = nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor, embedding: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class Attention(nn.Module):
    """Self-attention, or cross-attention to the tokens, on the map; ``form`` is how it is written.

    ``sdpa``: heads as ``[B, heads, HW, D]``; ``baddbmm``: heads folded into the batch, as diffusers' plain processor
    does; ``matmul``: scores ``[B, heads, HW, HW]`` by hand; ``joint``: keys of the map and of the tokens together.
    """

    def __init__(
        self,
        channels: int = CHANNELS,
        heads: int = HEADS,
        form: str = "sdpa",
        cross: bool = False,
        query_norm: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.form, self.cross = heads, form, cross
        source = TOKENS if cross else channels
        self.norm = nn.LayerNorm(channels)
        self.query = nn.Linear(channels, channels, bias=False)
        self.key = nn.Linear(source, channels, bias=False)
        self.value = nn.Linear(source, channels, bias=False)
        self.prompt = nn.Linear(TOKENS, channels) if form == "joint" else None
        self.query_norm = nn.RMSNorm(channels // heads) if query_norm else nn.Identity()
        self.output = nn.Linear(channels, channels)

    def forward(self, x: Tensor, embedding: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
        hidden = self.norm(to_tokens(x))
        source = tokens if self.cross else hidden
        assert source is not None
        if self.prompt is not None:
            assert tokens is not None
            source = torch.cat([source, self.prompt(tokens)], dim=1)
        attended = getattr(self, f"_{self.form.replace('joint', 'sdpa')}")(
            self.query(hidden), self.key(source), self.value(source)
        )
        return x + to_map(self.output(attended), *x.shape[2:])

    def _split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1, self.heads, x.shape[2] // self.heads).transpose(1, 2)

    def _sdpa(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = self.query_norm(self._split(query)), self.query_norm(self._split(key)), self._split(value)
        attended = functional.scaled_dot_product_attention(query, key, value)
        return attended.transpose(1, 2).reshape(query.shape[0], query.shape[2], -1)

    def _fold(self, x: Tensor) -> Tensor:
        return self._split(x).reshape(x.shape[0] * self.heads, x.shape[1], -1)

    def _baddbmm(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, length, channels = query.shape
        query, key, value = self._fold(query), self._fold(key), self._fold(value)
        empty = torch.empty(query.shape[0], query.shape[1], key.shape[1], dtype=query.dtype, device=query.device)
        scale = (channels // self.heads) ** -0.5
        scores = torch.baddbmm(empty, query, key.transpose(-1, -2), beta=0, alpha=scale)
        attended = torch.bmm(scores.softmax(dim=-1), value)
        folded = attended.reshape(batch, self.heads, length, channels // self.heads)
        return folded.permute(0, 2, 1, 3).reshape(batch, length, channels)

    def _matmul(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = self._split(query), self._split(key), self._split(value)
        scores = torch.softmax(query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5, dim=-1)
        return (scores @ value).transpose(1, 2).reshape(query.shape[0], query.shape[2], -1)


class PackedAttention(nn.Module):
    """Self-attention whose query, key and value come from one projection, taken apart with ``unbind``."""

    def __init__(self, channels: int = CHANNELS, heads: int = HEADS) -> None:
        super().__init__()
        self.heads = heads
        self.projection = nn.Linear(channels, 3 * channels)
        self.output = nn.Linear(channels, channels)

    def forward(self, x: Tensor, embedding: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
        hidden = to_tokens(x)
        batch, length, channels = hidden.shape
        packed = self.projection(hidden).reshape(batch, length, 3, self.heads, channels // self.heads)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        attended = functional.scaled_dot_product_attention(query, key, value)
        return x + to_map(self.output(attended.transpose(1, 2).reshape(batch, length, channels)), *x.shape[2:])


class SingleHeadAttention(nn.Module):
    """The attention of old autoencoders: group norm, 1x1 convolutions, one head over ``[B, C, HW]``."""

    def __init__(self, channels: int = CHANNELS) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, channels)
        self.query = nn.Conv2d(channels, channels, 1)
        self.key = nn.Conv2d(channels, channels, 1)
        self.value = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, embedding: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
        hidden = self.norm(x)
        query, key, value = (layer(hidden).flatten(2) for layer in (self.query, self.key, self.value))
        scores = torch.bmm(query.transpose(1, 2), key) * query.shape[1] ** -0.5
        attended = torch.bmm(scores.softmax(dim=2), value.transpose(1, 2))
        return x + attended.transpose(1, 2).reshape(x.shape)


class GatedFeedForward(nn.Module):
    """Layer norm, GEGLU and projection on tokens."""

    def __init__(self, channels: int = CHANNELS) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.expand = nn.Linear(channels, 6 * channels)
        self.project = nn.Linear(3 * channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, gate = self.expand(self.norm(tokens)).chunk(2, dim=-1)
        return self.project(hidden * functional.gelu(gate))


class SqueezeExcite(nn.Module):
    """Gates each channel by a function of its spatial mean, which looks at the whole map."""

    def __init__(self, channels: int = CHANNELS) -> None:
        super().__init__()
        self.down = nn.Linear(channels, 4)
        self.up = nn.Linear(4, channels)

    def forward(self, x: Tensor, embedding: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
        gate = torch.sigmoid(self.up(functional.relu(self.down(x.mean(dim=(2, 3))))))
        return x * gate[:, :, None, None]


class ConvNext(nn.Module):
    """A ConvNeXt block: depthwise convolution, channels-last layer norm and linears, layer scale, residual."""

    def __init__(self, channels: int = CHANNELS) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.expand = nn.Linear(channels, 3 * channels)
        self.project = nn.Linear(3 * channels, channels)
        self.register_buffer("scale", torch.rand(channels))

    def forward(self, x: Tensor, embedding: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
        hidden = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        hidden = self.scale * self.project(functional.gelu(self.expand(hidden), approximate="tanh"))
        return x + hidden.permute(0, 3, 1, 2)


class Positional(nn.Module):
    """Adds a learned position of full map size, as a map and as tokens."""

    def __init__(self, height: int, width: int, channels: int = CHANNELS) -> None:
        super().__init__()
        self.map = nn.Parameter(torch.randn(1, channels, height, width))
        self.tokens = nn.Parameter(torch.randn(1, height * width, channels))
        self.mix = nn.Linear(channels, channels)

    def forward(self, x: Tensor, embedding: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
        x = functional.silu(x + self.map)
        return to_map(self.mix(to_tokens(x) + self.tokens), *x.shape[2:])


class ConvolvedPosition(nn.Module):
    """A map that no input takes part in, convolved and then added."""

    def __init__(self, height: int, width: int, channels: int = CHANNELS) -> None:
        super().__init__()
        self.map = nn.Parameter(torch.randn(1, channels, height, width))
        self.inner = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
        return x + self.inner(self.map)


class AdaptiveNorm(nn.Module):
    """Layer norm without weights, scaled and shifted by the embedding, on tokens (a diffusion transformer)."""

    def __init__(self, channels: int = CHANNELS) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, elementwise_affine=False)
        self.modulation = nn.Linear(EMBEDDING, 3 * channels)
        self.mix = nn.Linear(channels, channels)

    def forward(self, x: Tensor, embedding: Tensor, tokens: Tensor | None = None) -> Tensor:
        shift, scale, gate = self.modulation(functional.silu(embedding)).chunk(3, dim=1)
        hidden = self.norm(to_tokens(x)) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
        return x + to_map(gate.unsqueeze(1) * self.mix(hidden), *x.shape[2:])
