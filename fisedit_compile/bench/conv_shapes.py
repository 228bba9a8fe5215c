"""Convolutions of public U-Nets that become sparse, read off their modules."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import nn

from fisedit_compile.bench.networks import CONFIGURATIONS, build_unet
from fisedit_compile.operators.triton.blocks import ConvProblem

DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.6)


@dataclass(frozen=True)
class ConvShape:
    """A convolution: channels, taps, and how many positions its source and target have."""

    inputs: int
    outputs: int
    taps: int
    source: int
    target: int

    def problem(self, density: float, dtype: torch.dtype, batch: int = 2) -> ConvProblem:
        """It at a density, with a halo of a fifth."""
        return ConvProblem(
            total=batch * max(2, round(density * self.target)),
            dense_total=batch * self.target,
            source_total=batch * min(self.source, round(1.2 * density * self.source) + 8),
            inputs=self.inputs,
            outputs=self.outputs,
            taps=self.taps,
            dtype=dtype,
        )


@functools.cache
def conv_shapes(model: str) -> tuple[ConvShape, ...]:
    """The distinct convolutions wider than one position of a model at its own size; narrower ones are linear layers."""
    unet = build_unet(model, device="meta")
    side, deepest = int(unet.config["sample_size"]), len(unet.down_blocks) - 1
    found: dict[ConvShape, None] = {}
    for name, module in unet.named_modules():
        if not isinstance(module, nn.Conv2d) or module.kernel_size == (1, 1):
            continue
        part, *inner = name.split(".")
        # How often the map was halved where the block works.
        level = 0
        if part == "mid_block":
            level = deepest
        elif inner:
            level = int(inner[0]) if part == "down_blocks" else deepest - int(inner[0])
        if "upsamplers" in inner:
            level -= 1
        source = side >> level
        target = source // module.stride[0]
        taps = module.kernel_size[0] * module.kernel_size[1]
        found[ConvShape(module.in_channels, module.out_channels, taps, source**2, target**2)] = None
    return tuple(found)


MODELS = tuple(CONFIGURATIONS)
