"""``fisedit generate``: one picture, as the pipeline makes it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from fisedit_compile.cli import options


def generate(
    prompt: Annotated[str, typer.Option(help="What the picture should show.")],
    output: Annotated[Path, typer.Option(help="Where to write the picture.")] = Path("picture.png"),
    model: options.Model = options.EMBEDDED,
    seed: options.Seed = 0,
    steps: options.Steps = 50,
    scheduler: options.Scheduler = None,
    guidance: options.Guidance = None,
    negative_prompt: options.NegativePrompt = None,
    size: options.Size = None,
    argument: options.Argument = None,
    device: options.Device = None,
    precision: options.DataType = options.Precision.FLOAT32,
) -> None:
    """Generate a picture with a diffusers pipeline (nothing is recorded or compiled)."""
    arguments = options.call_arguments(model, steps, guidance, negative_prompt, size, argument)
    pipe = options.load_model(model, scheduler, device, precision)
    options.check_arguments(pipe, arguments)
    import torch

    pipe.set_progress_bar_config(desc="generating")
    started = time.perf_counter()
    with options.pipeline_complaints():
        picture = pipe(prompt, generator=torch.Generator().manual_seed(seed), **arguments).images[0]
    seconds = time.perf_counter() - started
    output.parent.mkdir(parents=True, exist_ok=True)
    picture.save(output)
    typer.echo(f"{output}: {picture.width}x{picture.height} pixels, {seconds:.2f} s")
