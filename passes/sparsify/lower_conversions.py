"""Spell out the conversions between maps and rows that are left.

Why: after ``densify`` only graph inputs, graph outputs and the borders of dense operators convert; here they become
operators.

Before: ``r = to_rows(x)`` with x of dimensions (batch, channel, height, width)
After:  ``r = gather_rows(flatten(permute(x, [0, 2, 3, 1]), 1, 2), index)``
Before: ``y = to_map(r)``
After:  ``m = recorded(origin, "map")``; ``update(m, r)``;
        ``s = scatter_rows(flatten(permute(m, [0, 2, 3, 1]), 1, 2), r, index, valid)``;
        ``y = permute(unflatten(s, 1, [H, W]), [0, 3, 1, 2])``

Conditions: none; every conversion is lowered.
"""

from __future__ import annotations

import torch
from torch import fx

from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.ir import RowsBuilder, origin_of, recorded, spatial_of, to_map, to_rows, update
from fisedit_compile.passes.common.layouts import Spatial
from fisedit_compile.passes.common.meta import ORIGIN
from fisedit_compile.passes.common.targets import aten

NAME = "lower_conversions"


def flatten_space(builder: RowsBuilder, value: fx.Node, spatial: Spatial) -> fx.Node:
    """View a map as ``[B, S, *C]``; strides are whatever they are."""
    if spatial.order != tuple(range(len(spatial.order))):
        value = builder.call(aten.permute.default, value, list(spatial.order))
    return builder.call(aten.flatten.using_ints, value, 1, 2) if spatial.space_rank == 2 else value


def unflatten_space(builder: RowsBuilder, value: fx.Node, spatial: Spatial) -> fx.Node:
    """The inverse of ``flatten_space``."""
    if spatial.space_rank == 2:
        value = builder.call(aten.unflatten.int, value, 1, [spatial.domain.height, spatial.domain.width])
    if spatial.order != tuple(range(len(spatial.order))):
        inverse = [spatial.order.index(dim) for dim in range(len(spatial.order))]
        value = builder.call(aten.permute.default, value, inverse)
    return value


def lower_conversions(compilation: Compilation) -> None:
    """Run the pass on the edit graph."""
    graph_module, report = compilation.edit, compilation.report
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.target not in (to_rows, to_map):
            continue
        source = node.args[0]
        assert isinstance(source, fx.Node)
        builder = RowsBuilder(node)
        spatial = spatial_of(source if node.target is to_rows else node)
        assert spatial is not None
        index = builder.plan("index", spatial.domain)
        if node.target is to_rows:
            output = builder.call(torch.ops.fisedit.gather_rows.default, flatten_space(builder, source, spatial), index)
        else:
            whole = builder.call(recorded, origin_of(node), "map")
            builder.call(update, whole, source)
            output = builder.call(
                torch.ops.fisedit.scatter_rows.default,
                flatten_space(builder, whole, spatial),
                source,
                index,
                builder.plan("valid", spatial.domain),
            )
            output = unflatten_space(builder, output, spatial)
            output.meta[ORIGIN] = origin_of(node)
        node.replace_all_uses_with(output)
        graph.erase_node(node)
        report.match(NAME)
    graph_module.recompile()
