"""Pipelines with a transformer that cuts maps into patches itself: Stable Diffusion 3, PixArt, Sana, AuraFlow, CogView,
Hunyuan-DiT, Lumina.

Latents are maps. Guidance doubles the batch of the network, or is a second call of it. PixArt and Sana may make a
picture of another size and resize it, which is refused. Where prompts come with masks, the session pads them.
"""

from __future__ import annotations

from fisedit_compile.pipelines.families.family import Family, has_part
from fisedit_compile.pipelines.families.prompts import masked_prompt_limit

DIFFUSION_TRANSFORMERS = Family(
    name="diffusion transformers",
    belongs=lambda pipe: has_part(pipe, "transformer"),
    network="transformer",
    prompt_limit=masked_prompt_limit,
)
