"""The methods that edits of a session are compared with, all with the same networks, steps and guidance."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from diffusers import (
    DDIMInverseScheduler,
    StableDiffusionDiffEditPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from numpy.typing import NDArray
from PIL import Image

from fisedit_compile.bench.quality.measures import Outcome
from fisedit_compile.bench.quality.prompt_to_prompt import SharedAttention, align, shared_attention
from fisedit_compile.bench.quality.task import Task

SDEDIT_STRENGTH = 0.75
DIFFEDIT_MAPS, DIFFEDIT_MASK_STRENGTH, DIFFEDIT_STRENGTH = 10, 0.5, 0.8
"""Samples of noise that a mask is averaged over, their noise level, and the share of the steps that are inverted and
repeated: the paper's values."""
CONTEXT = 1 / 8
"""How much is taken along around a box that is cut out, as a share of the picture's side."""


def dense(task: Task) -> Outcome:
    """The plain pipeline with the new prompt and the same noise."""
    networks = task.networks

    def make() -> tuple[Image.Image, None]:
        made = networks.plain(task.case.edited_prompt, generator=task.noise(), **task.arguments)
        return made.images[0], None

    return timed(task, make)


def sdedit(task: Task) -> Outcome:
    """SDEdit (arXiv 2108.01073): noise is added to the base, and removed with the new prompt."""
    networks, base = task.networks, task.base
    pipe = networks.pipeline(StableDiffusionImg2ImgPipeline)

    def make() -> tuple[Image.Image, None]:
        made = pipe(
            task.case.edited_prompt, image=base, strength=SDEDIT_STRENGTH, generator=task.noise(), **task.arguments
        )
        return made.images[0], None

    return timed(task, make)


def diffedit(task: Task) -> Outcome:
    """DiffEdit (arXiv 2210.11427): a mask from the predictions for both prompts; outside of it the inverted base."""
    networks, base, case = task.networks, task.base, task.case
    scheduler = networks.pipe.scheduler
    pipe = networks.pipeline(
        StableDiffusionDiffEditPipeline, inverse_scheduler=DDIMInverseScheduler.from_config(scheduler.config)
    )
    steps = task.arguments["num_inference_steps"]

    def make() -> tuple[Image.Image, NDArray[np.bool_]]:
        mask = pipe.generate_mask(
            base,
            target_prompt=case.edited_prompt,
            source_prompt=case.prompt,
            num_maps_per_mask=DIFFEDIT_MAPS,
            mask_encode_strength=DIFFEDIT_MASK_STRENGTH,
            generator=task.noise(),
            output_type="np",
            **task.arguments,
        )
        if case.prompt == case.edited_prompt:
            # Nothing differs, and diffusers divides that by its mean, which is zero: a mask of everything.
            mask = np.zeros_like(mask)
        # With guidance an inversion does not lead back to the picture.
        inverted = pipe.invert(
            case.prompt,
            image=base,
            inpaint_strength=DIFFEDIT_STRENGTH,
            num_inference_steps=steps,
            guidance_scale=1.0,
            generator=task.noise(),
        ).latents
        made = pipe(
            case.edited_prompt,
            mask_image=mask,
            image_latents=inverted,
            inpaint_strength=DIFFEDIT_STRENGTH,
            generator=task.noise(),
            **task.arguments,
        )
        cells = mask[0].astype(bool)
        return made.images[0], cells.repeat(networks.side // len(cells), 0).repeat(networks.side // len(cells), 1)

    return timed(task, make)


def prompt_to_prompt(task: Task) -> Outcome:
    """Prompt-to-prompt (arXiv 2208.01626) with attention replacement; both prompts are denoised together."""
    networks, case = task.networks, task.case
    prompts = [case.prompt, case.edited_prompt]
    old, new = networks.pipe.tokenizer(prompts, padding="max_length", truncation=True).input_ids
    processor = SharedAttention(align(old, new), task.arguments["num_inference_steps"])

    def next_step(pipe: Any, number: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        processor.step = number + 1
        return tensors

    def make() -> tuple[Image.Image, None]:
        with shared_attention(networks.unet, processor):
            made = networks.plain(
                prompts,
                generator=[task.noise(), task.noise()],
                callback_on_step_end=next_step,
                **task.arguments,
            )
        return made.images[1], None

    return timed(task, make)


def crop_and_stitch(task: Task) -> Outcome:
    """The box around the painted mask, cut out of the base, inpainted alone and pasted inside the mask."""
    networks, base, mask = task.networks, task.base, task.region
    if not mask.any():
        return Outcome(base, mask, 0.0, 0.0)
    pipe = networks.pipeline(StableDiffusionInpaintPipeline)
    # The U-Net halves its resolution between its blocks.
    unit = pipe.vae_scale_factor * 2 ** (len(networks.unet.config.down_block_types) - 1)
    box = box_around(mask, round(CONTEXT * networks.side), unit)
    white = Image.fromarray(mask.astype(np.uint8) * 255)

    def make() -> tuple[Image.Image, NDArray[np.bool_]]:
        part = pipe(
            task.case.edited_prompt,
            image=base.crop(box),
            mask_image=white.crop(box),
            width=box[2] - box[0],
            height=box[3] - box[1],
            strength=1.0,
            generator=task.noise(),
            **task.arguments,
        ).images[0]
        picture = base.copy()
        picture.paste(part, box[:2], white.crop(box))
        return picture, mask

    return timed(task, make)


def box_around(mask: NDArray[np.bool_], context: int, unit: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the box around a mask with some context, grown to multiples of ``unit`` pixels.

    Args:
        mask: bool ``[height, width]``, not empty, its sides multiples of the unit.
        context: pixels on every side.
        unit: in pixels.
    """
    bounds = []
    for axis in (1, 0):
        places = np.flatnonzero(mask.any(axis=1 - axis))
        first = max(0, int(places[0]) - context) // unit * unit
        last = min(mask.shape[axis], -(-(int(places[-1]) + 1 + context) // unit) * unit)
        bounds.append((first, last))
    (left, right), (top, bottom) = bounds
    return left, top, right, bottom


def timed(task: Task, make: Callable[[], tuple[Image.Image, NDArray[np.bool_] | None]]) -> Outcome:
    """What a method that computes densely makes, with its seconds and its dense steps."""
    with task.networks.counting() as steps:
        started = time.perf_counter()
        picture, mask = make()
        seconds = time.perf_counter() - started
    return Outcome(picture, mask, steps.count, seconds)
