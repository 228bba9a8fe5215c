"""Open a photo, and edit what is painted over in it: ``python examples/edit_photo.py [FOLDER]``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import fisedit_compile as fisedit
from fisedit_compile.scenes import load_pipeline, parse_caption, render

BEFORE = "a red ball in the middle, on the grass, by day"
AFTER = "a blue ball in the middle, on the grass, by day"


def main(folder: Path = Path("example-pictures"), steps: int = 20) -> None:
    """Write the photo, the mask and the edit.

    Args:
        folder: for the pictures.
        steps: of the scheduler.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # A drawing stands for the photo, larger than the model's pictures.
    drawing = Image.fromarray(render(parse_caption(BEFORE), seed=1))
    photo = drawing.resize((300, 300), Image.Resampling.LANCZOS)

    session = fisedit.EditSession(load_pipeline())
    noise = torch.Generator().manual_seed(3)
    opened = session.open(photo, BEFORE, num_inference_steps=steps, guidance_scale=3.0, generator=noise)
    mask = Image.new("L", photo.size, 0)
    ImageDraw.Draw(mask).ellipse((77, 130, 223, 285), fill=255)
    edit = session.edit(AFTER, mask=mask)

    for name, picture in (("photo", opened.image), ("photo-mask", mask), ("photo-blue", edit.image)):
        picture.save(folder / f"{name}.png")
    print(edit.report)
    print(f"pictures in {folder}; outside the mask each pixel is the photo's own")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
