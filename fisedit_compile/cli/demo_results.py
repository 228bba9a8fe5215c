"""What the demo made, shown: pictures in files, the sheet, and a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import typer
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table

from fisedit_compile.cli import pictures, tables
from fisedit_compile.cli.demo_sheet import SheetRow, demo_sheet
from fisedit_compile.pipelines import Picture

STAGES = {
    "text": "text encoding",
    "prepare": "preparation",
    "setup": "first-call set-up",
    "dense": "dense steps",
    "mask": "finding the mask",
    "sparse": "sparse steps",
    "decode": "decoding",
}
"""Titles of the report's stages in the table, in the order in which they run."""

TWINS = (
    "Dense twins: the plain pipeline with the new prompt and the same noise. The plain pipeline cannot open photos, so "
    "the photo's twin is the same edit with every step dense (a mask of everything), pasted with the same mask."
)


@dataclass(frozen=True)
class DemoEdit:
    """One edit of the demo.

    Attributes:
        title: of its column in the table.
        base: the picture that was edited.
        picture: the edit.
        dense: the same edit made densely.
        dense_seconds: what that took in all.
    """

    title: str
    base: Picture
    picture: Picture
    dense: Image.Image
    dense_seconds: float

    @property
    def seconds(self) -> float:
        """What the edit took in all."""
        return self.picture.report.seconds["total"]

    @property
    def mask(self) -> Image.Image:
        """The mask in black and white, as large as the picture."""
        return pictures.mask_of(self.picture)

    @property
    def share(self) -> float:
        """Share of the latents' cells that the mask covers."""
        return 0.0 if self.picture.mask is None else float(self.picture.mask.float().mean())

    @property
    def speed_up(self) -> float:
        """Seconds of the dense twin over those of the edit, everything included."""
        return self.dense_seconds / self.seconds


def write(output: Path, edits: Sequence[DemoEdit]) -> None:
    """Write the pictures of each edit, and the sheet.

    Args:
        output: an existing folder.
        edits: by words, painted, of the photo.
    """
    for edit, suffix in zip(edits, ("", "-2", "-3"), strict=True):
        pictures.overlay(edit.base.image, edit.mask).save(output / f"mask{suffix}.png")
        edit.picture.image.save(output / f"edited{suffix}.png")
        edit.dense.save(output / f"dense{suffix}.png")
    demo_sheet(sheet_rows(edits)).save(output / "sheet.png")


def sheet_rows(edits: Sequence[DemoEdit]) -> list[SheetRow]:
    """The rows of the sheet."""
    kinds = (
        ("By words alone", "generated", "plain pipeline"),
        ("With a painted mask", "generated", "plain pipeline"),
        ("A photo, by words alone", "opened (a drawing)", "all steps, pasted"),
    )
    rows = []
    for (heading, begun, twin), edit in zip(kinds, edits, strict=True):
        prompts = f"“{edit.base.prompt}”  to  “{edit.picture.prompt}”"
        how = "found" if edit.picture.report.finding is not None else "painted"
        rows.append(
            SheetRow(
                heading=heading,
                prompts=prompts,
                base=edit.base.image,
                mask=edit.mask,
                edited=edit.picture.image,
                dense=edit.dense,
                base_caption=begun,
                mask_caption=f"{how}, {edit.share:.0%} of the picture",
                edited_caption=f"{edit.seconds:.1f} s, {edit.speed_up:.1f}x as fast",
                dense_caption=f"{twin}, {edit.dense_seconds:.1f} s",
            )
        )
    return rows


def show(output: Path, base: Picture, opened: Picture, edits: Sequence[DemoEdit]) -> None:
    """Print prompts, the table, and where the pictures are."""
    typer.echo()
    for title, picture in (("picture", base), *((edit.title, edit.picture) for edit in edits[:2])):
        typer.echo(f"{title + ':':<10}{picture.prompt}")
    typer.echo(f"{'opened:':<10}{opened.prompt}")
    typer.echo(f"{edits[2].title + ':':<10}{edits[2].picture.prompt}")
    typer.echo()
    console = Console()
    console.print(table(base, opened, edits))
    console.print(TWINS, highlight=False)
    reports = {"picture": base.report, "opened": opened.report, **{edit.title: edit.picture.report for edit in edits}}
    for note in tables.notes(reports):
        typer.echo(f"note: {note}")
    typer.echo(f"pictures in {output}; look at {output / 'sheet.png'}")


def table(base: Picture, opened: Picture, edits: Sequence[DemoEdit]) -> Table:
    """One column for each run, narrow enough for 80 characters: seconds by stage, and the edit beside its twin."""
    words, painted, photo = edits
    columns: list[tuple[str, Picture, DemoEdit | None]] = [
        ("picture", base, None),
        (words.title, words.picture, words),
        (painted.title, painted.picture, painted),
        ("opened", opened, None),
        (photo.title, photo.picture, photo),
    ]
    result = Table(title="fisedit demo: seconds by stage", box=box.SIMPLE_HEAD, title_justify="left")
    result.add_column("", no_wrap=True)
    for heading, _, _ in columns:
        result.add_column(heading, justify="right", no_wrap=True)
    for stage, title in STAGES.items():
        seconds = [picture.report.seconds.get(stage, 0.0) for _, picture, _ in columns]
        if any(seconds):
            result.add_row(title, *(f"{value:.2f}" if value else "" for value in seconds))
    result.add_row("total", *(f"{picture.report.seconds['total']:.2f}" for _, picture, _ in columns))
    result.add_row("dense twin, total", *(f"{edit.dense_seconds:.2f}" if edit else "" for _, _, edit in columns))
    result.add_row("speed-up", *(f"{edit.speed_up:.2f}x" if edit else "" for _, _, edit in columns), style="bold")
    result.add_section()
    result.add_row("steps, dense", *(str(picture.report.dense_calls) for _, picture, _ in columns))
    result.add_row("steps, sparse", *(str(picture.report.sparse_calls) for _, picture, _ in columns))
    result.add_row("dense steps for mask", *(_finding_steps(picture) for _, picture, _ in columns))
    result.add_row("active", *(f"{edit.share:.1%}" if edit else "" for _, _, edit in columns))
    result.add_row("PSNR inside, to dense", *(_likeness(edit) if edit else "" for _, _, edit in columns))
    result.add_row("difference outside", *(_difference(edit) if edit else "" for _, _, edit in columns))
    return result


def _finding_steps(picture: Picture) -> str:
    """Dense steps that finding the mask cost, those for the floor included."""
    finding = picture.report.finding
    return "" if finding is None else f"{finding.dense_steps + finding.floor_steps:g}"


def _likeness(edit: DemoEdit) -> str:
    ratio = pictures.peak_ratio(edit.picture.image, edit.dense, edit.mask)
    return "none" if ratio is None else f"{ratio:.1f} dB"


def _difference(edit: DemoEdit) -> str:
    """The greatest difference to the base outside the mask, in levels from 0 to 255."""
    return str(pictures.greatest_difference(edit.picture.image, edit.base.image, edit.mask))
