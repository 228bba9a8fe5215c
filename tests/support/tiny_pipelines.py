"""Diffusers pipelines with random weights that are small enough for tests: pictures of 32x48 pixels or less."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerFast

# PyTorch remembers, at the first use of a device context, which functions make tensors: here, before any test replaces
# some of them, so that networks can be built on the meta device in tests.
with torch.device("meta"):
    torch.ones(1)

WORDS = (
    "<pad>",
    "<start>",
    "<end>",
    "<unknown>",
    "a",
    "red",
    "blue",
    "ball",
    "box",
    "on",
    "grass",
    "sand",
    "at",
    "night",
)
TOKENS = 8
TEXT_WIDTH = 16
SCALE = 2
"""Pixels of a latent cell, in each direction."""

HEIGHT, WIDTH = 16, 24
"""Of a picture in pixels."""

CLASSES: dict[str, Any] = {
    "text-to-image": StableDiffusionPipeline,
    "image-to-image": StableDiffusionImg2ImgPipeline,
    "inpaint": StableDiffusionInpaintPipeline,
    "inpaint-9": StableDiffusionInpaintPipeline,
    "xl": StableDiffusionXLPipeline,
    "xl-image-to-image": StableDiffusionXLImg2ImgPipeline,
    "xl-inpaint": StableDiffusionXLInpaintPipeline,
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token a word, made in memory."""
    numbers = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unknown>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=TOKENS,
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        unk_token="<unknown>",
        model_input_names=["input_ids", "attention_mask"],
    )


def _text_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def tiny_unet(in_channels: int = 4, xl: bool = False, middle: bool = False) -> UNet2DConditionModel:
    """A U-Net of two resolutions with cross-attention at the lower one; without a middle block, which takes as long to
    trace as one of the others and brings nothing new."""
    extra: dict[str, Any] = {}
    if xl:
        extra = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": TEXT_WIDTH + 6 * 4,
            "use_linear_projection": True,
        }
    return UNet2DConditionModel(
        sample_size=HEIGHT // SCALE,
        in_channels=in_channels,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn" if middle else None,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=2 * TEXT_WIDTH if xl else TEXT_WIDTH,
        attention_head_dim=2,
        **extra,
    )


def tiny_autoencoder() -> AutoencoderKL:
    """An autoencoder whose latents are half as large as its pictures."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=HEIGHT,
        force_upcast=False,
    )


def tiny_pipeline(kind: str = "text-to-image") -> Any:
    """A pipeline of one of :data:`CLASSES`, the same for each call."""
    torch.manual_seed(0)
    xl = kind.startswith("xl")
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    parts: dict[str, Any] = {
        "unet": tiny_unet(9 if kind == "inpaint-9" else 4, xl).eval(),
        "vae": tiny_autoencoder().eval(),
        "text_encoder": CLIPTextModel(_text_config()).eval(),
        "tokenizer": tiny_tokenizer(),
        "scheduler": scheduler,
    }
    if xl:
        parts["text_encoder_2"] = CLIPTextModelWithProjection(_text_config()).eval()
        parts["tokenizer_2"] = tiny_tokenizer()
        parts["add_watermarker"] = False
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = CLASSES[kind](**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture_arguments(kind: str) -> dict[str, Any]:
    """The size, and the pictures that the class wants besides a prompt."""
    image = Image.linear_gradient("L").resize((WIDTH, HEIGHT)).convert("RGB")
    region = Image.new("L", (WIDTH, HEIGHT), 0)
    region.paste(255, (4, 4, 16, 12))
    if kind in ("text-to-image", "xl"):
        return {"height": HEIGHT, "width": WIDTH}
    if kind in ("image-to-image", "xl-image-to-image"):
        return {"image": image, "strength": 0.75}
    return {"image": image, "mask_image": region, "height": HEIGHT, "width": WIDTH, "strength": 0.75}
