"""The components of the scenes model, freshly initialised: what training starts from.

Their types are ``Any``: the libraries' own annotations do not allow what their classes do.
"""

from __future__ import annotations

from typing import Any

from .world import vocabulary

LATENT_CHANNELS = 4
LATENT_SIZE = 32
"""Width and height of the latents: a quarter of the picture's."""

TEXT_WIDTH = 192
CAPTION_TOKENS = 24
"""Length of a caption in tokens, with its start and end marks and its padding."""

PADDING, START, END, UNKNOWN = "<pad>", "<start>", "<end>", "<unknown>"


def new_autoencoder() -> Any:
    """An ``AutoencoderKL`` from ``[N, 3, 128, 128]`` pictures to ``[N, 4, 32, 32]`` latents and back."""
    from diffusers.models import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=16,
        sample_size=128,
        scaling_factor=1.0,
        force_upcast=False,
        mid_block_add_attention=False,
    )


def new_unet() -> Any:
    """A ``UNet2DConditionModel`` for ``[N, 4, 32, 32]`` latents, with cross-attention at 16 and 8."""
    from diffusers.models import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 96, 192),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
    )


def new_text_encoder() -> Any:
    """A ``CLIPTextModel`` from ``[N, 24]`` token numbers to ``[N, 24, 192]`` states."""
    from transformers import CLIPTextConfig, CLIPTextModel

    words = _token_numbers()
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CAPTION_TOKENS,
        pad_token_id=words[PADDING],
        bos_token_id=words[START],
        eos_token_id=words[END],
    )
    return CLIPTextModel(config)


def _token_numbers() -> dict[str, int]:
    """The number of every mark and word."""
    return {word: number for number, word in enumerate((PADDING, START, END, UNKNOWN, *vocabulary()))}


def new_tokenizer() -> Any:
    """A ``PreTrainedTokenizerFast`` with one token a word; it lowers capitals and splits off commas."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = _token_numbers()
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}",
        special_tokens=[(START, words[START]), (END, words[END])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=CAPTION_TOKENS,
        pad_token=PADDING,
        bos_token=START,
        eos_token=END,
        unk_token=UNKNOWN,
        model_input_names=["input_ids", "attention_mask"],
    )


def new_scheduler() -> Any:
    """A ``DDIMScheduler``: v-prediction, no signal left at the last of 1000 steps, trailing sampling."""
    from diffusers.schedulers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )
