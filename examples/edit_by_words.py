"""Change a few words and let the session find where: ``python examples/edit_by_words.py [FOLDER]``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import fisedit_compile as fisedit
from fisedit_compile.scenes import load_pipeline


def main(folder: Path = Path("example-pictures"), steps: int = 20) -> None:
    """Write the picture and its edit, and print what share of it was computed.

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
    edit = session.edit("a red ball in the middle, on the grass, by day, with fireworks")
    base.image.save(folder / "base.png")
    edit.image.save(folder / "fireworks.png")
    if edit.mask is None:
        print("the prompts lead to the same picture")
    else:
        print(f"the mask covers {edit.mask.float().mean():.1%} of the latents")
    print(f"pictures in {folder}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
