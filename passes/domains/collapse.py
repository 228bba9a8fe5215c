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
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import fx

from fisedit_compile.passes.common.ir import spatial_of
from fisedit_compile.passes.common.report import Miss, Report

NAME = "collapse"


class Opaque:
    """A graph that passes cannot look into, as the target of a call.

    Attributes:
        reason: why it runs as a whole.
        changed: positions of the inputs that it changes in place.
    """

    # FX names nodes, and what is called in the code that it writes, by it.
    __name__ = "opaque"

    def __init__(
        self,
        run: Callable[..., Sequence[Any]],
        reason: str,
        strides: Sequence[tuple[int, ...] | None],
        changed: Collection[int] = (),
    ) -> None:
        """Wrap a graph.

        Args:
            run: the graph; takes the flat inputs and returns the outputs.
            reason: see above.
            strides: of each input as the graph knows it; None for what is no tensor.
            changed: see above.
        """
        self._run = run
        # A copy of what the graph changes would keep the change from the caller.
        self._strides = tuple(None if at in changed else known for at, known in enumerate(strides))
        self.reason = reason
        self.changed = frozenset(changed)

    def __str__(self) -> str:
        return "the whole graph"

    def __call__(self, *arguments: Any) -> Sequence[Any]:
        return self._run(*map(_with_strides, arguments, self._strides))


def _with_strides(value: Any, strides: tuple[int, ...] | None) -> Any:
    """A tensor as it lies in memory when the graph is called by itself: views in the graph rely on that."""
    if strides is None or value.stride() == strides:
        return value
    if any(stride == 0 and size > 1 for stride, size in zip(strides, value.shape, strict=True)):
        # Every view of elements that lie on top of each other is one of elements in order as well.
        return value.contiguous()
    return torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device).copy_(value)


def collapse(graph_module: fx.GraphModule, opaque: Opaque, report: Report) -> fx.GraphModule:
    """Run the pass in place and return the module."""
    graph = graph_module.graph
    output = next(iter(reversed(graph.nodes)))
    if any(node.target is opaque for node in graph.nodes):
        return graph_module
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    gone = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    with graph.inserting_before(output):
        call = graph.call_function(opaque, tuple(inputs))
        results = [graph.call_function(operator.getitem, (call, number)) for number in range(len(output.args[0]))]
    for node, value in zip(results, output.args[0], strict=True):
        node.meta.update(val=value.meta["val"], origin=node.name)
        if (spatial := spatial_of(value)) is not None:
            node.meta["spatial"] = spatial.at()  # what happens to positions inside is not looked at
    call.meta["origin"] = call.name
    for position in opaque.changed:
        inputs[position].meta["changed"] = True
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
    graph_module.recompile()
    return graph_module
