"""Writes into some of the channels, or of the rows or columns, on rows; a part of sparsify_layout.

Why: networks that write into a slice in place become ``slice_scatter`` or ``select_scatter``. Where the slice is one of
channels, it is the same of every position, and the write is the same on rows. Where it is a stretch of rows or columns,
the result is what is left on both sides and what was written, joined.

Before: ``y = slice_scatter(x, z, 1, 0, 4)``
After:  ``y = to_map(slice_scatter(to_rows(x), to_rows(z), 2, 0, 4))``
Before: ``y = slice_scatter(x, z, 2, 5, 9)``
After:  ``y = to_map(add(taps of x outside of 5 to 9, taps of z))``, outside read as zeros

Conditions:
1. A value and what is written into it have the same dimensions; one that is not spatial has its full size.
2. What is overwritten are channels, or a stretch of rows or columns without gaps, of a map by a map.
"""

from __future__ import annotations

from torch import fx

from fisedit_compile.passes.common.arguments import read_arguments
from fisedit_compile.passes.common.family import Inferred
from fisedit_compile.passes.common.ir import RowsBuilder, shape_of, spatial_of
from fisedit_compile.passes.common.layouts import CHANNEL, HEIGHT
from fisedit_compile.passes.common.reading.writes import stretch_of, written_tables
from fisedit_compile.passes.common.targets import aten
from fisedit_compile.passes.sparsify.rules.moves import summed_rows


def infer_write(node: fx.Node) -> Inferred:
    """The layout of the whole, or of what the part was cut from."""
    whole, part = node.args[:2]
    dim = int(read_arguments(node)["dim"]) % len(shape_of(node))
    known = {spatial} if (spatial := spatial_of(whole)) is not None else set()
    if (spatial := spatial_of(part)) is not None:
        selected = (CHANNEL,) if node.target is aten.select_scatter.default else ()
        known.add(spatial.with_dims((*spatial.dims[:dim], *selected, *spatial.dims[dim:])))
    if stretch_of(node) is not None:
        layout = spatial_of(whole)
        assert layout is not None
        return layout
    if len(known) != 1:
        return "what is written lies on another resolution or has its dimensions in different order"
    (layout,) = known
    return layout if layout.dims[dim] == CHANNEL else "it writes along positions or samples"


def rewrite_write(node: fx.Node, builder: RowsBuilder) -> str | None:
    """Write into the channels of the rows, or put rows of two maps side by side."""
    target, given = spatial_of(node), read_arguments(node)
    assert target is not None
    stretch = stretch_of(node)
    if stretch is not None:
        axis, start, end = stretch
        size = target.domain.height if axis == HEIGHT else target.domain.width
        values = [value for value in node.args[:2] if isinstance(value, fx.Node)]
        placed = list(zip(values, written_tables(size, start, end), strict=True))
        builder.replace(summed_rows(placed, target.domain, axis, builder))
        return None
    dim = int(given["dim"]) % len(target.dims)
    given["dim"] = target.row_dim(dim)
    selected = node.target is aten.select_scatter.default
    part = target.with_dims(target.dims[:dim] + target.dims[dim + 1 :]) if selected else target
    converted: list[fx.Node] = []
    for value, spatial in zip(node.args[:2], (target, part), strict=True):
        assert isinstance(value, fx.Node)
        known = spatial_of(value) is not None
        rows = builder.rows(value) if known else builder.dense_rows(value, spatial, shape_of(value))
        if isinstance(rows, str):
            return rows
        converted.append(rows)
    builder.replace(builder.call(node.target, *converted, *list(given.values())[2:]))
    return None
