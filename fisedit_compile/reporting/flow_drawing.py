"""The graph of what flows where as an SVG drawing: resolutions from fine to coarse, dense operators beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

import networkx

from fisedit_compile.runtime.stats import format_count

SPARSE_COLOUR, DENSE_COLOUR, LINE, TEXT = "#0072b2", "#d55e00", "#5f6368", "#202124"
#: Sizes in pixels: of a box, between boxes, and around all.
WIDTH, HEIGHT, GAP, LEVEL, MARGIN = 300, 96, 230, 118, 24
#: Most operators that a label lists.
LISTED = 4


@dataclass(frozen=True)
class Box:
    """Where a vertex is drawn: its left upper corner, its number from the left and from the top."""

    x: int
    y: int
    column: int
    row: int


def draw(graph: networkx.DiGraph) -> str:
    """The graph as an SVG file."""
    boxes = _places(graph)
    width = max((box.x for box in boxes.values()), default=0) + WIDTH + MARGIN + GAP // 2
    height = max((box.y for box in boxes.values()), default=0) + HEIGHT + MARGIN + 24
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12" fill="{TEXT}">',
        "<title>Resolutions of a network and what flows between them</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="{LINE}"/></marker></defs>',
    ]
    for source, target, data in graph.edges(data=True):
        if source != target:
            lines += _arrow(boxes[source], boxes[target], data)
    for name, box in boxes.items():
        lines += _box(graph, name, box)
    lines.append(
        f'<text x="{MARGIN}" y="{height - 10}" fill="{LINE}">G: thousand million multiply-accumulates of a dense '
        "call</text>"
    )
    return "\n".join([*lines, "</svg>", ""])


def _places(graph: networkx.DiGraph) -> dict[str, Box]:
    """Resolutions of one graph below each other, the finest first, places of one size side by side; then the rest."""
    boxes: dict[str, Box] = {}
    top = MARGIN
    for number in sorted({data["graph"] for _, data in graph.nodes(data=True)}):
        members = [name for name, data in graph.nodes(data=True) if data["graph"] == number]
        domains = [name for name in members if graph.nodes[name]["kind"] == "domain"]
        sizes = sorted({_size(graph, name) for name in domains}, reverse=True)
        rows = [[name for name in domains if _size(graph, name) == size] for size in sizes]
        others = [name for name in members if name not in domains]
        last = max(map(len, rows), default=0)
        for row, names in enumerate(rows):
            for column, name in enumerate(names):
                boxes[name] = Box(MARGIN + column * (WIDTH + GAP), top + row * (HEIGHT + LEVEL), column, row)
        for row, name in enumerate(others):
            # Halfway between two rows, so that arrows from each are seen.
            y = top + row * (HEIGHT + LEVEL) + (HEIGHT + LEVEL) // 2
            boxes[name] = Box(MARGIN + last * (WIDTH + GAP), y, last, row)
        top = max((boxes[name].y for name in members), default=top) + HEIGHT + LEVEL
    return boxes


def _size(graph: networkx.DiGraph, name: str) -> tuple[int, int, int]:
    data = graph.nodes[name]
    return data["height"] * data["width"], data["height"], data["width"]


def _box(graph: networkx.DiGraph, name: str, box: Box) -> list[str]:
    data = graph.nodes[name]
    domain = data["kind"] == "domain"
    colour = SPARSE_COLOUR if domain else DENSE_COLOUR if data["kind"] == "dense" else LINE
    dashed = "" if domain else ' stroke-dasharray="6 4"'
    lines = [
        f'<rect x="{box.x}" y="{box.y}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#ffffff" stroke="{colour}" '
        f'stroke-width="2"{dashed}/>',
        f'<text x="{box.x + 12}" y="{box.y + 22}" font-size="15" font-weight="bold">'
        f"{escape(_title(name, data))}</text>",
    ]
    texts = []
    if graph.has_edge(name, name):
        inside = graph.edges[name, name]
        texts = [f"{inside['values']} values stay here", _operators(inside), _kinds(inside), _macs(inside)]
    elif data["dense_macs"]:
        texts = [_macs({"sparse_macs": 0, "dense_macs": data["dense_macs"]})]
    return lines + [_text(box.x + 12, box.y + 40 + 16 * row, text) for row, text in enumerate(filter(None, texts))]


def _title(name: str, data: dict[str, Any]) -> str:
    if data["kind"] == "dense":
        return f"{name}: runs on whole maps"
    return name if data["kind"] == "domain" else f"{name}: timesteps, prompts, results"


def _arrow(start: Box, end: Box, data: dict[str, Any]) -> list[str]:
    """An arrow and its label; arrows down are left of the middle, arrows up right of it, others lead to the side."""
    colour = SPARSE_COLOUR if not data["dense_macs"] and "ends locality" not in data["kinds"] else DENSE_COLOUR
    if start.column == end.column and abs(start.row - end.row) == 1:
        down = end.row > start.row
        x = start.x + (60 if down else WIDTH - 60)
        y, to_y = (start.y + HEIGHT, end.y) if down else (start.y, end.y + HEIGHT)
        path, label_x, label_y = f"M{x},{y} L{x},{to_y}", x + 8, (y + to_y) // 2 - 22
    elif start.column == end.column:
        # Past boxes in between, on their right.
        side = start.x + WIDTH
        bend = side + 40 + 30 * abs(start.row - end.row)
        y, to_y = start.y + HEIGHT // 2, end.y + HEIGHT // 2
        path, label_x, label_y = f"M{side},{y} C{bend},{y} {bend},{to_y} {side},{to_y}", bend - 30, (y + to_y) // 2
    else:
        right = end.column > start.column
        x, to_x = (start.x + WIDTH, end.x) if right else (start.x, end.x + WIDTH)
        # One below the other, where both lead to and fro.
        y, to_y = start.y + HEIGHT // 2 + (-12 if right else 12), end.y + HEIGHT // 2 + (-12 if right else 12)
        path = f"M{x},{y} C{(x + to_x) // 2},{y} {(x + to_x) // 2},{to_y} {to_x},{to_y}"
        label_x, label_y = (2 * x + to_x) // 3 - 40, (2 * y + to_y) // 3 + (-34 if right else 14)
    lines = [f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.5" marker-end="url(#tip)"/>']
    texts = ["1 value" if data["values"] == 1 else f"{data['values']} values", _operators(data), _macs(data)]
    return lines + [_text(label_x, label_y + 15 * row, text) for row, text in enumerate(filter(None, texts))]


def _text(x: int, y: int, text: str) -> str:
    """Text that can be read where lines cross it."""
    return f'<text x="{x}" y="{y}" stroke="#ffffff" stroke-width="3" paint-order="stroke">{escape(text)}</text>'


def _operators(data: dict[str, Any]) -> str:
    found = sorted(data["operators"].items(), key=lambda item: (-item[1], item[0]))
    listed = ", ".join(f"{count} {name}" for name, count in found[:LISTED])
    return f"{listed}, ..." if len(found) > LISTED else listed


def _kinds(data: dict[str, Any]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(data["kinds"].items()))


def _macs(data: dict[str, Any]) -> str:
    """Multiply-accumulates in words; "" where there are none."""
    named = (("sparse", data["sparse_macs"]), ("dense", data["dense_macs"]))
    return ", ".join(f"{format_count(macs)} {name}" for name, macs in named if macs)
