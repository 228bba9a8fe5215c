"""Pipelines with a U-Net: Stable Diffusion 1.x, 2.x and XL, Kolors, latent consistency models and their relatives.

Latents are maps. Guidance doubles the batch of the network, and distilled networks take the scale as an input
(``timestep_cond``, an embedding that does not depend on the prompt). All prompts have one length, and those of two text
encoders are joined along channels.
"""

from __future__ import annotations

from fisedit_compile.pipelines.families.family import Family, has_part

STABLE_DIFFUSION = Family(
    name="Stable Diffusion",
    belongs=lambda pipe: has_part(pipe, "unet"),
    network="unet",
    tokenizers=(("tokenizer", "prompt"), ("tokenizer_2", "prompt_2")),
)
