"""From a lifted graph to something that can be called: plain FX code, or code made by inductor.

``plain`` calls the sparse operators as Python functions, without the dispatcher, and compiles in milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from fisedit_compile.ops import IMPLEMENTATIONS

#: Takes the graph's inputs in order, returns its outputs as a tuple.
Lowered = Callable[..., Sequence[Any]]


def copy_graph(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A second graph module over the same attributes, whose nodes can be changed."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(graph_module.graph, copies)
    (results,) = next(node for node in graph_module.graph.nodes if node.op == "output").args
    graph.output(fx.map_arg(results, lambda node: copies[node]))
    return fx.GraphModule(graph_module, graph)


def lower_plain(graph_module: fx.GraphModule) -> Lowered:
    """Python code that calls one operator after the other and drops each intermediate after its last use."""
    lowered = copy_graph(graph_module)
    for node in lowered.graph.nodes:
        if node.op == "call_function":
            node.target = IMPLEMENTATIONS.get(node.target, node.target)
    lowered.recompile()
    return lowered.forward


def lower(graph_module: fx.GraphModule, lowering: str) -> Lowered:
    """Make a lifted graph callable.

    Args:
        graph_module: functional graph whose placeholders carry ``meta["val"]``.
        lowering: ``"plain"`` or ``"inductor"``.
    """
    return lower_plain(graph_module)
