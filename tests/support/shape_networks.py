"""Test networks of what is no convolution, norm or attention: resampling, reshaping, global and unknown operators."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from support.blocks import (
    CHANNELS,
    Attention,
    ConvNext,
    ConvolvedPosition,
    Map,
    OnChannelsLast,
    Positional,
    SqueezeExcite,
    convolution,
)
from support.networks import ATTENTION, CONVOLUTIONS, HEIGHT, NORMS, WIDTH, Network, mapped, plain


def qkv_chunks(x: Tensor) -> Tensor:
    """Takes the channels apart in three ways and puts them together in another order."""
    first, second = x.chunk(2, dim=1)
    third, fourth, fifth = torch.split(x, [1, 3, 4], dim=1)
    planes = x.unbind(1)
    return torch.cat([second * first.sigmoid(), torch.stack([planes[3], planes[0]], 1), fifth[:, 1:3]], 1) + torch.cat(
        [fourth, third, fifth], 1
    )


def windows(x: Tensor) -> Tensor:
    """Attention within rows: the rows are folded into the batch."""
    batch, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(batch * height, width, channels)
    attended = functional.scaled_dot_product_attention(rows, rows, rows)
    return attended.reshape(batch, height, width, channels).permute(0, 3, 1, 2)


def masked_in_place(x: Tensor) -> Tensor:
    """In-place arithmetic on a value of the network's own."""
    x = x * 2
    x.add_(1).clamp_(max=3.0)
    functional.relu(x, inplace=True)
    return x


def twice_the_batch(x: Tensor) -> Tensor:
    """Stacks a second copy into the batch, computes, and takes the batch apart again."""
    both = functional.softplus(torch.cat([x, 1 - x], dim=0))
    first, second = both.chunk(2, dim=0)
    return first - 0.5 * second


