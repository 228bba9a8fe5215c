"""Pipelines with a U-Net for pixels, without prompts and without an autoencoder: DDPM, DDIM, progressive distillation.

Latents are the pixels from -1 to 1, and a mask's cells are pixels. The pipelines take no callbacks; sessions follow the
scheduler. Their pictures are edited by strokes.
"""

from __future__ import annotations

from typing import Any

from diffusers import UNet2DModel

from fisedit_compile.pipelines.families.encoding import encode_pixels
from fisedit_compile.pipelines.families.family import Family, has_part
from fisedit_compile.private.modules import original_module

_AUTOENCODERS = ("vae", "vqvae", "movq")
"""What pipelines of diffusers call theirs."""


def _belongs(pipe: Any) -> bool:
    network = getattr(pipe, "unet", None)
    if network is None or any(has_part(pipe, name) for name in _AUTOENCODERS):
        return False
    return isinstance(original_module(network), UNet2DModel)


UNCONDITIONAL = Family(
    name="unconditional diffusion",
    belongs=_belongs,
    network="unet",
    autoencoder=None,
    encode=encode_pixels,
    without_callbacks=True,
)
