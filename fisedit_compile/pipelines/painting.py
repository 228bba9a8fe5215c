"""A painted picture as the start of an edit: compared with the picture before, checked, encoded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fisedit_compile.errors import MaskError, OptionError, PipelineError
from fisedit_compile.pipelines.families.schedulers import calls_for_steps, steps_for_calls
from fisedit_compile.pipelines.history import Entry
from fisedit_compile.pipelines.levels import check_levels, like
from fisedit_compile.pipelines.masks.differences import difference_mask
from fisedit_compile.pipelines.masks.placing import Placing
from fisedit_compile.pipelines.opening import ENCODING
from fisedit_compile.pipelines.photos import PhotoLike, read_photo
from fisedit_compile.pipelines.runs import Tools
from fisedit_compile.pipelines.strokes import Strokes

STRENGTH = 0.5
"""The share of the steps that run after the strokes, where none is given: as SIGE has it."""


def strokes_of(
    tools: Tools,
    base: Entry,
    painted: PhotoLike,
    strength: float | None,
    mask: Tensor | None,
) -> Strokes:
    """What an edit by strokes starts from.

    Args:
        tools: of the session.
        base: of the picture that was painted over.
        painted: of its size; where it is transparent, the picture shows.
        strength: above 0 and below 1: the share of the steps that run after the strokes; None: half of them.
        mask: bool ``[1, height, width]`` at the latents' resolution; None: where the painted picture differs.

    Raises:
        PipelineError: the base has an input picture, or is no single picture, or what was painted cannot be read.
        MaskError: the painted picture has another size, or is the same.
        OptionError: the strength is out of its range, or no step would run.
    """
    pixels = base.picture.pixels
    check_strokes(tools, base.arguments)
    if pixels is None or len(pixels) != 1:
        raise PipelineError(
            'strokes are painted over one picture with pixels; generate one, with an output_type such as "pil"'
        )
    turns = len(base.trajectory.latents)
    start = start_of_strokes(tools.pipe.scheduler, turns, STRENGTH if strength is None else strength)
    photo = read_photo(painted, "the painted picture")
    if photo.size != tuple(pixels.shape[-2:]):
        sizes = ["x".join(map(str, size)) for size in (photo.size, pixels.shape[-2:])]
        raise MaskError(f"the painted picture has {sizes[0]} pixels and the picture {sizes[1]}; paint on the picture")
    ground = pixels.float().cpu().expand(1, 3, -1, -1)
    whole = photo.over(ground)
    placing = base.placing or Placing.same(pixels)
    cells, latents = base.trajectory.cells, base.trajectory.latents[-1]
    if mask is None:
        # What the picture has in bytes may be painted on: floats are brought to bytes before they are compared.
        differs = difference_mask(_bytes(ground), _bytes(whole))
        if not differs.any():
            raise MaskError("the painted picture is the same as the picture; paint on it, or leave strokes out")
        mask = cells.mask(differs, latents, picture=placing.picture)
    seen = placing.to_model(whole)[:, : pixels.shape[1]].to(latents.device)
    with torch.no_grad():
        clean = tools.family.encode(tools.pipe, seen).latents.float()
    if clean.shape != latents.shape:
        raise PipelineError(
            f"the painted picture has latents of shape {tuple(clean.shape)}, the picture {tuple(latents.shape)}; "
            "describe the pipeline's family with an encode of its own (docs/adding-a-pipeline.md)"
        )
    return Strokes(mask, start, clean, _noise(base, clean))


def check_strokes(tools: Tools, given: Mapping[str, Any]) -> None:
    """Refuse strokes where the pipeline begins with a picture itself.

    Raises:
        PipelineError: it does, or its scheduler cannot tell the noise of a step.
    """
    own = [name for name in ENCODING if tools.arguments.accepts(name) and name != "control_image"]
    if "strength" in own or any(given.get(name) is not None for name in own):
        raise PipelineError(
            f"{type(tools.pipe).__name__} begins with an input picture itself ({', '.join(own)}), and there strength "
            "is an argument of the pipeline; strokes are for pictures that were generated from noise, or opened"
        )
    check_levels(tools.pipe.scheduler)


def start_of_strokes(scheduler: Any, turns: int, strength: Any) -> int:
    """The turn of the loop at which strokes come in, which begins a step of the scheduler.

    Args:
        scheduler: of the pipeline.
        turns: of the loop.
        strength: above 0 and below 1.

    Raises:
        OptionError: it is not, or no step would run.
    """
    if isinstance(strength, bool) or not isinstance(strength, Real) or not 0 < float(strength) < 1:
        raise OptionError(f"strength must be a number above 0 and below 1, the share of the steps; got {strength!r}")
    steps = steps_for_calls(scheduler, turns)
    if steps < 2:
        raise OptionError("strokes start between two steps, and the picture was made in one; generate with more")
    after = int(steps * float(strength))
    if after == 0:
        least = math.ceil(1000 / steps) / 1000
        raise OptionError(
            f"strength {strength:g} of {steps} steps is less than one, so nothing would be computed; give at least "
            f"{least:g}"
        )
    return calls_for_steps(scheduler, steps - after, turns)


def _noise(base: Entry, clean: Tensor) -> Tensor:
    """Noise for the strokes: of an opened photo its own; otherwise that with which the generators of the base began,
    or, where it had none, one that is always the same."""
    if base.photo is not None:
        return like(clean, base.photo.noise)
    generator = base.noise.generators() or torch.Generator().manual_seed(0)
    return randn_tensor(clean.shape, generator=generator, device=clean.device, dtype=torch.float32)


def _bytes(pixels: Tensor) -> Tensor:
    return (pixels[0] * 255).round().to(torch.uint8)
