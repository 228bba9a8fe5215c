"""Reshapes, permutations, concatenations, slices and writes into them, on rows.

Why: between NCHW, NHWC, tokens and heads only names of dimensions change, which costs nothing on rows; joining or
cutting channels is the same work on fewer rows.

Before: ``y = reshape(permute(x, [0, 2, 3, 1]), [B, HW, C])``
After:  ``y = to_map(to_rows(x))``
Before: ``y = view(x, [B, HW, heads, D])``
After:  ``y = to_map(reshape(to_rows(x), [B, -1, heads, D]))``
Before: ``y = cat([x, z], 1)``           After: ``y = to_map(cat([to_rows(x), to_rows(z)], 2))``
Before: ``a, b = chunk(x, 2, -1)``       After: ``a, b = to_map of chunk(to_rows(x), 2, 2)``
What is cut, joined or turned along height and width, or has them exchanged: moves.py.

Conditions:
1. Every dimension group keeps positions, samples and channels apart (see layouts.reshape_layout), or cuts the map
   into patches or windows or puts them together (see patches.py). Writes into channels: writes.py.
2. What is overwritten, squeezed or expanded is a channel dimension; what is joined or cut is one, or height or width.
3. All joined values have the same dimensions, also a value and what is written into it; one that is not spatial has
   its full size.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from fisedit_compile.passes.common.arguments import read_arguments
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.family import Family, Inferred, rewrite_nodes
from fisedit_compile.passes.common.ir import RowsBuilder, shape_of, spatial_of
from fisedit_compile.passes.common.layouts import CHANNEL, Spatial, check_dims, reshape_layout
from fisedit_compile.passes.common.meta import VALUE
from fisedit_compile.passes.common.reading.moves import joined_axis, read_crops, read_turn, transposed
from fisedit_compile.passes.common.reading.patches import reshape_patches
from fisedit_compile.passes.common.reading.permutations import permutation
from fisedit_compile.passes.common.targets import (
    ALIAS,
    CROPS,
    CUTS,
    JOINS,
    LAYOUTS,
    PERMUTES,
    SLICES,
    SPLITS,
    SQUEEZES,
    TURNS,
    WRITES,
    aten,
)
from fisedit_compile.passes.sparsify.rules.moves import (
    in_place,
    infer_crops,
    moved_rows,
    rewrite_crops,
    rewrite_turn,
    with_rows_first,
)
from fisedit_compile.passes.sparsify.rules.moves import infer_join as infer_space_join
from fisedit_compile.passes.sparsify.rules.moves import rewrite_join as rewrite_space_join
from fisedit_compile.passes.sparsify.rules.patches import rewrite_patches
from fisedit_compile.passes.sparsify.rules.writes import infer_write, rewrite_write
from fisedit_compile.runtime.spec import Stencil

NAME = "sparsify_layout"


def _infer_shape_change(node: fx.Node, spatial: Spatial) -> Inferred:
    target, before, after = node.target, shape_of(node.args[0]), shape_of(node)  # type: ignore[arg-type]
    if target is ALIAS:
        return spatial
    if target in TURNS:
        tables = read_turn(node, spatial)
        return tables if isinstance(tables, str) else spatial
    if target in PERMUTES:
        return with_rows_first(spatial.with_dims(tuple(spatial.dims[dim] for dim in permutation(node, len(before)))))
    if target is aten.unsqueeze.default:
        dims = list(spatial.dims)
        dims.insert(int(node.args[1]) % (len(before) + 1), CHANNEL)  # type: ignore[arg-type]
        return spatial.with_dims(tuple(dims))
    if target in SQUEEZES:
        removed = read_arguments(node).get("dim", list(range(len(before))))
        removed = {dim % len(before) for dim in ([removed] if isinstance(removed, int) else removed)}
        dims = [name for dim, name in enumerate(spatial.dims) if not (dim in removed and before[dim] == 1)]
        return check_dims(spatial.with_dims(tuple(dims)))
    if target is aten.expand.default:
        if len(before) != len(after):
            return "expand adds dimensions"
        grown = [dim for dim in range(len(before)) if before[dim] != after[dim]]
        if any(spatial.dims[dim] != CHANNEL for dim in grown):
            return "expand repeats positions or samples"
        return spatial
    found = reshape_layout(spatial, before, after)
    if isinstance(found, str) and (patches := reshape_patches(spatial, before, after)):
        return patches.after
    return found


def _infer_join(node: fx.Node) -> Inferred:
    values, given = node.args[0], read_arguments(node)
    assert isinstance(values, (list, tuple))
    known = [spatial for value in values if (spatial := spatial_of(value)) is not None]
    if axis := joined_axis(node, known[0]):
        return infer_space_join(node, axis)
    if any(spatial != known[0] for spatial in known):
        return "the joined values lie on different resolutions or have their dimensions in different order"
    rank, stacking = len(known[0].dims), node.target is aten.stack.default
    dim = int(given["dim"]) % (rank + stacking)
    if any(len(shape_of(value)) != rank for value in values):  # type: ignore[arg-type]
        return "the joined values differ in rank"
    if stacking:
        dims = list(known[0].dims)
        dims.insert(dim, CHANNEL)
        return known[0].with_dims(tuple(dims))
    return known[0] if known[0].dims[dim] == CHANNEL else "values are joined along positions or samples"


def _infer_cut(node: fx.Node, spatial: Spatial) -> Inferred:
    if node.target in SPLITS | CROPS and (crops := read_crops(node, spatial)) is not None:
        return infer_crops(crops, node, spatial)
    dim = int(read_arguments(node)["dim"]) % len(spatial.dims)
    if spatial.dims[dim] != CHANNEL:
        return "it cuts along positions or samples"
    dims = spatial.dims
    if node.target in (aten.unbind.int, aten.select.int):
        dims = dims[:dim] + dims[dim + 1 :]
    cut = spatial.with_dims(dims)
    return [cut] * len(node.meta[VALUE]) if node.target in CUTS else cut


def infer(node: fx.Node) -> Inferred:
    """The layout after the change of dimensions."""
    if node.target in JOINS:
        return _infer_join(node)
    if node.target in WRITES:
        return infer_write(node)
    spatial = spatial_of(node.args[0])
    if spatial is None:
        return "the first operand is not a spatial value"
    return _infer_cut(node, spatial) if node.target in CUTS | SLICES else _infer_shape_change(node, spatial)


def _rewrite_shape_change(node: fx.Node, builder: RowsBuilder) -> None:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    source, target = spatial_of(x), spatial_of(node)
    assert source is not None and target is not None
    if node.target in TURNS:
        rewrite_turn(node, builder)
        return
    if node.target is ALIAS:
        builder.replace(moved_rows(builder, x, in_place(source.domain, target.domain)))
        return
    if node.target in PERMUTES and transposed([source.dims[dim] for dim in permutation(node, len(source.dims))]):
        rows = moved_rows(builder, x, Stencil.of("transposition", source.domain, target.domain))
    elif source.domain != target.domain:
        rewrite_patches(node, builder)
        return
    else:
        rows = builder.rows(x)
    before = [shape_of(x)[dim] for dim in source.channel_dims]
    after = [shape_of(node)[dim] for dim in target.channel_dims]
    if node.target in PERMUTES:
        origin = permutation(node, len(source.dims))
        moved = [source.channel_dims.index(origin[dim]) for dim in target.channel_dims]
        if moved != sorted(moved):
            rows = builder.call(aten.permute.default, rows, [0, 1, *(2 + dim for dim in moved)])
    elif node.target is aten.expand.default:
        if before != after:
            rows = builder.call(aten.expand.default, rows, [-1, -1, *after])
    elif before != after:
        rows = builder.call(aten.reshape.default, rows, [shape_of(node)[target.batch_dim], -1, *after])
    builder.replace(rows)


def _rewrite_join(node: fx.Node, builder: RowsBuilder) -> str | None:
    values = node.args[0]
    assert isinstance(values, (list, tuple))
    spatial = next(spatial for value in values if (spatial := spatial_of(value)) is not None)
    if axis := joined_axis(node, spatial):
        rewrite_space_join(node, builder, axis)
        return None
    converted: list[fx.Node] = []
    for value in values:
        assert isinstance(value, fx.Node)
        if spatial_of(value) is not None:
            converted.append(builder.rows(value))
            continue
        rows = builder.dense_rows(value, spatial, shape_of(value))
        if isinstance(rows, str):
            return rows
        converted.append(rows)
    dim = int(read_arguments(node)["dim"]) % (len(spatial.dims) + (node.target is aten.stack.default))
    target = spatial_of(node)
    assert target is not None
    builder.replace(builder.call(node.target, converted, target.row_dim(dim)))
    return None


def _rewrite_cut(node: fx.Node, builder: RowsBuilder) -> str | None:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    source = spatial_of(x)
    assert source is not None
    if node.target in SPLITS | CROPS and (crops := read_crops(node, source)) is not None:
        rewrite_crops(crops, node, builder)
        return None
    given: dict[str, Any] = read_arguments(node)
    given["dim"] = source.row_dim(int(given["dim"]) % len(source.dims))
    output = builder.call(node.target, builder.rows(x), *list(given.values())[1:])
    if node.target in SLICES:
        builder.replace(output)
        return None
    for getter in list(node.users):
        # Every user of a node with several outputs reads one of them by its number.
        piece = RowsBuilder(getter).call(operator.getitem, output, getter.args[1])
        builder.replace(piece, getter)
    node.graph.erase_node(node)
    return None


def rewrite(node: fx.Node, builder: RowsBuilder) -> str | None:
    """Rename, join, cut or overwrite the channel dimensions of the rows."""
    if node.target in JOINS:
        return _rewrite_join(node, builder)
    if node.target in WRITES:
        return rewrite_write(node, builder)
    if node.target in CUTS | SLICES:
        return _rewrite_cut(node, builder)
    _rewrite_shape_change(node, builder)
    return None


FAMILY = Family(NAME, LAYOUTS.__contains__, infer, rewrite)


def sparsify_layout(compilation: Compilation) -> None:
    """Run the pass on the edit graph."""
    rewrite_nodes(FAMILY, compilation.edit.graph, compilation.report)
