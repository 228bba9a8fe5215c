"""Sessions that are asked for latents return what the pipeline does, which need not be what it hands to callbacks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)
from torch import Tensor

from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines import AutomaticMask, EditSession
from fisedit_compile.pipelines.steps import StepFollower, Trajectory
from fisedit_compile.pipelines.timing import StageClock
from support.tolerances import assert_identical, assert_near

HEIGHT, WIDTH, STEPS = 32, 32, 2


def sana_sprint() -> Any:
    """Returns the prediction of the last step, scaled; its callbacks see the noisy latents, unscaled."""
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=24,
        sample_size=16,
        qk_norm="rms_norm_across_heads",
        guidance_embeds=True,
    )
    vae = AutoencoderDC(
        latent_channels=4,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
    )
    return SanaSprintPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=SCMScheduler(),
    )


def flux2_klein() -> Any:
    """Returns maps; its callbacks see tokens."""
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        text_encoder=None,
        tokenizer=None,
        is_distilled=True,
    )


PIPELINES = {"sana-sprint": sana_sprint, "flux2-klein": flux2_klein}


def prompt(kind: str, seed: int) -> dict[str, Tensor]:
    given = {"prompt_embeds": torch.randn((1, 5, 24), generator=torch.Generator().manual_seed(seed))}
    if kind == "sana-sprint":
        given["prompt_attention_mask"] = torch.ones(1, 5, dtype=torch.long)
    return given


def noise() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("kind", PIPELINES)
def test_latents_are_those_that_the_pipeline_returns(kind: str) -> None:
    torch.manual_seed(0)
    pipe = PIPELINES[kind]()
    pipe.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS, "output_type": "latent"}
    if kind == "sana-sprint":
        given["use_resolution_binning"] = False
    expected = [pipe(generator=noise(), **given, **prompt(kind, seed)).images for seed in (1, 2)]
    session = EditSession(pipe)
    base = session.generate(generator=noise(), **given, **prompt(kind, 1))
    assert_near(base.images, expected[0], "the generation")
    assert base.images.shape[1:] == (4, HEIGHT // 2, WIDTH // 2) and base.pixels is None
    mask = torch.zeros(HEIGHT, WIDTH)
    mask[8:20, 8:16] = 1
    # All steps of the second edit are dense: its mask is found behind the last one.
    found = AutomaticMask(method="fisedit", steps=50, out_of=50, threshold=0.5, opening=0)
    for changes in ({"mask": mask, **prompt(kind, 2)}, {"automatic_mask": found, **prompt(kind, 3)}):
        before = session.history[-1].images
        edited = session.edit(**changes)
        assert edited.mask is not None
        inside = edited.mask.unsqueeze(1).expand_as(before)
        assert 0 < int(edited.mask.sum()) < edited.mask.numel()
        assert_identical(edited.images[~inside], before[~inside], "outside the mask")
        assert (edited.images != before)[inside].float().mean() > 0.9
    session.undo()
    session.undo()
    assert_near(session.edit(mask=torch.ones(1, 1), **prompt(kind, 2)).images, expected[1], "a mask of everything")


@pytest.mark.parametrize(
    ("output", "came"),
    [(torch.zeros(1, 4, 3, 3), r"latents of shape \(1, 4, 3, 3\)"), ([], "list"), (None, "NoneType")],
)
def test_latents_of_another_form_are_refused(output: Any, came: str) -> None:
    follower = StepFollower(None, ["latents"], StageClock(torch.device("cpu")), Trajectory())
    follower.trajectory.latents.append(torch.zeros(1, 4, 6, 5))
    with pytest.raises(PipelineError, match=f"SimpleNamespace returned {came} .* needs latents of 6x5 cells; generate"):
        follower.take_output(SimpleNamespace(), output)
    follower.take_output(SimpleNamespace(), follower.trajectory.latents[0] / 2)
    assert follower.trajectory.output is not None
