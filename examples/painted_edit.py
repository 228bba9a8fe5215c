"""Recolour what is painted over, then go on from there: ``python examples/painted_edit.py [FOLDER]``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import fisedit_compile as fisedit
from fisedit_compile.scenes import load_pipeline


def main(folder: Path = Path("example-pictures"), steps: int = 20) -> None:
    """Write the picture, the mask and two edits, one made from the other.

    Args:
        folder: for the pictures.
        steps: of the scheduler.
    """
    folder.mkdir(parents=True, exist_ok=True)
    session = fisedit.EditSession(load_pipeline())
    base = session.generate(
        "a red ball in the middle, on the grass, by day",
        num_inference_steps=steps,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(3),
    )
    mask = Image.new("L", base.image.size, 0)
    ImageDraw.Draw(mask).ellipse((40, 60, 90, 112), fill=255)

    first = session.edit("a blue ball in the middle, on the grass, by day", mask=mask)
    second = session.edit("a yellow ball in the middle, on the grass, by day", mask=mask)
    for name, picture in (("base", base.image), ("mask", mask), ("blue", first.image), ("yellow", second.image)):
        picture.save(folder / f"{name}.png")
    print(second.report)
    session.undo()
    print(f"pictures in {folder}; the session is back at: {session.history[-1].prompt}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
