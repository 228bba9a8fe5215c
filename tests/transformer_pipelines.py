"""Diffusers pipelines with transformers and random weights, small enough for tests; prompts are given as embeddings."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from PIL import Image

ROWS, COLUMNS, PROMPT = 14, 10, 9
"""Of the tokens, or patches, which are 4x4 pixels large; and tokens of a prompt."""
HEIGHT, WIDTH = 4 * ROWS, 4 * COLUMNS
KINDS = ("flux", "flux-image-to-image", "sd3")


def tiny_flux() -> FluxTransformer2DModel:
    """One block of each kind; takes tokens of 2x2 latent cells."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


def tiny_sd3() -> SD3Transformer2DModel:
    """Two blocks; takes maps, which it cuts into patches of 2x2 latent cells."""
    return SD3Transformer2DModel(
        sample_size=2 * ROWS,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pooled_projection_dim=20,
        pos_embed_max_size=2 * ROWS,
    )


def transformer_pipeline(kind: str) -> Any:
    """A pipeline of one of :data:`KINDS`, the same for each call."""
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        shift_factor=0.1,
        force_upcast=False,
    )
    empty = ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]
    empty += ["text_encoder_3", "tokenizer_3"] if kind == "sd3" else []
    classes = {"flux": FluxPipeline, "flux-image-to-image": FluxImg2ImgPipeline, "sd3": StableDiffusion3Pipeline}
    pipe = classes[kind](
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder.eval(),
        transformer=(tiny_sd3() if kind == "sd3" else tiny_flux()).eval().requires_grad_(False),
        **dict.fromkeys(empty),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompt_arguments(kind: str, seed: int) -> dict[str, Any]:
    """A prompt as the pipelines take it from text encoders."""
    generator = torch.Generator().manual_seed(seed)
    given = {
        "prompt_embeds": torch.randn((1, PROMPT, 24), generator=generator),
        "pooled_prompt_embeds": torch.randn((1, 20), generator=generator),
    }
    if kind == "sd3":
        given |= {f"negative_{name}": torch.zeros_like(value) for name, value in given.items()}
    return given


def picture_arguments(kind: str) -> dict[str, Any]:
    """The size, and the picture that the class wants besides a prompt."""
    given: dict[str, Any] = {"height": HEIGHT, "width": WIDTH}
    if kind == "flux-image-to-image":
        given |= {"image": Image.linear_gradient("L").resize((WIDTH, HEIGHT)).convert("RGB"), "strength": 0.8}
    return given
