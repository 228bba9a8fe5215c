"""A pipeline whose network takes tokens (Flux), as it comes, inside ``record`` and ``edit``."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor

import fisedit_compile as fisedit

from tolerances import assert_identical, assert_near

HEIGHT, WIDTH, PROMPT, STEPS = 14, 10, 9, 3
"""Of the tokens; pixels are four times as many in each direction."""


@pytest.fixture(scope="module")
def pipe() -> FluxPipeline:
    """Flux with random weights and no text encoders."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
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
    decoder = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        shift_factor=0.1,
    )
    pipe = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(),
        vae=decoder.eval(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer.eval().requires_grad_(False),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: FluxPipeline, prompt: int) -> Tensor:
    """The tokens that the pipeline ends with, from the same noise for all prompts."""
    generator = torch.Generator().manual_seed(prompt)
    return pipe(
        prompt_embeds=torch.randn((1, PROMPT, 24), generator=generator),
        pooled_prompt_embeds=torch.randn((1, 20), generator=generator),
        height=4 * HEIGHT,
        width=4 * WIDTH,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images


def test_a_pipeline_is_edited_as_it_comes(pipe: FluxPipeline) -> None:
    expected = latents(pipe, 1), latents(pipe, 2)
    runtime = fisedit.Runtime()
    options = {"runtime": runtime, "tokens": {"hidden_states": (HEIGHT, WIDTH)}}
    pipe.transformer.compile(backend="fisedit", options=options)
    with runtime.record("base"):
        base = latents(pipe, 1)
    assert_near(base, expected[0], "the recorded run")
    mask = torch.zeros((4 * HEIGHT, 4 * WIDTH))
    mask[12:30, 8:17] = 1
    with runtime.edit("base", mask=mask):
        edited = latents(pipe, 2)
    active = torch.zeros((HEIGHT, WIDTH), dtype=torch.bool)
    active[3:8, 2:5] = True
    changed = (edited != base).any(dim=2).reshape(HEIGHT, WIDTH)
    assert torch.equal(changed, active), "all of the mask changes, and nothing else"
    with runtime.edit("base", mask=torch.ones_like(mask)):
        assert_near(latents(pipe, 2), expected[1], "a mask of everything is the dense run")
    with runtime.edit("base", mask=torch.zeros_like(mask)):
        assert_identical(latents(pipe, 2), base, "an empty mask returns the recording")
    assert runtime.stats.calls == {"record": STEPS, "edit": 2 * STEPS, "dense": STEPS}
