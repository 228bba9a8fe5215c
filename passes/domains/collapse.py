"""Make one operator of a graph that has to run as PyTorch made it.

Why: what draws random numbers, has effects or holds graphs of its own is right only when it runs as a whole. The traced
graph, or all that is known of it, tells which inputs and outputs are maps. From here on the whole is an operator
without a rule like any other: it reads recorded maps with the active rows written in, and the maps that it returns keep
their recorded values outside the mask.

Before: ``h = conv2d(x, w)``, ``d = dropout(h, 0.5, True)``, ``return (d, mean(d, [2, 3]))``
After:  ``g = opaque(x, w)``, ``return (g[0], g[1])``

Conditions:
1. Outputs keep their values and layouts.
2. An input that the graph changes in place has ``meta["changed"]``: the graph must get the caller's own tensor.
3. What was found about operators that are gone leaves the report. The whole is among its ``dense_nodes``; where it says
   why nothing can be masked, it says there why the graph runs as a whole as well.
"""

from __future__ import annotations

import operator

from fisedit_compile.errors import GraphError
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.ir import spatial_of
from fisedit_compile.passes.common.meta import CHANGED, ORIGIN, SPATIAL, VALUE
from fisedit_compile.passes.common.report import Miss

NAME = "collapse"


def collapse(compilation: Compilation) -> None:
    """Run the pass on the traced graph.

    Raises:
        GraphError: the compilation is not that of a graph that runs as a whole.
    """
    graph, opaque, report = compilation.edit.graph, compilation.opaque, compilation.report
    if opaque is None:
        raise GraphError("collapse was run on a graph that passes can look into; it is for opaque graphs only")
    output = next(iter(reversed(graph.nodes)))
    if any(node.target is opaque for node in graph.nodes):
        return
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    gone = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    with graph.inserting_before(output):
        call = graph.call_function(opaque, tuple(inputs))
        results = [graph.call_function(operator.getitem, (call, number)) for number in range(len(output.args[0]))]
    for node, value in zip(results, output.args[0], strict=True):
        node.meta.update({VALUE: value.meta[VALUE], ORIGIN: node.name})
        if (spatial := spatial_of(value)) is not None:
            node.meta[SPATIAL] = spatial.at()  # what happens to positions inside is not looked at
    call.meta[ORIGIN] = call.name
    for position in opaque.changed:
        inputs[position].meta[CHANGED] = True
    output.args = (tuple(results),)
    for node in reversed(gone):
        graph.erase_node(node)
    report.matches.clear()
    report.misses.clear()
    report.flow.clear()
    report.lost.clear()
    report.match(NAME)
    if report.dense_reason is None:
        report.dense_nodes.append(Miss("trace", call.name, str(opaque), opaque.reason))
    else:
        report.dense_reason = f"{opaque.reason}; moreover {report.dense_reason}"
    compilation.edit.recompile()
