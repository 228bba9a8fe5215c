"""Pipelines with a transformer for latents that are packed to tokens: Flux, Flux.2, Chroma, Bria, Ovis.

A token has 2x2 latent cells. Most take the guidance scale as an input of the network (``guidance``), which an edit may
change; guidance by ``true_cfg_scale`` and a negative prompt is a second call of the network.
"""

from __future__ import annotations

from fisedit_compile.pipelines.families.encoding import encode_tokens
from fisedit_compile.pipelines.families.family import Family, Packing, has_part
from fisedit_compile.pipelines.families.packing import SIDE, packed_resolutions
from fisedit_compile.private.diffusers import packs_latents

PACKED = Packing(argument="hidden_states", side=SIDE, resolutions=packed_resolutions)

FLUX = Family(
    name="Flux",
    belongs=lambda pipe: has_part(pipe, "transformer") and packs_latents(pipe),
    network="transformer",
    packing=PACKED,
    encode=encode_tokens,
)
