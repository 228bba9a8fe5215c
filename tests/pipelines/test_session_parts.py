"""Pipelines that make a picture from parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPanoramaPipeline

from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines import EditSession
from support.tiny_pipelines import tiny_pipeline

BASE, FIRST = "a red ball on grass", "a blue ball on grass"
SCALE, VIEW = 8, 64
"""Pixels of a cell, and cells of a view, which the pipeline fixes."""


@pytest.fixture
def pipe() -> Any:
    parts = tiny_pipeline().components
    parts["vae"] = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        force_upcast=False,
    ).eval()
    made = StableDiffusionPanoramaPipeline(**parts, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def test_views_of_a_panorama_are_refused(pipe: Any) -> None:
    session = EditSession(pipe)
    calls: list[Any] = []
    pipe.unet.register_forward_pre_hook(lambda module, given: calls.append(given))
    with pytest.raises(
        PipelineError, match="StableDiffusionPanoramaPipeline calls its network with maps of 4x64 cells"
    ):
        session.generate(BASE, num_inference_steps=2, height=4 * SCALE, width=(VIEW + 8) * SCALE)
    assert session.history == () and not calls, "before anything is computed"


def test_a_panorama_of_one_view_is_a_picture(pipe: Any) -> None:
    session = EditSession(pipe)
    noise = torch.Generator().manual_seed(4)
    base = session.generate(BASE, num_inference_steps=2, height=4 * SCALE, width=VIEW * SCALE, generator=noise)
    mask = torch.zeros(4, VIEW)
    mask[1:3, 20:40] = 1
    edit = session.edit(FIRST, mask=mask)
    outside = ~edit.pixel_mask.unsqueeze(1).expand_as(edit.pixels)
    assert edit.report.sparse_calls == 2 and torch.equal(edit.pixels[outside], base.pixels[outside])
    assert not torch.equal(edit.pixels, base.pixels)
