"""``fisedit eval``: how good edits of held-back scenes are, and what they cost, beside other methods."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fisedit_compile.cli import options

if TYPE_CHECKING:
    from rich.table import Table

    from fisedit_compile.bench.quality.cases import EditCase
    from fisedit_compile.bench.quality.evaluation import Result
    from fisedit_compile.bench.quality.folder import ResultFolder
    from fisedit_compile.bench.quality.intervals import Estimate
    from fisedit_compile.bench.quality.rows import Row
    from fisedit_compile.bench.quality.summary import RowSummary

WIDEST = 1000
"""More columns of text than a table needs."""
SHEET_EDITS = 12
"""Most edits on the contact sheet."""
SHEET_SIDE = 160
"""Least side of a picture on it, in pixels."""


def evaluate(
    output: Annotated[
        Path, typer.Option(help="Folder for pictures and numbers; what is finished there is not made again.")
    ] = Path("fisedit-eval"),
    rows: Annotated[
        str | None,
        typer.Option(help="Rows of the table, with commas between; all when left out. dense is always among them."),
    ] = None,
    kinds: Annotated[
        str | None, typer.Option(help="Kinds of edits, with commas between; all when left out.", metavar="NAMES")
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(help="Edits of every row; when left out 200 of this project's and 40 of the others'.", min=1),
    ] = None,
    steps: Annotated[int, typer.Option(help="Scheduler steps of every picture.", min=2)] = 50,
    device: options.Device = None,
) -> None:
    """Measure edits of held-back scenes with the model that comes with the package; needs no network.

    Writes every picture with its numbers as soon as it is finished, in the end table.json with all that the table shows
    and sheet.png with the first edits side by side. Call it again to go on where it stopped.
    """
    options.quiet()
    from rich.console import Console

    from fisedit_compile.bench.quality.evaluation import evaluate as run
    from fisedit_compile.bench.quality.evaluation import plan
    from fisedit_compile.bench.quality.folder import ResultFolder
    from fisedit_compile.bench.quality.measures import require_torchmetrics
    from fisedit_compile.bench.quality.rows import ROWS, rows_of
    from fisedit_compile.bench.quality.summary import summarise
    from fisedit_compile.bench.quality.task import Networks
    from fisedit_compile.scenes import EDIT_KINDS

    chosen = rows_of(_names(rows)) if rows is not None else ROWS
    found_kinds: Any = _names(kinds) if kinds is not None else EDIT_KINDS
    work = plan(chosen, found_kinds, count)
    require_torchmetrics()
    pipe = options.load_model(options.EMBEDDED, None, device, options.Precision.FLOAT32)
    networks = Networks(pipe, steps, options.EMBEDDED_GUIDANCE)
    folder = ResultFolder(output, networks.identity())
    with Console(stderr=True).status("starting") as status:
        results = run(networks, folder, work, status.update)
    summaries = summarise(results)
    numbers = {"settings": networks.identity(), "rows": [summary.to_dict() for summary in summaries]}
    (output / "table.json").write_text(json.dumps(numbers, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    _draw_sheet(folder, results, output / "sheet.png")
    for shown in (table(summaries), kinds_table(summaries)):
        # As wide as it needs to be: numbers that are cut off or broken into lines are none.
        needed = Console(width=WIDEST).measure(shown).maximum
        Console(width=max(Console().width, needed)).print(shown)
    typer.echo(f"pictures and numbers in {output}; look at {output / 'sheet.png'}")


def _names(text: str) -> list[str]:
    """Names with commas between."""
    return [name.strip() for name in text.split(",") if name.strip()]


#: Headings of the table, the columns of the summary, and the format of their numbers.
_COLUMNS = (
    ("success,\n%", "success", ".1f"),
    ("PSNR,\ndB", "psnr", ".1f"),
    ("SSIM", "ssim", ".3f"),
    ("background,\ndB", "background", ".1f"),
    ("outside its\nmask, dB", "outside", ".1f"),
    ("recall", "recall", ".3f"),
    ("area", "area", ".2f"),
    ("share,\n%", "share", ".1f"),
    ("dense\nsteps", "dense_steps", ".1f"),
    ("seconds", "seconds", ".2f"),
    ("speed-up", "speed_up", ".2f"),
)


def table(summaries: list[RowSummary]) -> Table:
    """One row for each method: each number, and below it its 95 % interval."""
    from rich import box
    from rich.table import Table

    found = Table(title="fisedit eval", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    found.add_column("row", no_wrap=True)
    for heading in ("edits", "success,\n%", "to dense,\npoints", *(heading for heading, _, _ in _COLUMNS[1:])):
        found.add_column(heading, justify="right", no_wrap=True)
    for summary in summaries:
        cells = [_cell(summary.columns[name], form) for _, name, form in _COLUMNS]
        difference = summary.differences.get("dense", {}).get("success")
        found.add_row(summary.row.name, str(summary.count), cells[0], _cell(difference, "+.1f"), *cells[1:])
    return found


def kinds_table(summaries: list[RowSummary]) -> Table:
    """How many edits of each kind succeeded, and how many unchanged prompts gave the base itself."""
    from rich import box
    from rich.table import Table

    kinds = list(dict.fromkeys(kind for summary in summaries for kind in summary.by_kind))
    found = Table(title="edits that succeeded", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    found.add_column("row", no_wrap=True)
    for heading in (*kinds, "identical where unchanged"):
        found.add_column(heading, justify="right")
    for summary in summaries:
        counts = [summary.by_kind.get(kind) for kind in kinds]
        shown = ["" if one is None else f"{one[0]} of {one[1]}" for one in counts]
        identical, count = summary.unchanged
        found.add_row(summary.row.name, *shown, f"{identical} of {count}" if count else "")
    return found


def _cell(found: Estimate | None, form: str) -> str:
    """A number and its interval, below each other."""
    if found is None:
        return ""
    value, low, high = ("inf" if math.isinf(one) else format(one, form) for one in (found.value, found.low, found.high))
    return value if low == value == high else f"{value}\n{low}…{high}"


def _draw_sheet(folder: ResultFolder, results: list[Result], path: Path) -> None:
    """Write the contact sheet: a row for each of the first edits, the base, what was asked for, and every method."""
    from fisedit_compile.cli.pictures import sheet

    rows = list(dict.fromkeys(result.row for result in results))
    cases = list(dict.fromkeys(result.case for result in results))[:SHEET_EDITS]
    sheet([_sheet_row(folder, case, rows, results) for case in cases], SHEET_SIDE).save(path)


def _sheet_row(folder: ResultFolder, case: EditCase, rows: list[Row], results: list[Result]) -> list[Any]:
    """Titled pictures of one edit; where a method failed, the title says by which attributes."""
    from PIL import Image

    from fisedit_compile.cli.pictures import overlay
    from fisedit_compile.scenes.regions import asked_region

    base, dense = folder.picture(case, "base"), folder.picture(case, "dense")
    assert base is not None and dense is not None
    region = Image.fromarray(asked_region(case.kind, base, dense)).convert("L")
    shown = [(case.name, base), ("asked for", overlay(base, region))]
    wrong = {one.row.name: one.measures.wrong for one in results if one.case == case}
    for row in rows:
        picture, mask = folder.picture(case, row.name), folder.mask(case, row.name)
        if row.name not in wrong or picture is None:
            shown.append(("", Image.new("RGB", base.size, (250, 250, 250))))
            continue
        title = row.name if not wrong[row.name] else f"wrong: {', '.join(wrong[row.name])}"
        shown.append((title, picture if mask is None else outlined(picture, mask)))
    return shown


def outlined(picture: Any, mask: Any) -> Any:
    """A picture with the outline of a mask, bool ``[height, width]``, drawn over it."""
    import numpy as np
    from PIL import Image
    from scipy import ndimage

    from fisedit_compile.cli.pictures import MASK_COLOUR

    pixels = np.array(picture.convert("RGB"))
    pixels[mask & ~ndimage.binary_erosion(mask, border_value=1)] = MASK_COLOUR
    return Image.fromarray(pixels)