def patches(x: Tensor) -> Tensor:
    """Patches of 2x2 become channels, by reshaping alone."""
    batch, channels, height, width = x.shape
    cut = x.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
    return cut.reshape(batch, 4 * channels, height // 2, width // 2)


class PatchTokens(nn.Module):
    """Attention between tokens of 2x2 patches, cut and put together by reshaping alone."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4 * CHANNELS, 16), nn.Linear(16, 4 * CHANNELS)

    def forward(self, x: Tensor, embedding: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
        batch, channels, height, width = x.shape
        hidden = self.enter(patches(x).flatten(2).transpose(1, 2)).unsqueeze(1)
        hidden = functional.scaled_dot_product_attention(hidden, hidden, hidden).squeeze(1)
        cut = self.leave(hidden).transpose(1, 2).reshape(batch, channels, 2, 2, height // 2, width // 2)
        return x + cut.permute(0, 1, 4, 2, 5, 3).reshape(x.shape)


class AlongSpace(nn.Module):
    """A convolution over the flattened positions, whose neighbours are not neighbours in the map."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv1d(CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(2)).view(x.shape)


class ChannelsLastInput(nn.Module):
    """A network that takes and gives ``[B, H, W, C]``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.GroupNorm(2, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return functional.silu(self.norm(self.first(x.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1) + x


def coordinates(x: Tensor) -> Tensor:
    """Replaces two channels by the position of each element."""
    batch, _, height, width = x.shape
    rows = torch.linspace(-1, 1, height, dtype=x.dtype).view(1, 1, height, 1).expand(batch, 1, height, width)
    columns = torch.linspace(-1, 1, width, dtype=x.dtype).expand(batch, 1, height, width)
    return torch.cat([x[:, 2:], rows, columns], dim=1)


def channel_statistics(x: Tensor) -> Tensor:
    """Reductions over the channels, with and without their dimension."""
    largest, _ = x.max(dim=1, keepdim=True)
    variance, mean = torch.var_mean(x, dim=1, keepdim=True)
    return torch.cat([x[:, :4], x.amin(1, keepdim=True), largest, (variance + 1).sqrt(), x.sum(1)[:, None] - mean], 1)


def rearranged(x: Tensor) -> Tensor:
    """Channels picked by index, flipped, stacked in a dimension of their own and repeated."""
    picked = x[:, [3, 1, 0, 2]]
    stacked = torch.stack([picked, picked.flip(1)], dim=2).flatten(1, 2)
    return stacked + x[:, :1].expand(-1, 8, -1, -1) * x[:, 4:].repeat(1, 2, 1, 1)


def scalars(x: Tensor) -> Tensor:
    """Constants, conditions, and numbers computed along the way."""
    half = torch.full((), 0.5, dtype=x.dtype)
    mask = (torch.arange(x.shape[1]) % 2 == 0)[None, :, None, None]
    return torch.addcmul(x, x.sigmoid(), half).masked_fill(mask & (x < 0), 0.25) ** 2 / (1 + x.abs().clamp(min=1e-3))


SHAPES = [
    mapped("pool average", lambda x: functional.avg_pool2d(x, 2)),
    mapped("pool average padded", lambda x: functional.avg_pool2d(x, 3, stride=2, padding=1)),
    mapped("pool average padding not counted", lambda x: functional.avg_pool2d(x, 3, 2, 1, count_include_pad=False)),
    mapped("pool average rounded up", lambda x: functional.avg_pool2d(x, 2, ceil_mode=True)),
    mapped("pool maximum", lambda x: functional.max_pool2d(x, 2)),
    mapped("pool maximum overlapping", lambda x: functional.max_pool2d(x, 3, stride=1, padding=1)),
    mapped("pool adaptive", lambda x: functional.adaptive_avg_pool2d(x, (5, 4))),
    mapped("pool global", lambda x: x * functional.adaptive_avg_pool2d(x, 1)),
    mapped("nearest by factor", lambda x: functional.interpolate(x, scale_factor=2.0, mode="nearest")),
    mapped("nearest to size", lambda x: functional.interpolate(x, size=(20, 11), mode="nearest")),
    mapped("nearest down", lambda x: functional.interpolate(x, size=(6, 5), mode="nearest")),
    mapped("nearest exact", lambda x: functional.interpolate(x, size=(20, 11), mode="nearest-exact")),
    mapped("bilinear by factor", lambda x: functional.interpolate(x, scale_factor=2.0, mode="bilinear")),
    mapped("bilinear aligned", lambda x: functional.interpolate(x, size=(20, 11), mode="bilinear", align_corners=True)),
    mapped("bilinear down", lambda x: functional.interpolate(x, size=(6, 5), mode="bilinear")),
    mapped("bicubic", lambda x: functional.interpolate(x, size=(20, 11), mode="bicubic")),
    mapped("bilinear antialiased", lambda x: functional.interpolate(x, size=(6, 5), mode="bilinear", antialias=True)),
    plain(
        "pixel shuffle", lambda: convolution(channels_out=12), lambda: Map(nn.PixelShuffle(2)), lambda: convolution(3)
    ),
    plain(
        "pixel unshuffle",
        convolution,
        lambda: Map(nn.PixelUnshuffle(2)),
        lambda: convolution(4 * CHANNELS),
        size=(14, 10),
    ),
    mapped("chunk split unbind", qkv_chunks, radius=2),
    mapped("squeeze", lambda x: x * torch.sigmoid(x.mean(dim=(2, 3), keepdim=True))),
    mapped("flip", lambda x: torch.flip(x, [3])),
    mapped("roll", lambda x: torch.roll(x, shifts=(2, -1), dims=(2, 3))),
    mapped("cumulative sum", lambda x: torch.cumsum(x, dim=2) * 0.1),
    mapped("fourier", lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * 0.5, s=x.shape[2:])),
    mapped(
        "einsum of channels", lambda x: torch.einsum("bchw,cd->bdhw", x, torch.linspace(-1, 1, 64).to(x).view(8, 8))
    ),
    mapped("einsum of space", lambda x: torch.einsum("bchw,bdhw,bdij->bcij", x, x, x) * 1e-2),
    mapped("softmax of channels", lambda x: torch.softmax(x, dim=1), radius=2),
    mapped("softmax of space", lambda x: torch.softmax(x.flatten(2), dim=-1).view(x.shape) * 50),
    mapped("normalised channels", lambda x: functional.normalize(x, dim=1), radius=2),
    mapped("maximum of space", lambda x: x - x.amax(dim=(2, 3), keepdim=True)),
    mapped("where", lambda x: torch.where(x > 0, x, 0.2 * x.exp()), radius=2),
    mapped("double precision inside", lambda x: (x.double().tanh() * 2).to(x.dtype), radius=2),
    mapped("swapped axes", lambda x: x.transpose(2, 3).tanh().transpose(2, 3).contiguous(), radius=2),
    mapped("windows", windows),
    mapped("in place", masked_in_place, radius=2),
    mapped("twice the batch", twice_the_batch),
    mapped("coordinates", coordinates, radius=2),
    mapped("statistics of channels", channel_statistics, radius=2),
    mapped("rearranged channels", rearranged, radius=2),
    mapped("scalars", scalars, radius=2),
    mapped("gated halves", lambda x: functional.glu(torch.cat([x, x * 2], dim=1), dim=1), radius=2),
    mapped("sorted channels", lambda x: x.sort(dim=1).values),
    mapped("softmax of rows", lambda x: torch.softmax(x, dim=3) * x),
    mapped("matrix of channels", lambda x: (torch.linspace(-1, 1, 64).view(8, 8).to(x) @ x.flatten(2)).view(x.shape)),
    mapped("crop", lambda x: x[:, :, 1:-1, 2:-1]),
    mapped("every second position", lambda x: x[:, :, ::2, 1::2]),
    mapped("enlarged and cropped", lambda x: functional.interpolate(x, scale_factor=2.0)[:, :, :25, :17]),
    plain("patches", convolution, lambda: Map(patches), lambda: convolution(4 * CHANNELS), size=(14, 10)),
    plain("patch tokens", convolution, PatchTokens, convolution, size=(14, 10)),
    plain("one-dimensional convolution", convolution, lambda: Map(AlongSpace()), convolution),
    plain("parametric activation", convolution, lambda: Map(nn.PReLU(CHANNELS)), convolution, radius=2),
    Network("channels last input", ChannelsLastInput, ((2, HEIGHT, WIDTH, CHANNELS),), channels_last=True),
    plain("squeeze-excite", convolution, SqueezeExcite, convolution),
    plain("convnext", ConvNext, ConvNext),
    plain(
        "channels last",
        convolution,
        lambda: OnChannelsLast(nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8))),
    ),
    plain("positions", convolution, lambda: Positional(HEIGHT, WIDTH), convolution),
    plain("convolved position", convolution, lambda: ConvolvedPosition(HEIGHT, WIDTH), convolution),
    plain("batch of one", convolution, lambda: Attention(), lambda: Map(nn.GroupNorm(2, CHANNELS)), batch=1),
    plain("one row", convolution, lambda: Map(nn.GroupNorm(2, CHANNELS)), size=(1, 19)),
    plain("square", convolution, Attention, convolution, size=(6, 6)),
    plain("nothing to compute", lambda: Map(lambda x: x + 0)),
]

BLOCKS = [*CONVOLUTIONS, *NORMS, *ATTENTION, *SHAPES]
