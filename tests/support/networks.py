"""Small networks with seeded weights: one for each thing the compiler must understand, or must leave dense.

Within a network, heights, widths, their products, channel and token counts differ from each other at every level,
because the masked reference recognises resolutions by shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from support.blocks import (
    CHANNELS,
    EMBEDDING,
    TOKENS,
    AdaptiveNorm,
    Attention,
    Chain,
    ChannelNorm,
    GatedFeedForward,
    Map,
    OnChannelsLast,
    OnTokens,
    PackedAttention,
    Residual,
    ResnetBlock,
    SingleHeadAttention,
    activation,
    convolution,
    transposed,
)

HEIGHT, WIDTH = 13, 9
TEXT = 7


@dataclass(frozen=True)
class Network:
    """A test network.

    Attributes:
        name: how tests call it.
        build: makes the module; called with seeded random numbers.
        shapes: of the inputs, in order.
        spatial: positions of the inputs that are maps ``[B, C, H, W]``.
        fixed: positions of the inputs that an edit must not change (timesteps).
        channels_last: whether the maps come as ``[B, H, W, C]``.
        tokens: resolution (H, W) of the maps, when they come as ``[B, H * W, C]`` in the argument ``tokens``.
        radius: how far an output position looks in one axis, for networks of convolutions and pointwise operators that
            keep the resolution; None for all others.
    """

    name: str
    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    spatial: tuple[int, ...] = (0,)
    fixed: tuple[int, ...] = ()
    channels_last: bool = False
    tokens: tuple[int, int] | None = None
    radius: int | None = None

    def module(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The network with its weights, which depend on nothing but its name's length and the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            module = self.build().eval()
            for parameter in module.parameters():
                if parameter.dim() == 1:  # fresh norms and biases are ones and zeros, which hide mistakes
                    parameter.data.add_(0.3 * torch.randn(parameter.shape))
        return module.to(dtype).requires_grad_(False)

    def inputs(self, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """Random inputs; those that an edit must not change do not depend on the seed."""
        drawn = []
        for position, shape in enumerate(self.shapes):
            generator = torch.Generator().manual_seed(99 if position in self.fixed else 1000 * seed + position)
            drawn.append(torch.randn(shape, generator=generator).to(dtype))
        return tuple(drawn)

    @property
    def batch(self) -> int:
        """Batch size of the spatial inputs."""
        return self.shapes[self.spatial[0]][0]

    @property
    def resolution(self) -> tuple[int, int]:
        """Height and width of the finest spatial input."""
        if self.tokens is not None:
            return self.tokens
        first = 1 if self.channels_last else 2
        sizes = [self.shapes[position][first : first + 2] for position in self.spatial]
        height, width = max(sizes, key=lambda size: size[0] * size[1])
        return height, width


def plain(
    name: str,
    *blocks: Callable[[], nn.Module],
    size: tuple[int, int] = (HEIGHT, WIDTH),
    batch: int = 2,
    radius: int | None = None,
) -> Network:
    """A network of the map alone."""
    return Network(name, lambda: Chain(*(block() for block in blocks)), ((batch, CHANNELS, *size),), radius=radius)


def conditioned(
    name: str, *blocks: Callable[[], nn.Module], size: tuple[int, int] = (HEIGHT, WIDTH), batch: int = 2
) -> Network:
    """A network of the map, a timestep embedding and a prompt."""
    shapes = ((batch, CHANNELS, *size), (batch, EMBEDDING), (batch, TEXT, TOKENS))
    return Network(name, lambda: Chain(*(block() for block in blocks)), shapes)


def alone(name: str, radius: int | None = None, **options: Any) -> Network:
    """One convolution between two pointwise operators."""
    return plain(name, activation, lambda: convolution(**options), lambda: activation(functional.gelu), radius=radius)


def mapped(name: str, function: Callable[[Tensor], Tensor], **options: Any) -> Network:
    """A function of the map between two convolutions."""
    return plain(name, convolution, lambda: Map(function), convolution, **options)


def padded_stride(x: Tensor) -> Tensor:
    """The asymmetric padding that diffusers puts before a strided convolution."""
    return functional.pad(x, (0, 1, 0, 1))


CONVOLUTIONS = [
    alone("convolution 1x1", radius=0, kernel=1),
    alone("convolution 3x3", radius=1),
    alone("convolution 5x3", radius=2, kernel=(5, 3)),
    alone("convolution 3x3 without bias", radius=1, bias=False),
    alone("convolution to other channels", radius=1, channels_out=11),
    alone("convolution dilated", radius=4, kernel=(5, 3), dilation=(2, 3), padding=(4, 3)),
    alone("convolution same even", radius=3, kernel=(4, 2), padding="same"),
    alone("convolution valid", padding=0),
    alone("convolution over-padded", padding=3),
    alone("convolution grouped", radius=1, groups=4),
    alone("convolution depthwise", radius=2, kernel=5, groups=CHANNELS),
    alone("convolution depthwise multiplied", radius=1, groups=CHANNELS, channels_out=2 * CHANNELS),
    alone("convolution reflect", padding_mode="reflect"),
    alone("convolution replicate", padding_mode="replicate", kernel=5),
    alone("convolution circular", padding_mode="circular"),
    alone("convolution stride 2", stride=2),
    alone("convolution stride 2 kernel 4", stride=2, kernel=4, padding=1),
    alone("convolution stride 2x1", stride=(2, 1)),
    alone("convolution stride 3 kernel 2", stride=3, kernel=2, padding=0),
    alone("convolution patches", stride=4, kernel=4, padding=0),
    plain(
        "convolution after padding", activation, lambda: Map(padded_stride), lambda: convolution(stride=2, padding=0)
    ),
    plain("padding reflect", convolution, lambda: Map(nn.ReflectionPad2d((1, 2, 0, 3))), convolution),
    plain("padding constant", convolution, lambda: Map(nn.ConstantPad2d((2, 1, 1, 0), 1.5)), convolution),
    plain("padding cropping", convolution, lambda: Map(nn.ZeroPad2d((-1, 2, 0, -2))), convolution),
    plain("transposed stride 2", convolution, lambda: transposed(kernel_size=4, stride=2, padding=1), activation),
    plain(
        "transposed with output padding",
        convolution,
        lambda: transposed(kernel_size=3, stride=2, padding=1, output_padding=1, groups=2, channels_out=6),
        activation,
    ),
    plain("transposed stride 1", lambda: transposed(kernel_size=3, padding=1), activation, radius=1),
    plain("transposed dilated", lambda: transposed(kernel_size=2, stride=3, dilation=2), activation),
    plain("two convolutions", convolution, activation, convolution, radius=2),
    plain("residual convolutions", lambda: Residual(convolution(), activation(), convolution()), radius=2),
]

NORMS = [
    plain("group norm", convolution, lambda: Map(nn.GroupNorm(2, CHANNELS)), activation, convolution),
    plain("group norm without weights", lambda: Map(nn.GroupNorm(4, CHANNELS, affine=False)), convolution),
    plain("group norm of one group", lambda: Map(nn.GroupNorm(1, CHANNELS)), convolution),
    plain("instance norm", convolution, lambda: Map(nn.InstanceNorm2d(CHANNELS, affine=True)), convolution),
    plain("batch norm", convolution, lambda: Map(nn.BatchNorm2d(CHANNELS)), activation, convolution, radius=2),
    plain("layer norm channels last", convolution, lambda: OnChannelsLast(nn.LayerNorm(CHANNELS)), convolution),
    plain(
        "layer norm of the whole map", convolution, lambda: Map(nn.LayerNorm([CHANNELS, HEIGHT, WIDTH])), convolution
    ),
    plain("layer norm written out", convolution, ChannelNorm, convolution, radius=2),
    plain("rms norm on tokens", convolution, lambda: OnTokens(nn.RMSNorm(CHANNELS)), convolution),
    plain(
        "group norm on tokens", lambda: Map(lambda x: functional.group_norm(x.flatten(2), 2).view(x.shape)), convolution
    ),
]

ATTENTION = [
    plain("self-attention", convolution, Attention, convolution),
    plain("self-attention of one head", lambda: Attention(heads=1), convolution),
    plain("self-attention with query norm", lambda: Attention(query_norm=True), convolution),
    plain("self-attention folded heads", convolution, lambda: Attention(form="baddbmm"), convolution),
    plain("self-attention by hand", convolution, lambda: Attention(form="matmul"), convolution),
    plain("self-attention packed", convolution, PackedAttention, convolution),
    plain("self-attention single head", convolution, SingleHeadAttention, convolution),
    plain("self-attention torch module", convolution, lambda: OnTokens(TorchAttention()), convolution),
    plain("self-attention with bias", lambda: Map(biased_attention), convolution),
    conditioned("cross-attention", convolution, lambda: Attention(cross=True), convolution),
    conditioned(
        "cross-attention folded heads", convolution, lambda: Attention(form="baddbmm", cross=True), convolution
    ),
    conditioned("joint attention", convolution, lambda: Attention(form="joint"), convolution),
    plain("feed-forward", convolution, lambda: OnTokens(GatedFeedForward()), convolution),
    conditioned("adaptive norm", AdaptiveNorm, Attention, lambda: OnTokens(GatedFeedForward())),
    conditioned(
        "transformer block", ResnetBlock, Attention, lambda: Attention(cross=True), lambda: OnTokens(GatedFeedForward())
    ),
    conditioned("resnet block", ResnetBlock, lambda: ResnetBlock(channels_out=12)),
    conditioned("resnet block scale shift", lambda: ResnetBlock(scale_shift=True), convolution),
]


class TorchAttention(nn.Module):
    """``nn.MultiheadAttention`` as self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(CHANNELS, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.attention(tokens, tokens, tokens, need_weights=False)[0]


def biased_attention(x: Tensor) -> Tensor:
    """Attention with a bias for each pair of positions."""
    tokens = x.flatten(2).transpose(1, 2).unsqueeze(1)
    length = tokens.shape[2]
    distance = torch.arange(length, dtype=x.dtype, device=x.device)
    bias = -(distance[:, None] - distance[None]).abs() * 0.1
    attended = functional.scaled_dot_product_attention(tokens, tokens, tokens, attn_mask=bias)
    return attended.squeeze(1).transpose(1, 2).reshape(x.shape)
