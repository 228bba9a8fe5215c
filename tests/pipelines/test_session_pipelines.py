"""Edit sessions on every class of pipeline: one automatic edit, and one with a mask on top of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionAdapterPipeline, T2IAdapter, UNet2DConditionModel
from PIL import Image

from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines import EditSession, Picture
from fisedit_compile.pipelines.masks.finding import MaskFinder
from fisedit_compile.pipelines.masks.settings import AutomaticMask
from fisedit_compile.pipelines.picture import as_pixels
from support.tiny_pipelines import CLASSES, HEIGHT, SCALE, WIDTH, picture_arguments, tiny_pipeline

BASE, FIRST, SECOND = "a red ball on grass", "a blue ball on grass", "a blue box on sand"
STEPS = 5
TOLERANCE = 1e-4
FISEDIT = AutomaticMask(method="fisedit")


def noise() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def plain(pipe: Any, prompt: str, **arguments: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What the pipeline itself makes of a prompt, and the latents after each call."""
    latents = []

    def keep(pipe: Any, call: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents.append(tensors["latents"].clone())
        return tensors

    pixels = pipe(prompt, generator=noise(), output_type="pt", callback_on_step_end=keep, **arguments).images
    return pixels, latents


def outside(picture: Picture) -> torch.Tensor:
    assert picture.pixel_mask is not None and picture.pixels is not None
    return ~picture.pixel_mask.unsqueeze(1).expand_as(picture.pixels)


@pytest.mark.parametrize("kind", CLASSES)
def test_every_pipeline_class(kind: str) -> None:
    pipe = tiny_pipeline(kind)
    arguments = {"num_inference_steps": STEPS, **picture_arguments(kind)}
    wanted, recorded = plain(pipe, BASE, **arguments)
    _, trajectory = plain(pipe, FIRST, **arguments)
    parts = {name: id(part) for name, part in pipe.components.items()}
    attributes = set(vars(pipe))
    session = EditSession(pipe)

    base = session.generate(BASE, generator=noise(), **arguments)
    assert base.pixels is not None
    torch.testing.assert_close(base.pixels, wanted, atol=TOLERANCE, rtol=0)
    assert base.mask is None and base.report.sparse_calls == 0 and base.report.dense_calls == len(recorded)

    edited = session.edit(FIRST, automatic_mask=FISEDIT)
    assert edited.pixels is not None and edited.mask is not None
    # The mask is the one the dense trajectories lead to, from one of five steps.
    finder = MaskFinder(FISEDIT)
    finder.add(trajectory[0], recorded[0])
    assert torch.equal(edited.mask, finder.mask()) and 0 < int(edited.mask.sum()) < edited.mask.numel()
    assert (edited.report.dense_calls, edited.report.sparse_calls) == (1, len(recorded) - 1)
    assert torch.equal(edited.pixels[outside(edited)], base.pixels[outside(edited)])
    assert not torch.allclose(edited.pixels[~outside(edited)], base.pixels[~outside(edited)], atol=TOLERANCE)

    mask = torch.zeros(HEIGHT, WIDTH)
    mask[4:10, 6:16] = 1.0
    second = session.edit(SECOND, mask=mask)
    assert second.pixels is not None and second.mask is not None
    assert int(second.mask.sum()) == 15 and second.report.dense_calls == 0
    assert second.report.sparse_calls == len(recorded)
    assert torch.equal(second.pixels[outside(second)], edited.pixels[outside(second)])
    assert not torch.equal(second.pixels, edited.pixels)
    assert torch.equal(second.latents[:, :, 0], edited.latents[:, :, 0])

    assert {name: id(part) for name, part in pipe.components.items()} == parts
    assert set(vars(pipe)) == attributes
    assert torch.equal(plain(pipe, BASE, **arguments)[0], wanted), "the pipeline must be as it was"


def adapter_pipeline() -> StableDiffusionAdapterPipeline:
    """A tiny pipeline with a T2I-Adapter, whose features are added where the U-Net's first block ends."""
    pipe = tiny_pipeline()
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    parts = {**pipe.components, "unet": UNet2DConditionModel.from_config({**pipe.unet.config, **blocks}).eval()}
    parts.pop("image_encoder", None)
    adapter = T2IAdapter(3, channels=[8, 16], num_res_blocks=1, downscale_factor=SCALE).eval()
    adapted = StableDiffusionAdapterPipeline(**parts, adapter=adapter, requires_safety_checker=False)
    adapted.set_progress_bar_config(disable=True)
    return adapted


def test_a_pipeline_without_callback_on_step_end_that_returns_arrays() -> None:
    pipe, whole = adapter_pipeline(), torch.ones(HEIGHT, WIDTH)
    arguments = {"num_inference_steps": STEPS, **picture_arguments("text-to-image")}
    arguments["image"] = picture_arguments("image-to-image")["image"]
    wanted = [
        torch.from_numpy(pipe(prompt, generator=noise(), output_type="np", **arguments).images).permute(0, 3, 1, 2)
        for prompt in (BASE, FIRST)
    ]
    session = EditSession(pipe)
    base = session.generate(BASE, generator=noise(), **arguments)
    mask = torch.zeros(HEIGHT, WIDTH)
    mask[4:10, 6:16] = 1.0
    edited = session.edit(FIRST, mask=mask, keep=False)
    assert base.pixels is not None and edited.pixels is not None
    torch.testing.assert_close(base.pixels, wanted[0], atol=TOLERANCE, rtol=0)
    assert edited.report.sparse_calls == STEPS and torch.equal(
        edited.pixels[outside(edited)], base.pixels[outside(edited)]
    )
    assert not torch.equal(edited.pixels, base.pixels)
    everything = session.edit(FIRST, mask=whole).pixels
    assert everything is not None
    torch.testing.assert_close(everything, wanted[1], atol=TOLERANCE, rtol=0)


def test_what_a_pipeline_may_return() -> None:
    pixels = torch.rand(2, 3, 4, 5)
    assert as_pixels(pixels) is pixels
    assert torch.equal(as_pixels(pixels.permute(0, 2, 3, 1).numpy()), pixels)
    with pytest.raises(PipelineError, match='expected a tensor or an array .* with output_type="pt", got list'):
        as_pixels([])
    with pytest.raises(PipelineError, match=r"got Tensor of shape \(1, 3, 2, 4, 5\): .* single pictures"):
        as_pixels(torch.zeros(1, 3, 2, 4, 5))
    pictures = [Image.fromarray((255 * one).round().astype(np.uint8)) for one in pixels.permute(0, 2, 3, 1).numpy()]
    torch.testing.assert_close(as_pixels(pictures), pixels, atol=0.5 / 255 + 1e-6, rtol=0)
