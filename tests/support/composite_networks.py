"""Test networks with several levels, inputs or outputs."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional

from support.blocks import (
    CHANNELS,
    EMBEDDING,
    TOKENS,
    Attention,
    Chain,
    GatedFeedForward,
    Map,
    OnTokens,
    ResnetBlock,
    convolution,
)
from support.networks import TEXT, Network

SIZE = (22, 18)  # then 11x9 and 6x5: 396, 99 and 30 positions


class SkipNetwork(nn.Module):
    """A U-Net of three levels with concatenated skips; ``down`` and ``up`` choose how it changes resolution."""

    def __init__(self, down: str = "stride", up: str = "nearest") -> None:
        super().__init__()
        self.down, self.up = down, up
        widths = (CHANNELS, 12, 16)
        self.enter = nn.Conv2d(4, widths[0], 3, padding=1)
        self.encoder = nn.ModuleList(ResnetBlock(width, width) for width in widths)
        self.shrink = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2 if down == "stride" else 1, padding=1)
            for before, after in zip(widths, widths[1:], strict=False)
        )
        self.middle = Chain(
            Attention(widths[2]), Attention(widths[2], cross=True), OnTokens(GatedFeedForward(widths[2]))
        )
        self.grow = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1) for after, before in zip(widths, widths[1:], strict=False)
        )
        self.decoder = nn.ModuleList(ResnetBlock(2 * width, width) for width in widths)
        self.norm = nn.GroupNorm(2, widths[0])
        self.leave = nn.Conv2d(widths[0], 4, 3, padding=1)

    def _smaller(self, x: Tensor, level: int) -> Tensor:
        if self.down == "average":
            x = functional.avg_pool2d(x, 2, ceil_mode=True)
        elif self.down == "maximum":
            x = functional.max_pool2d(x, 2, ceil_mode=True)
        return self.shrink[level](x)

    def _larger(self, x: Tensor, skip: Tensor, level: int) -> Tensor:
        if self.up == "bilinear":
            x = functional.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)
        else:
            x = functional.interpolate(x, size=skip.shape[2:], mode="nearest")
        return self.grow[level](x)

    def forward(self, x: Tensor, embedding: Tensor, tokens: Tensor) -> Tensor:
        x = self.enter(x)
        skips: list[Tensor] = []
        for level, block in enumerate(self.encoder):
            x = block(x, embedding)
            skips.append(x)
            if level < len(self.shrink):
                x = self._smaller(x, level)
        x = self.middle(x, embedding, tokens)
        for level in reversed(range(len(self.decoder))):
            x = self.decoder[level](torch.cat([x, skips[level]], dim=1), embedding)
            if level:
                x = self._larger(x, skips[level - 1], level - 1)
        return self.leave(functional.silu(self.norm(x)))


class WithResiduals(nn.Module):
    """Two levels, with a map of each level added from outside, as a ControlNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = convolution()
        self.shrink = convolution(stride=2)
        self.coarse = Chain(Map(nn.GroupNorm(2, CHANNELS)), convolution())
        self.leave = convolution()

    def forward(self, x: Tensor, coarse: Tensor, fine: Tensor) -> Tensor:
        hidden = self.fine(x) + fine
        lower = self.coarse(self.shrink(hidden)) + coarse
        return self.leave(hidden + functional.interpolate(lower, size=x.shape[2:], mode="nearest"))


class ManyOutputs(nn.Module):
    """Returns maps of two resolutions, a vector of the whole map, one of the prompt alone, and a view of another."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = Chain(convolution(), Map(nn.GroupNorm(2, CHANNELS)))
        self.shrink = convolution(stride=2)
        self.head = nn.Linear(CHANNELS, 3)
        self.prompt = nn.Linear(TOKENS, 5)

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Any, ...]:
        fine = self.fine(x)
        coarse = functional.silu(self.shrink(fine))
        vector = self.head(coarse.mean(dim=(2, 3)))
        return fine, (coarse, vector), self.prompt(tokens), fine.flatten(2).transpose(1, 2)


class Timed(nn.Module):
    """Takes the timestep as a tensor without dimensions and embeds it, as diffusion networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.block = ResnetBlock()

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        frequencies = torch.exp(-torch.arange(EMBEDDING // 2, dtype=torch.float32))
        angles = timestep.float() * frequencies
        embedding = torch.cat([angles.sin(), angles.cos()])[None].expand(x.shape[0], -1)
        return self.block(x, embedding.to(x.dtype))


class NumberAttributes(nn.Module):
    """Reads a numpy number, a Python number and a plain tensor that are attributes of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.GroupNorm(2, CHANNELS)
        self.numpy_number, self.number = numpy.sqrt(2.0), 0.75
        self.plain_tensor = torch.linspace(0.5, 1, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(x * self.number + self.inner(x) / self.numpy_number)
        return self.inner(hidden) * self.plain_tensor[:, None, None]


def skip_network(name: str, down: str, up: str, size: tuple[int, int] = SIZE, batch: int = 2) -> Network:
    """A skip network with its inputs."""
    shapes = ((batch, 4, *size), (batch, EMBEDDING), (batch, TEXT, TOKENS))
    return Network(name, lambda: SkipNetwork(down, up), shapes)


COMPOSITES = [
    skip_network("skip network strided", "stride", "nearest"),
    skip_network("skip network averaged", "average", "bilinear"),
    skip_network("skip network maximum", "maximum", "bilinear", size=(23, 17)),
    skip_network("skip network wide", "stride", "nearest", size=(17, 37), batch=1),
    Network("residual inputs", WithResiduals, ((2, 8, 13, 9), (2, 8, 7, 5), (2, 8, 13, 9)), spatial=(0, 1, 2)),
    Network("many outputs", ManyOutputs, ((2, 8, 13, 9), (2, TEXT, TOKENS))),
    Network("number attributes", NumberAttributes, ((2, 8, 13, 9),)),
    Network("timed", Timed, ((2, 8, 13, 9), ()), fixed=(1,)),
]
