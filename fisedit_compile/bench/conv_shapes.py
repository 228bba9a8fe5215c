"""Convolutions of public U-Nets that become sparse: read off a run without memory or arithmetic."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fisedit_compile.kernels.blocks import ConvProblem
from fisedit_compile.models import CONFIGURATIONS, build_unet, example_inputs

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
    found: dict[ConvShape, None] = {}

    def note(module: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        taps = module.kernel_size[0] * module.kernel_size[1]
        if taps > 1:
            source = inputs[0].shape[2] * inputs[0].shape[3]
            target = output.shape[2] * output.shape[3]
            found[ConvShape(module.in_channels, module.out_channels, taps, source, target)] = None

    hooks = [module.register_forward_hook(note) for module in unet.modules() if isinstance(module, nn.Conv2d)]
    arguments, keywords = example_inputs(model, device="meta")
    with torch.no_grad():
        unet(*arguments, **keywords)
    for hook in hooks:
        hook.remove()
    return tuple(found)


MODELS = tuple(CONFIGURATIONS)
