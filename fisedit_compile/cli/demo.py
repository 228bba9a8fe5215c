"""``fisedit demo``: two edits of a picture with the model that comes with the package, beside their dense twins."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fisedit_compile.cli import options

if TYPE_CHECKING:
    from PIL import Image

    from fisedit_compile.pipelines import Picture

BASE_PROMPT = "a red ball in the middle, on the grass, by day"
FIREWORKS_PROMPT = "a red ball in the middle, on the grass, by day, with fireworks"
RECOLOUR_PROMPT = "a blue ball in the middle, on the grass, by day"

BRUSH = (40, 60, 90, 112)
"""Left, top, right, bottom of the ellipse painted over the ball, in pixels of 128."""


@dataclass(frozen=True)
class DemoEdit:
    """One edit of the demo and its dense twin: the plain pipeline with the new prompt and the same noise."""

    title: str
    suffix: str
    picture: Picture
    mask: Image.Image
    dense: Image.Image
    dense_seconds: float


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("fisedit-demo"),
    seed: options.Seed = 3,
    steps: options.Steps = 50,
    scheduler: options.Scheduler = None,
    device: options.Device = None,
) -> None:
    """Show two edits with the model that comes with the package; needs no network, and about a minute.

    Fireworks are added with an automatic mask, and the ball is recoloured with a painted one.

    Writes base.png; for the first edit mask.png (the mask over the base), edited.png and dense.png (the same edit made
    densely), for the second the same with -2; and sheet.png with everything side by side.
    """
    pipe = options.load_model(options.EMBEDDED, scheduler, device, options.Precision.FLOAT32)
    from fisedit_compile.cli.pictures import mask_of
    from fisedit_compile.pipelines import EditSession

    session = EditSession(pipe)
    arguments: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": options.EMBEDDED_GUIDANCE}
    pipe.set_progress_bar_config(desc="generating and recording")
    base = session.generate(BASE_PROMPT, generator=_noise(seed), **arguments)
    edits = []
    for title, suffix, prompt, mask in (
        ("automatic mask", "", FIREWORKS_PROMPT, None),
        ("painted mask", "-2", RECOLOUR_PROMPT, painted_mask(base.image.size)),
    ):
        pipe.set_progress_bar_config(desc=f"editing, {title}")
        picture = session.edit(prompt, mask=mask, keep=False)
        pipe.set_progress_bar_config(desc="the same edit, dense")
        started = time.perf_counter()
        dense = pipe(prompt, generator=_noise(seed), **arguments).images[0]
        dense_seconds = time.perf_counter() - started
        edits.append(DemoEdit(title, suffix, picture, mask_of(picture), dense, dense_seconds))
    _write(output, base, edits)
    _show(output, base, edits)


def painted_mask(size: tuple[int, int]) -> Image.Image:
    """What a person with a brush would paint over the ball; ``size`` is width and height in pixels."""
    from PIL import Image, ImageDraw

    mask = Image.new("L", size, 0)
    left, top, right, bottom = BRUSH
    across, down = size[0] / 128, size[1] / 128
    ImageDraw.Draw(mask).ellipse((left * across, top * down, right * across, bottom * down), fill=255)
    return mask


def _noise(seed: int) -> Any:
    import torch

    return torch.Generator().manual_seed(seed)


def _write(output: Path, base: Picture, edits: list[DemoEdit]) -> None:
    from fisedit_compile.cli import pictures

    output.mkdir(parents=True, exist_ok=True)
    base.image.save(output / "base.png")
    rows = []
    for edit in edits:
        mask = pictures.overlay(base.image, edit.mask)
        mask.save(output / f"mask{edit.suffix}.png")
        edit.picture.image.save(output / f"edited{edit.suffix}.png")
        edit.dense.save(output / f"dense{edit.suffix}.png")
        seconds = edit.picture.report.seconds["total"]
        rows.append(
            [
                ("base", base.image),
                (f"{edit.title}, {_share(edit.picture):.0%} active", mask),
                (f"sparse edit, {seconds:.1f} s", edit.picture.image),
                (f"dense edit, {edit.dense_seconds:.1f} s", edit.dense),
            ]
        )
    pictures.sheet(rows).save(output / "sheet.png")


def _show(output: Path, base: Picture, edits: list[DemoEdit]) -> None:
    from rich.console import Console

    from fisedit_compile.cli import pictures, tables

    reports = {"base": base.report, **{edit.title: edit.picture.report for edit in edits}}
    ratios, outside, plain, faster = [], [], [], []
    for edit in edits:
        image, mask = edit.picture.image, edit.mask
        ratio = pictures.peak_ratio(image, edit.dense, mask)
        ratios.append("nothing inside" if ratio is None else f"{ratio:.1f} dB")
        outside.append(str(pictures.greatest_difference(image, base.image, mask)))
        plain.append(f"{edit.dense_seconds:.3f} s")
        faster.append(f"{edit.dense_seconds / edit.picture.report.seconds['total']:.2f}x")
    further = [
        ("plain pipeline, total", "", *plain),
        ("speed-up over plain", "", *faster),
        ("PSNR inside, to dense", "", *ratios),
        ("difference outside", "", *outside),
    ]
    console = Console()
    typer.echo(f"base: {BASE_PROMPT}")
    for edit in edits:
        typer.echo(f"{edit.title}: {edit.picture.prompt}")
    console.print(tables.report_table("fisedit demo", reports, further))
    for note in tables.notes(reports):
        typer.echo(f"note: {note}")
    typer.echo(f"pictures in {output}; look at {output / 'sheet.png'}")


def _share(picture: Picture) -> float:
    """Share of the latents that the mask of an edit covers."""
    return 0.0 if picture.mask is None else float(picture.mask.float().mean())
