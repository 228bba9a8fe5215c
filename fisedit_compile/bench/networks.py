"""Public U-Net configurations with random weights: for explaining and measuring without downloading a model.

The configurations are those the models' publishers ship with Stable Diffusion 1.5, Stable Diffusion 2.1 and Stable
Diffusion XL base 1.0.  ``scenes`` is the architecture of the model that comes with this package.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fisedit_compile.errors import OptionError

TEXT_TOKENS = 77
"""Length of the text a CLIP text encoder gives to the U-Net."""

LATENT_SCALE = 8
"""Pixels of a latent cell, in each direction, of the Stable Diffusion autoencoders."""

_STABLE_DIFFUSION: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
}

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "sd15": {**_STABLE_DIFFUSION, "attention_head_dim": 8, "cross_attention_dim": 768},
    "sd21": {
        **_STABLE_DIFFUSION,
        "sample_size": 96,
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    "sdxl": {
        **_STABLE_DIFFUSION,
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
"""Keyword arguments of ``diffusers.UNet2DConditionModel`` by model name; values not listed are its defaults."""

MODEL_NAMES: tuple[str, ...] = (*CONFIGURATIONS, "scenes")

# A prime number of values: tensors that start at different places of the pool never repeat each other's rows.
_POOL_SIZE = 4_194_301


GUIDANCE_CHANNELS = 256
"""Channels of the embedded guidance scale that latent consistency models take as an input."""


def new_unet(name: str, distilled: bool = False) -> Any:
    """A ``diffusers.UNet2DConditionModel`` of a known architecture, with diffusers' initial weights.

    Args:
        name: one of :data:`MODEL_NAMES`, or a folder with a diffusers pipeline or a U-Net in it, of which only the
            configuration is read.
        distilled: take the guidance scale as an input, as latent consistency models do (arXiv 2310.04378); for the
            models of public architecture only.

    Raises:
        OptionError: there is neither such a model nor such a folder.
    """
    from diffusers import UNet2DConditionModel

    if name in CONFIGURATIONS:
        guidance = {"time_cond_proj_dim": GUIDANCE_CHANNELS} if distilled else {}
        return UNet2DConditionModel(**CONFIGURATIONS[name], **guidance)
    if name == "scenes":
        from fisedit_compile.scenes import models

        return models.new_unet()
    for folder in (Path(name, "unet"), Path(name)):
        if (folder / "config.json").is_file():
            return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder))
    raise OptionError(
        f"unknown model {name!r}: expected one of {', '.join(MODEL_NAMES)}, or a folder with unet/config.json in it"
    )


def build_unet(
    name: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    distilled: bool = False,
) -> Any:
    """A ``diffusers.UNet2DConditionModel`` with random weights, in evaluation mode.

    Weights are normally distributed with a standard deviation of one over the square root of the inputs they sum, so
    that activations keep their size at any depth; biases are zero, normalisations start as the identity.

    Args:
        name: as for :func:`new_unet`.
        dtype: of the weights.
        device: where they are made; on ``meta`` there are none.
        seed: of the weights.
        distilled: as for :func:`new_unet`.

    Raises:
        OptionError: there is no such model.
    """
    with torch.device("meta"):
        model = new_unet(name, distilled)
    # Not the method of diffusers, which warns about the very thing that is wanted here.
    nn.Module.to(model, dtype)
    model.eval().requires_grad_(False)
    if torch.device(device).type != "meta":
        model = model.to_empty(device=device)
        fill_randomly(model, seed)
    return model


@torch.no_grad()
def fill_randomly(model: nn.Module, seed: int) -> None:
    """Overwrite all parameters of a model, cheaply: large weights are cut from one pool of random numbers."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(_POOL_SIZE, generator=generator)
    pools: dict[tuple[torch.device, torch.dtype], Tensor] = {}
    norms = {id(p) for m in model.modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm)) for p in m.parameters()}
    start = 0
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif id(parameter) in norms:
            parameter.fill_(1.0)
        else:
            place = (parameter.device, parameter.dtype)
            if place not in pools:
                pools[place] = pool.to(device=place[0], dtype=place[1])
            start = _copy_from(pools[place], start, parameter)
            inputs = parameter[0].numel() if parameter.ndim > 1 else parameter.numel()
            parameter.mul_(1.0 / math.sqrt(inputs))


def _copy_from(pool: Tensor, start: int, target: Tensor) -> int:
    """Fill ``target`` with the pool's values from ``start`` on, round and round; where the next one starts."""
    flat = target.view(-1)
    done = 0
    while done < flat.numel():
        count = min(flat.numel() - done, pool.numel() - start)
        flat[done : done + count].copy_(pool[start : start + count])
        done += count
        start = (start + count) % pool.numel()
    return start


def example_inputs(
    name: str,
    size: int | tuple[int, int] | None = None,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    """Arguments of one U-Net call, as a pipeline makes it.

    Args:
        name: as for :func:`new_unet`.
        size: of the picture in pixels, or (height, width); None: the model's own.
        batch: of the call; 2 is one picture with guidance.
        dtype: of latents and text.
        device: where they are made.
        seed: of their values.

    Returns:
        Positional arguments (latents ``[batch, channels, height, width]`` and a timestep, 0-d int64), and keyword
        arguments.

    Raises:
        OptionError: there is no such model, or the size is no multiple of the latents' cells.
    """
    with torch.device("meta"):
        configuration = new_unet(name).config
    # The scenes model's autoencoder has cells of four pixels.
    scale = 4 if name == "scenes" else LATENT_SCALE
    own = configuration["sample_size"]
    height, width = (own, own) if isinstance(own, int) else own
    if size is not None:
        pixels = (size, size) if isinstance(size, int) else size
        if any(side <= 0 or side % scale for side in pixels):
            raise OptionError(f"the size must be a positive multiple of {scale} pixels, got {pixels[0]}x{pixels[1]}")
        height, width = pixels[0] // scale, pixels[1] // scale
    tokens = TEXT_TOKENS
    if name == "scenes":
        from fisedit_compile.scenes.models import CAPTION_TOKENS

        tokens = CAPTION_TOKENS
    generator = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> Tensor:
        if torch.device(device).type == "meta":
            return torch.empty(shape, dtype=dtype, device=device)
        return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)

    named: dict[str, Any] = {
        "encoder_hidden_states": values(batch, tokens, _text_width(configuration)),
        "return_dict": False,
    }
    if configuration["addition_embed_type"] == "text_time":
        time_width = 6 * configuration["addition_time_embed_dim"]
        pooled = configuration["projection_class_embeddings_input_dim"] - time_width
        sizes = torch.tensor([height * scale, width * scale, 0, 0, height * scale, width * scale], dtype=dtype)
        named["added_cond_kwargs"] = {
            "text_embeds": values(batch, pooled),
            "time_ids": sizes.to(device).repeat(batch, 1),
        }
    timestep = torch.tensor(500, device=device)
    return (values(batch, configuration["in_channels"], height, width), timestep), named


def _text_width(configuration: Mapping[str, Any]) -> int:
    """Width of the text states a configuration expects."""
    width = configuration["encoder_hid_dim"] or configuration["cross_attention_dim"]
    return int(width if isinstance(width, int) else width[0])
