"""What moves positions without computing anything: crops, flips, rolls, joins along space, transpositions; a part of
sparsify_layout.

Why: these are stencils of one tap, so a moved map stays rows. Where a value's positions come to lie on the mask says
movement.py; here each one is read from where it was.

Before: ``y = slice(x, 2, 3, 20)``          After: ``y = to_map(select(gather_taps(x rows), 2, 0))``
Before: ``y = flip(x, [3])``                After: the same with the table of a flip
Before: ``y = cat([x, z], 2)``              After: ``y = to_map(add(taps of x, taps of z))``, outside read as zeros
Before: ``y = permute(x, [0, 1, 3, 2])``    After: the same, positions read column by column
Before: ``y = alias(x)`` at another place   After: the same, each position read from where it is

Conditions:
1. Height and width are dimensions of their own, and what is left has more than one position.
2. All values joined along space are spatial, with the same dimensions and the same size across.
3. A roll names its dimensions.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import fx

from fisedit_compile.passes.common.arguments import read_arguments
from fisedit_compile.passes.common.family import Inferred
from fisedit_compile.passes.common.ir import RowsBuilder, shape_of, spatial_of
from fisedit_compile.passes.common.layouts import HEIGHT, WIDTH, Dimension, Spatial
from fisedit_compile.passes.common.reading.moves import Crop, read_turn, transposed
from fisedit_compile.passes.common.targets import SPLITS, aten
from fisedit_compile.runtime.spec import Domain, Stencil


def in_place(source: Domain, target: Domain) -> Stencil:
    """Each position of a size read from itself, at another place of the mask."""
    return Crop(HEIGHT, 0, 1, source.height).stencil(source, target)


def infer_crops(crops: Sequence[Crop], node: fx.Node, spatial: Spatial) -> Inferred:
    """The layouts of the results (condition 1)."""
    targets = [crop.target(spatial.domain) for crop in crops]
    if any(target.size < 2 for target in targets):
        return "it cuts out single positions"
    layouts = [Spatial(target, spatial.dims) for target in targets]
    return layouts if node.target in SPLITS else layouts[0]


def infer_join(node: fx.Node, axis: Dimension) -> Inferred:
    """The layout of values joined along space (condition 2)."""
    values = node.args[0]
    assert isinstance(values, (list, tuple))
    known = [spatial_of(value) for value in values]
    first = next(spatial for spatial in known if spatial is not None)
    if any(spatial is None or spatial.dims != first.dims for spatial in known):
        return "values are joined along positions, and not all of them are maps with the same dimensions"
    sizes = shape_of(node)
    return Spatial(Domain(sizes[first.dims.index(HEIGHT)], sizes[first.dims.index(WIDTH)]), first.dims)


def with_rows_first(spatial: Spatial) -> Spatial:
    """A layout whose first dimension of space is its height, whatever it was called."""
    if not transposed(spatial.dims):
        return spatial
    swapped = {HEIGHT: WIDTH, WIDTH: HEIGHT}
    dims = tuple(swapped.get(name, name) for name in spatial.dims)
    return Spatial(Domain(spatial.domain.width, spatial.domain.height), dims)


def moved_rows(builder: RowsBuilder, value: fx.Node, stencil: Stencil) -> fx.Node:
    """The rows ``[B, N, *C]`` of a stencil of one tap; zeros outside the map."""
    return builder.call(aten.select.int, builder.taps(value, stencil, 0.0), 2, 0)


def rewrite_crops(crops: Sequence[Crop], node: fx.Node, builder: RowsBuilder) -> None:
    """Read what a cut along space leaves."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    source = spatial_of(x)
    assert source is not None
    if node.target not in SPLITS:
        target = spatial_of(node)
        assert target is not None
        builder.replace(moved_rows(builder, x, crops[0].stencil(source.domain, target.domain)))
        return
    for getter in list(node.users):
        target, number = spatial_of(getter), getter.args[1]
        assert getter.target is operator.getitem and target is not None and isinstance(number, int)
        piece = RowsBuilder(getter)
        piece.replace(moved_rows(piece, x, crops[number].stencil(source.domain, target.domain)))
    node.graph.erase_node(node)


def rewrite_turn(node: fx.Node, builder: RowsBuilder) -> None:
    """Read a flipped or rolled map; channels are turned on the rows."""
    x = node.args[0]
    source, target = spatial_of(x), spatial_of(node)
    assert isinstance(x, fx.Node) and source is not None and target is not None
    tables = read_turn(node, source)
    assert not isinstance(tables, str)
    same = tables == (tuple(range(source.domain.height)), tuple(range(source.domain.width)))
    if same:
        rows = builder.rows(x)
    else:
        stencil = Stencil.of("table", source.domain, target.domain, rows=tables[0], columns=tables[1])
        rows = moved_rows(builder, x, stencil)
    given = read_arguments(node)
    dims = [int(dim) % len(source.dims) for dim in given["dims"]]
    inside = [number for number, dim in enumerate(dims) if dim in source.channel_dims]
    if inside:
        turned = [source.row_dim(dims[number]) for number in inside]
        shifts = [] if node.target is aten.flip.default else [[int(given["shifts"][number]) for number in inside]]
        rows = builder.call(node.target, rows, *shifts, turned)
    builder.replace(rows)


def rewrite_join(node: fx.Node, builder: RowsBuilder, axis: Dimension) -> None:
    """Sum what each of the joined values puts at its place."""
    values = node.args[0]
    target = spatial_of(node)
    assert isinstance(values, (list, tuple)) and target is not None
    at, placed = 0, []
    size = target.domain.height if axis == HEIGHT else target.domain.width
    for value in values:
        source = spatial_of(value)
        assert isinstance(value, fx.Node) and source is not None
        length = source.domain.height if axis == HEIGHT else source.domain.width
        placed.append((value, tuple(place - at if at <= place < at + length else -1 for place in range(size))))
        at += length
    builder.replace(summed_rows(placed, target.domain, axis, builder))


def summed_rows(
    placed: Sequence[tuple[fx.Node, tuple[int, ...]]], target: Domain, axis: str, builder: RowsBuilder
) -> fx.Node:
    """The rows of values that lie side by side along an axis.

    Args:
        placed: the values, and for each place along the axis which of its positions is there, -1: none.
        target: where the rows are.
        axis: height or width.
        builder: inserts them.
    """
    total: fx.Node | None = None
    for value, table in placed:
        source = spatial_of(value)
        assert source is not None
        tables = {HEIGHT: tuple(range(target.height)), WIDTH: tuple(range(target.width)), axis: table}
        stencil = Stencil.of("table", source.domain, target, rows=tables[HEIGHT], columns=tables[WIDTH])
        rows = moved_rows(builder, value, stencil)
        total = rows if total is None else builder.call(aten.add.Tensor, total, rows)
    assert total is not None
    return total
