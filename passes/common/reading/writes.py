"""Read operators that write a part of a value over: which rows or columns, and where each position comes from."""

from __future__ import annotations

from torch import fx

from fisedit_compile.passes.common.arguments import read_arguments
from fisedit_compile.passes.common.ir import shape_of, spatial_of
from fisedit_compile.passes.common.layouts import Dimension
from fisedit_compile.passes.common.reading.moves import AXES
from fisedit_compile.passes.common.targets import aten


def stretch_of(node: fx.Node) -> tuple[Dimension, int, int] | None:
    """Height or width, and the first and the last but one of the rows or columns that a map writes over in another;
    None for any other write."""
    whole, part, given = spatial_of(node.args[0]), spatial_of(node.args[1]), read_arguments(node)
    if node.target is not aten.slice_scatter.default or whole is None or part is None or whole.dims != part.dims:
        return None
    dim = int(given["dim"]) % len(whole.dims)
    start, end, step = slice(given["start"], given["end"], given["step"]).indices(shape_of(node)[dim])
    return (whole.dims[dim], start, end) if whole.dims[dim] in AXES and step == 1 and start < end else None


def written_tables(size: int, start: int, end: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """For each of ``size`` places, which position of the whole is there, and which of the part; -1: none."""
    inside = [start <= place < end for place in range(size)]
    whole = tuple(-1 if written else place for place, written in enumerate(inside))
    return whole, tuple(place - start if written else -1 for place, written in enumerate(inside))
