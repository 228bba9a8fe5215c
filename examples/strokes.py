"""Paint on a sample of an unconditional model and have it go on from there: ``python examples/strokes.py [FOLDER]``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import ImageDraw

import fisedit_compile as fisedit


def make_pipeline() -> DDPMPipeline:
    """A pipeline with random weights, which draws patterns. Your own comes from DDPMPipeline.from_pretrained(...)."""
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=64,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    pipe = DDPMPipeline(unet=network.eval(), scheduler=DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main(folder: Path = Path("example-pictures"), steps: int = 20) -> None:
    """Write the sample, what was painted over it, and the edit.

    Args:
        folder: for the pictures.
        steps: of the scheduler.
    """
    folder.mkdir(parents=True, exist_ok=True)
    session = fisedit.EditSession(make_pipeline())
    sample = session.generate(num_inference_steps=steps, generator=torch.Generator().manual_seed(3))
    painted = sample.image.copy()
    ImageDraw.Draw(painted).ellipse((12, 20, 30, 34), fill=(220, 40, 30))

    # What was painted, grown by three pixels, so that the model can melt it in.
    mask = fisedit.difference_mask(sample.image, painted, grow=3)
    edit = session.edit(strokes=painted, strength=0.5, mask=mask)
    for name, picture in (("sample", sample.image), ("painted", painted), ("melted", edit.image)):
        picture.save(folder / f"{name}.png")
    print(edit.report)
    print(f"pictures in {folder}; {mask.mean():.1%} of the pixels could change")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
