"""Pipelines with a transformer for packed latents and prompts of any length: Qwen-Image, Krea 2, Nucleus.

As Flux, but for prompts: they are not padded, so the session does it, with masks that leave the padding out of all
attention. Guidance is a second call of the network, by ``true_cfg_scale`` and a negative prompt.
"""

from __future__ import annotations

from fisedit_compile.pipelines.families.encoding import encode_frame
from fisedit_compile.pipelines.families.family import Family, has_part
from fisedit_compile.pipelines.families.flux import PACKED
from fisedit_compile.pipelines.families.prompts import masked_prompt_limit
from fisedit_compile.private.diffusers import packs_latents

QWEN_IMAGE = Family(
    name="Qwen-Image",
    belongs=lambda pipe: (
        has_part(pipe, "transformer")
        and packs_latents(pipe)
        and masked_prompt_limit(getattr(pipe, "encode_prompt", None)) is not None
    ),
    network="transformer",
    packing=PACKED,
    encode=encode_frame,
    prompt_limit=masked_prompt_limit,
)
