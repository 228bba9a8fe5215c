"""Draw the figures of docs/concepts.md from real index plans and a real edit: ``python tools/draw_concepts.py``.

Nothing is drawn by hand: which positions are active, what the halo is and where a row reads are asked of the package.
All numbers are whole ones, so every machine writes the same files; a test compares them with those that are committed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import fisedit_compile as fisedit
from fisedit_compile.runtime.masks import reduce_mask
from fisedit_compile.runtime.plans import IndexPlan, build_plan
from fisedit_compile.runtime.spec import Domain, PlanInput, Stencil

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "images"
SIDE = 12
#: What somebody might paint on a map of 12 by 12 positions.
PAINTED = (
    "............",
    "............",
    "............",
    "....##......",
    "...####.....",
    "...####.....",
    "....###.....",
    ".....#......",
    "............",
    "............",
    "............",
    "............",
)
#: Colours that people with colour vision deficiency can tell apart.
ACTIVE, HALO, READ, LINE, TEXT, EMPTY = "#0072b2", "#e69f00", "#d55e00", "#9aa0a6", "#202124", "#f1f3f4"
#: From small to great.
SHADES = ("#f7fbff", "#deebf7", "#c6dbef", "#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#084594")
CELL = 22


class Drawing:
    """An SVG file, element by element; lengths are pixels."""

    def __init__(self, width: int, height: int, description: str) -> None:
        self._size = width, height
        self._lines = [f"<title>{description}</title>"]

    def rectangle(self, x: int, y: int, width: int, height: int, fill: str, line: str = "#fff", thick: int = 1) -> None:
        self._lines.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}" stroke="{line}" '
            f'stroke-width="{thick}"/>'
        )

    def text(self, x: int, y: int, text: str, size: int = 13, anchor: str = "start", fill: str = TEXT) -> None:
        start = f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{fill}">'
        self._lines.append(f"{start}{text}</text>")

    def line(self, x: int, y: int, to_x: int, to_y: int, stroke: str = LINE, thick: int = 1) -> None:
        self._lines.append(
            f'<line x1="{x}" y1="{y}" x2="{to_x}" y2="{to_y}" stroke="{stroke}" stroke-width="{thick}"/>'
        )

    def write(self) -> str:
        width, height = self._size
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'font-family="sans-serif" shape-rendering="crispEdges">'
        )
        return "\n".join([head, *self._lines, "</svg>", ""])


def painted() -> Tensor:
    """The mask, bool ``[1, 12, 12]``."""
    return torch.tensor([[[cell == "#" for cell in row] for row in PAINTED]])


def window() -> Stencil:
    """What a 3x3 convolution reads."""
    domain = Domain(SIDE, SIDE)
    axes = {f"{name}_{axis}": 1 for axis in "xy" for name in ("stride", "padding", "dilation")}
    return Stencil.of("window", domain, domain, kernel_height=3, kernel_width=3, **axes)


def plan() -> IndexPlan:
    """The index plan of the mask for a 3x3 convolution."""
    return build_plan(painted(), [Domain(SIDE, SIDE)], [window()], "cpu")


def values(planned: IndexPlan, kind: str) -> list[int]:
    """A tensor of the plan for the one sample: ``index`` of the map, ``halo`` of the convolution."""
    of: Domain | Stencil = Domain(SIDE, SIDE) if kind == "index" else window()
    tensor = planned.tensor(PlanInput(kind, of))
    assert tensor is not None
    return [int(value) for value in tensor[0].flatten()]


def grid(drawing: Drawing, left: int, top: int, fills: dict[int, str], labels: dict[int, str]) -> None:
    """A map of 12 by 12 positions."""
    for position in range(SIDE * SIDE):
        x, y = left + position % SIDE * CELL, top + position // SIDE * CELL
        drawing.rectangle(x, y, CELL, CELL, fills.get(position, EMPTY))
        if position in labels:
            drawing.text(x + CELL // 2, y + 15, labels[position], 10, "middle", "#ffffff")


def outline(drawing: Drawing, left: int, top: int, mask: Tensor, colour: str = READ, cell: int = CELL) -> None:
    """The border of the active region of a mask ``[height, width]``."""
    height, width = mask.shape
    for y in range(height):
        for x in range(width):
            if not mask[y, x]:
                continue
            across, down = left + x * cell, top + y * cell
            for there_y, there_x, ends in (
                (y - 1, x, (across, down, across + cell, down)),
                (y + 1, x, (across, down + cell, across + cell, down + cell)),
                (y, x - 1, (across, down, across, down + cell)),
                (y, x + 1, (across + cell, down, across + cell, down + cell)),
            ):
                inside = 0 <= there_y < height and 0 <= there_x < width
                if not inside or not mask[there_y, there_x]:
                    drawing.line(*ends, stroke=colour, thick=2)


def rows() -> str:
    """Active positions on the map, and packed."""
    index = values(plan(), "index")
    drawing = Drawing(620, 370, f"{len(index)} active positions of a map as rows")
    drawing.text(20, 24, f"A map of {SIDE} x {SIDE} positions")
    grid(drawing, 20, 40, dict.fromkeys(index, ACTIVE), {position: str(row) for row, position in enumerate(index)})
    drawing.text(20, 330, f"{len(index)} positions are active: {100 * len(index) // SIDE**2} %")
    drawing.text(330, 180, "→", 28)
    left, top, high = 400, 40, 20
    drawing.text(left, 24, f"Its rows: [B, {len(index)}, C]")
    for row, position in enumerate(index):
        y = top + row * high
        drawing.text(left - 6, y + 14, str(row), 10, "end")
        for channel in range(5):
            drawing.rectangle(left + channel * 22, y, 22, high, ACTIVE)
        drawing.text(left + 120, y + 14, f"y {position // SIDE}, x {position % SIDE}", 11)
    drawing.text(left, top + len(index) * high + 18, "C channels each", 11)
    return drawing.write()


def halo() -> str:
    """Active positions, the halo, and what one row reads."""
    planned = plan()
    index, around = values(planned, "index"), values(planned, "halo")
    taps = values(planned, "table")
    row = index.index(5 * SIDE + 6)
    reads = taps[row * 9 : row * 9 + 9]
    drawing = Drawing(660, 340, f"{len(index)} active positions and {len(around)} positions of the halo")
    drawing.text(20, 24, "Active positions, and their halo")
    labels = {position: str(number) for number, position in enumerate(index)}
    labels |= {position: str(number) for number, position in enumerate(around)}
    grid(drawing, 20, 40, dict.fromkeys(around, HALO) | dict.fromkeys(index, ACTIVE), labels)
    read = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    for number in reads:
        position = index[number] if number < len(index) else around[number - len(index)]
        read[position // SIDE, position % SIDE] = True
    outline(drawing, 20, 40, read)
    for top, colour, text in (
        (320, ACTIVE, f"{len(index)} rows, computed"),
        (320, HALO, f"{len(around)} of the halo, recorded"),
    ):
        left = 20 if colour == ACTIVE else 180
        drawing.rectangle(left, top - 11, 14, 14, colour)
        drawing.text(left + 20, top, text, 12)
    left = 340
    drawing.text(left, 24, f"What row {row} reads (the outlined square)")
    for number, found in enumerate(reads):
        x, y = left + number % 3 * 96, 60 + number // 3 * 60
        active = found < len(index)
        drawing.rectangle(x, y, 92, 52, ACTIVE if active else HALO)
        name = f"row {found}" if active else f"halo {found - len(index)}"
        drawing.text(x + 46, y + 31, name, 13, "middle", "#ffffff")
    drawing.text(left, 268, "Nine taps, from a table made once for the mask", 12)
    return drawing.write()


def maps() -> tuple[Tensor, Tensor, Tensor]:
    """Recorded output, dense output on new inputs, and edited output of a convolution: ``[12, 12]``, whole numbers."""
    convolution = nn.Conv2d(1, 1, 3, padding=1, bias=False).requires_grad_(False)
    convolution.weight.copy_(torch.tensor([[[[0.0, 1, 0], [1, 2, 1], [0, 1, 0]]]]))
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    recorded = ((x + 2 * y) // 6 % 4).float()[None, None]
    changed = ((3 * x + y) // 7 % 5 + 1).float()[None, None]
    runtime = fisedit.Runtime()
    options = {"runtime": runtime, "convolution": "rows", "packing": False}
    compiled = torch.compile(convolution, backend="fisedit", options=options)
    with runtime.record("base"):
        before = compiled(recorded)
    with runtime.edit("base", mask=painted()):
        after = compiled(changed)
    return before[0, 0], convolution(changed)[0, 0], after[0, 0]


def recorded_and_edited() -> str:
    """Three maps beside each other."""
    before, dense, after = maps()
    mask = painted()[0]
    assert torch.equal(after[~mask], before[~mask]) and not torch.equal(after[mask], before[mask])
    most = int(max(before.max(), dense.max(), after.max()))
    wide = SIDE * CELL
    drawing = Drawing(3 * wide + 80, wide + 80, "Recorded, dense on new inputs, and edited values of a convolution")
    for number, (title, shown) in enumerate((("recorded", before), ("dense, new inputs", dense), ("edited", after))):
        left = 20 + number * (wide + 20)
        drawing.text(left, 24, title, 14)
        for position, value in enumerate(shown.flatten().tolist()):
            x, y = left + position % SIDE * CELL, 36 + position // SIDE * CELL
            drawing.rectangle(x, y, CELL, CELL, SHADES[int(value) * (len(SHADES) - 1) // most])
        outline(drawing, left, 36, mask)
    drawing.text(20, wide + 62, "Outlined: the mask. Dark: great values.", 12)
    return drawing.write()


def where_a_mask_goes() -> str:
    """A mask at the resolutions of a U-Net."""
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    fine = (((x - 38) ** 2 + 2 * (y - 27) ** 2) < 180)[None]
    side, gap = 192, 24
    drawing = Drawing(4 * (side + gap) + 16, side + 90, "One mask at 64x64, 32x32, 16x16 and 8x8 positions")
    for number, size in enumerate((64, 32, 16, 8)):
        mask, cell = reduce_mask(fine, Domain(size, size))[0], side // size
        left, top = 20 + number * (side + gap), 36
        drawing.text(left, 24, f"{size} x {size}", 14)
        drawing.rectangle(left, top, side, side, EMPTY, LINE)
        for row in range(size):
            active = [column for column in range(size) if mask[row, column]]
            if active:
                # A disc has one run in each row.
                assert active == list(range(active[0], active[-1] + 1))
                width = len(active) * cell
                drawing.rectangle(left + active[0] * cell, top + row * cell, width, cell, ACTIVE, ACTIVE, 0)
        for step in range(1, size if size <= 16 else 0):
            drawing.line(left + step * cell, top, left + step * cell, top + side, "#d5d8db")
            drawing.line(left, top + step * cell, left + side, top + step * cell, "#d5d8db")
        count = int(mask.sum())
        drawing.text(left, top + side + 22, f"{count} rows, {100 * count / size**2:.1f} % active", 13)
    return drawing.write()


DRAWINGS = {
    "rows.svg": rows,
    "halo.svg": halo,
    "recorded-and-edited.svg": recorded_and_edited,
    "where-a-mask-goes.svg": where_a_mask_goes,
}


def main(folder: Path = FOLDER) -> None:
    """Write all drawings."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in DRAWINGS.items():
        (folder / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
