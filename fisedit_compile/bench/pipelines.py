"""Whole pipelines of public architecture with random weights: text encoder, U-Net, autoencoder; nothing is loaded."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from fisedit_compile.bench.networks import MODEL_NAMES, TEXT_TOKENS, build_unet, fill_randomly
from fisedit_compile.errors import OptionError
from fisedit_compile.pipelines.families.schedulers import make_scheduler

WORDS = ("a", "lake", "in", "the", "mountains", "with", "sailing", "boat", "on", "it")
VOCABULARY = 49408
"""Size of CLIP's vocabulary."""

_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP_H = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
_CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
TEXT_ENCODERS: dict[str, tuple[dict[str, Any], ...]] = {
    "sd15": (_CLIP_L,),
    "sd21": (_CLIP_H,),
    "sdxl": (_CLIP_L, _CLIP_G),
}
"""Keyword arguments of ``transformers.CLIPTextConfig``; the second encoder also projects the whole text."""

AUTOENCODER: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
    "force_upcast": False,
}
"""Keyword arguments of ``diffusers.AutoencoderKL``: that of Stable Diffusion 1, 2 and XL."""


DISTILLED = "lcm"
"""The scheduler of latent consistency models: with it, the network takes the guidance scale as an input and is called
without an unconditional half."""


def build_pipeline(
    name: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    scheduler: str = "ddim",
    tiny_autoencoder: bool = False,
) -> Any:
    """A text-to-image pipeline without a safety checker.

    Args:
        name: one of ``fisedit_compile.bench.networks.MODEL_NAMES``; ``scenes`` is the trained model of the package.
        dtype: of all weights.
        device: of all networks.
        seed: of the weights.
        scheduler: one of ``fisedit_compile.pipelines.families.schedulers.SCHEDULER_NAMES``; with ``lcm`` the network
            is a latent consistency model.
        tiny_autoencoder: decode by ``diffusers.AutoencoderTiny``.

    Raises:
        OptionError: there is no such model; or parts of the trained model would be exchanged for others.
    """
    if name not in MODEL_NAMES:
        raise OptionError(f"unknown model {name!r}; expected one of {', '.join(MODEL_NAMES)}")
    if name == "scenes":
        if scheduler == DISTILLED or tiny_autoencoder:
            raise OptionError(
                "the scenes model is trained: it has no latent consistency network and no tiny autoencoder; take a "
                "model with random weights (sd15, sd21, sdxl) for them"
            )
        from fisedit_compile.scenes import load_pipeline

        pipe: Any = load_pipeline(dtype).to(device)
        if scheduler != "ddim":
            pipe.scheduler = make_scheduler(scheduler, pipe.scheduler)
        return pipe
    import diffusers

    autoencoder = diffusers.AutoencoderTiny if tiny_autoencoder else partial(diffusers.AutoencoderKL, **AUTOENCODER)
    noise = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    parts: dict[str, Any] = {
        "unet": build_unet(name, dtype, device, seed, distilled=scheduler == DISTILLED),
        "vae": _filled(autoencoder, dtype, device, seed + 1),
        "scheduler": noise if scheduler == "ddim" else make_scheduler(scheduler, noise),
        **_text_parts(name, dtype, device, seed + 2),
    }
    if name == "sdxl":
        pipe = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = diffusers.StableDiffusionPipeline(**parts, **nothing)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _text_parts(name: str, dtype: torch.dtype, device: torch.device | str, seed: int) -> dict[str, Any]:
    """Tokenizers and text encoders under the names the pipelines have for them."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    parts: dict[str, Any] = {}
    kinds: tuple[Any, ...] = (CLIPTextModel, CLIPTextModelWithProjection)
    for number, settings in enumerate(TEXT_ENCODERS[name]):
        ending = "" if number == 0 else f"_{number + 1}"
        config = CLIPTextConfig(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=0, **settings)
        kind = kinds[number]
        parts[f"text_encoder{ending}"] = _filled(lambda kind=kind, config=config: kind(config), dtype, device, seed)
        parts[f"tokenizer{ending}"] = _tokenizer()
    return parts


def _filled(make: Any, dtype: torch.dtype, device: torch.device | str, seed: int) -> Any:
    """A network with random weights, in evaluation mode.

    It is made with values, not on the meta device: text encoders have buffers that count positions.
    """
    model = make()
    torch.nn.Module.to(model, device=device, dtype=dtype)
    model.eval().requires_grad_(False)
    fill_randomly(model, seed)
    return model


def _tokenizer() -> Any:
    """A tokenizer with one token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    marks = ("<pad>", "<start>", "<end>", "<unknown>")
    numbers = {word: number for number, word in enumerate((*marks, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=TEXT_TOKENS,
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        unk_token="<unknown>",
        model_input_names=["input_ids", "attention_mask"],
    )
