"""Edits of photos by the scenes model: sparse ones against dense ones with the same mask, and the width of the seam.

python benchmarks/photos.py --edits 6 --steps 50 --schedulers ddim,euler,dpm++,heun --seams 1,2,4,8 --captions

The photos are drawn pictures, the masks what the edit changes in the drawing, grown by ``--growth`` pixels. A dense
edit starts from the photo with the noise of the first call, runs the pipeline itself, and puts the photo's latents back
outside the mask after every step. Printed for each scheduler: how many edits the checker calls right; the median PSNR
to the dense edit inside the mask; for each width of the seam the steps across the mask's edge that are left, and the
PSNR of the blended dense edit to the dense one.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

import fisedit_compile as fisedit
from fisedit_compile.pipelines.families.schedulers import make_scheduler
from fisedit_compile.pipelines.masks.blending import blended
from fisedit_compile.scenes import check, edit_pairs, load_pipeline, parse_caption, render
from fisedit_compile.scenes.edits import true_mask

GUIDANCE = 3.0


def psnr(left: Tensor, right: Tensor, where: Tensor) -> float:
    """Of two pictures ``[1, 3, height, width]`` from 0 to 1, where a mask ``[1, height, width]`` is true, in dB."""
    squares = (left - right).square()[where.unsqueeze(1).expand_as(left)]
    return float(-10 * torch.log10(squares.mean()))


def dense_edit(pipe: Any, prompt: str, steps: int, photo: list[Tensor], mask: Tensor) -> Tensor:
    """The edit by the pipeline itself, ``[1, 3, height, width]``.

    Args:
        pipe: the pipeline.
        prompt: the new one.
        steps: of the scheduler.
        photo: the photo's latents before each call, the first divided as the pipeline takes it, and behind the last.
        mask: bool ``[1, latent height, latent width]``.
    """

    def put_back(_: Any, call: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": torch.where(mask.unsqueeze(1), tensors["latents"], photo[call + 1])}

    images: Tensor = pipe(
        prompt,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        latents=photo[0],
        output_type="pt",
        callback_on_step_end=put_back,
    ).images
    return images


def measure(name: str, count: int, steps: int, seams: list[int], growth: int, captions: bool) -> None:
    """Edit with one scheduler, and print what came out.

    Args:
        name: of the scheduler.
        count: of edits.
        steps: of the scheduler.
        seams: widths in pixels.
        growth: pixels by which masks are grown.
        captions: whether photos are opened with what they show.
    """
    pipe = load_pipeline()
    pipe.scheduler = make_scheduler(name, pipe.scheduler)
    session = fisedit.EditSession(pipe)
    right, likeness, opening, speed_up = 0, [], [], []
    left: dict[int, list[tuple[float, float, float]]] = {seam: [] for seam in (0, *seams)}
    for number, pair in enumerate(edit_pairs(count, 0)):
        scene, after = parse_caption(pair.prompt), parse_caption(pair.edited_prompt)
        photo = render(scene, number)
        mask = ndimage.binary_dilation(true_mask(scene, after, number), iterations=growth)
        opened = session.open(
            photo,
            pair.prompt if captions else "",
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(number),
        )
        seconds = opened.report.seconds
        opening.append((seconds["total"] - seconds["setup"]) / seconds["dense"])
        # What the session keeps is what the pipeline is compared with: the photo's latents, before and behind calls.
        entry = session._entries[-1]
        levels = [entry.arguments["latents"], *entry.trajectory.latents]
        edit = session.edit(pair.edited_prompt, mask=mask, keep=False, seam=0)
        assert edit.pixel_mask is not None and edit.mask is not None and edit.pixels is not None
        speed_up.append(edit.report.speed_up)
        dense = dense_edit(pipe, pair.edited_prompt, steps, levels, edit.mask)
        base = entry.picture.pixels
        likeness.append(psnr(edit.pixels, dense, edit.pixel_mask))
        right += all(check(np.asarray(edit.image), pair.edited_prompt).values())
        for seam, found in left.items():
            # The dense decode is everywhere the model's, so it shows the steps of any width.
            mixed, steps_left = blended(dense, base, edit.pixel_mask, seam)
            assert steps_left is not None
            lost = 0.0 if seam == 0 else psnr(mixed, dense, edit.pixel_mask)
            found.append((steps_left.mean, steps_left.greatest, lost))
    print(
        f"{name}: right {right} of {count}, PSNR to dense inside {median(likeness):.1f} dB (least "
        f"{min(likeness):.1f}), opening takes {median(opening):.3f} times its dense steps, "
        f"speed-up {median(speed_up):.1f}"
    )
    for seam, found in left.items():
        mean, greatest, lost = (median(column) for column in zip(*found, strict=True))
        print(f"  seam {seam}: left {mean:.4f} mean, {greatest:.4f} greatest; blended to dense inside {lost:.1f} dB")


def main() -> None:
    """Measure all schedulers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", type=int, default=6)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--schedulers", default="ddim,euler,dpm++,heun")
    parser.add_argument("--seams", default="1,2,4,8")
    parser.add_argument("--growth", type=int, default=8)
    parser.add_argument("--captions", action="store_true")
    given = parser.parse_args()
    for name in given.schedulers.split(","):
        seams = [int(seam) for seam in given.seams.split(",")]
        measure(name, given.edits, given.steps, seams, given.growth, given.captions)


if __name__ == "__main__":
    main()
