"""Close the graph around what stays dense, and cancel conversions that undo each other.

Why: a value computed densely, and a spatial graph input, counts as the recorded value outside the mask like any
other; between two row operators nothing needs to be a map.

Before: ``y = flip(x_map, [3])`` read by ``a = to_rows(y)`` and by ``z = fft(y)``;  ``b = to_rows(to_map(r))``
After:  ``y = flip(x_map, [3])``, ``r0 = to_rows(y)``, ``m0 = to_map(r0)``, ``a = r0``, ``z = fft(m0)``;  ``b = r``

Conditions:
1. A spatial node that no pass rewrote, graph inputs included, is read through ``to_map(to_rows(node))``; a graph input
   that is changed in place (collapse.py) is read as it is.
2. ``to_rows(to_map(r))`` is ``r``.
3. Nothing else changes; what nobody reads any more is erased.
"""

from __future__ import annotations

import operator

from torch import fx

from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.ir import (
    eliminate_dead_code,
    origin_of,
    reads_spatial,
    spatial_of,
    to_map,
    to_rows,
)
from fisedit_compile.passes.common.meta import CHANGED, DENSE_REASON, ORIGIN, SPATIAL, VALUE
from fisedit_compile.passes.common.opaque import Opaque

NAME = "densify"


def _wrap(graph: fx.Graph, node: fx.Node) -> None:
    """Let every reader of ``node`` read its mixed value."""
    readers = list(node.users)
    after = node
    if node.op == "placeholder":
        # Placeholders stay together at the top of the graph.
        after = [other for other in graph.nodes if other.op == "placeholder"][-1]
    with graph.inserting_after(after):
        rows = graph.call_function(to_rows, (node,))
    with graph.inserting_after(rows):
        mixed = graph.call_function(to_map, (rows,))
    mixed.meta.update({VALUE: node.meta[VALUE], SPATIAL: node.meta[SPATIAL], ORIGIN: origin_of(node)})
    for reader in readers:
        if reader.target is to_rows:
            reader.replace_all_uses_with(rows)
            graph.erase_node(reader)
        else:
            reader.replace_input_with(node, mixed)


def densify(compilation: Compilation) -> None:
    """Run the pass on the edit graph."""
    graph_module, report = compilation.edit, compilation.report
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.target in (to_rows, to_map) or node.op not in ("placeholder", "call_function"):
            continue
        # Where the rows are all that is read, there is no map to mix.
        mixed = spatial_of(node) is not None and not node.meta.get(CHANGED)
        if mixed and [user.target for user in node.users] != [to_rows]:
            _wrap(graph, node)
        touches = reads_spatial(node) or spatial_of(node) is not None
        named = node.target is operator.getitem or isinstance(node.target, Opaque)
        if node.op == "call_function" and not named and touches:
            report.stays_dense(node, node.meta.get(DENSE_REASON, "its pass is disabled"))
    for node in list(graph.nodes):
        if node.target is to_rows and node.args[0].target is to_map:
            node.replace_all_uses_with(node.args[0].args[0])
            graph.erase_node(node)
            report.match(NAME)
    eliminate_dead_code(graph)
    graph_module.recompile()
