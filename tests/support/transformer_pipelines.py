"""Diffusers pipelines with transformers and random weights, small enough for tests; prompts are given as embeddings."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from support.tiny_pipelines import TOKENS, WORDS, tiny_tokenizer

ROWS, COLUMNS, PROMPT = 14, 10, 9
"""Of the tokens, or patches, which are 4x4 pixels large; and tokens of a prompt."""
HEIGHT, WIDTH = 4 * ROWS, 4 * COLUMNS
KINDS = ("flux", "flux-image-to-image", "sd3", "qwen-image", "pixart")
"""Qwen-Image calls its network twice a step, PixArt has no ``callback_on_step_end``."""

CLASSES: dict[str, Any] = {
    "flux": FluxPipeline,
    "flux-image-to-image": FluxImg2ImgPipeline,
    "flux-kontext": FluxKontextPipeline,
    "sd3": StableDiffusion3Pipeline,
    "qwen-image": QwenImagePipeline,
    "pixart": PixArtSigmaPipeline,
}


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


def tiny_sd3(blocks: int = 2) -> SD3Transformer2DModel:
    """Takes maps, which it cuts into patches of 2x2 latent cells."""
    return SD3Transformer2DModel(
        sample_size=2 * ROWS,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=blocks,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pooled_projection_dim=20,
        pos_embed_max_size=2 * ROWS,
    )


def tiny_qwen_image() -> QwenImageTransformer2DModel:
    """One block; takes tokens of 2x2 latent cells."""
    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    )


def tiny_pixart() -> PixArtTransformer2DModel:
    """One block; takes maps, which it cuts into patches of 2x2 latent cells."""
    return PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=24,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )


def _autoencoder(kind: str) -> Any:
    if kind == "qwen-image":
        return AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        )
    return AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        shift_factor=0.1,
        force_upcast=False,
    )


def transformer_pipeline(kind: str) -> Any:
    """A pipeline of one of :data:`CLASSES`, the same for each call."""
    torch.manual_seed(0)
    networks = {"sd3": tiny_sd3, "qwen-image": tiny_qwen_image, "pixart": tiny_pixart}
    encoders = {"sd3": ("", "_2", "_3"), "qwen-image": ("",), "pixart": ("",)}.get(kind, ("", "_2"))
    pipe = CLASSES[kind](
        scheduler=DDIMScheduler() if kind == "pixart" else FlowMatchEulerDiscreteScheduler(),
        vae=_autoencoder(kind).eval(),
        transformer=networks.get(kind, tiny_flux)().eval().requires_grad_(False),
        **{f"{part}{number}": None for part in ("text_encoder", "tokenizer") for number in encoders},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_text_encoders() -> Any:
    """The pipeline of Stable Diffusion 3 with text encoders and tokenizers, so that it takes texts."""
    sizes = {"intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    numbers = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    words = CLIPTextConfig(
        vocab_size=len(WORDS), max_position_embeddings=TOKENS, hidden_size=12, projection_dim=10, **sizes, **numbers
    )
    sentences = T5Config(vocab_size=len(WORDS), d_model=24, d_kv=4, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0)
    parts = {name: part for name, part in transformer_pipeline("sd3").components.items() if part is not None}
    parts["transformer"] = tiny_sd3(blocks=1).eval()
    pipe = StableDiffusion3Pipeline(
        **parts,
        text_encoder=CLIPTextModelWithProjection(words).eval(),
        text_encoder_2=CLIPTextModelWithProjection(words).eval(),
        text_encoder_3=T5EncoderModel(sentences).eval(),
        **{name: tiny_tokenizer() for name in ("tokenizer", "tokenizer_2", "tokenizer_3")},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompt_arguments(kind: str, seed: int, tokens: int = PROMPT) -> dict[str, Any]:
    """A prompt as the pipelines take it from text encoders; a negative one where it is needed for guidance."""
    generator = torch.Generator().manual_seed(seed)
    given = {"prompt_embeds": torch.randn((1, tokens, 24), generator=generator)}
    if kind == "qwen-image":
        negative = {"negative_prompt_embeds": torch.ones(1, PROMPT, 24)}
        return {**given, **negative, "true_cfg_scale": 3.0}
    if kind == "pixart":
        given["prompt_attention_mask"] = torch.ones(1, tokens)
        negative = {f"negative_{name}": torch.ones_like(value) for name, value in given.items()}
        return {**given, **negative, "negative_prompt": None}
    given["pooled_prompt_embeds"] = torch.randn((1, 20), generator=generator)
    if kind == "sd3":
        given |= {f"negative_{name}": torch.zeros_like(value) for name, value in given.items()}
    return given


def picture_arguments(kind: str) -> dict[str, Any]:
    """The size, and the picture that the class wants besides a prompt."""
    given: dict[str, Any] = {"height": HEIGHT, "width": WIDTH}
    if kind == "pixart":
        given["use_resolution_binning"] = False
    if kind == "flux-image-to-image":
        given |= {"image": Image.linear_gradient("L").resize((WIDTH, HEIGHT)).convert("RGB"), "strength": 0.8}
    return given
