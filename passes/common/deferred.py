"""Graph modules that make their code when it is run for the first time.

Why: ``fx.GraphModule`` writes and compiles Python code whenever its graph is set or ``recompile`` is called, 50 ms for
the graph of a large U-Net. Passes do so many times, and what finally runs is a lowered copy: none of that code is used.
"""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.fx.graph import PythonCode


class DeferredModule(fx.GraphModule):
    """A graph module that is otherwise like any other.

    Every instance of ``fx.GraphModule`` has a class of its own, on which ``forward`` is set.
    """

    def recompile(self) -> PythonCode:
        """Forget the code; the next call makes it anew."""
        type(self).forward = _make_code_and_run
        return PythonCode("", {}, None)

    @property
    def code(self) -> str:
        """The Python code of the graph as it is now."""
        return super().recompile().src


def _make_code_and_run(module: fx.GraphModule, *arguments: Any) -> Any:
    fx.GraphModule.recompile(module)
    return module(*arguments)


def copy_graph(
    graph_module: fx.GraphModule, name: str = "GraphModule", output_count: int | None = None
) -> DeferredModule:
    """A second graph over the same attributes, whose nodes can be changed; names and annotations are kept.

    Args:
        graph_module: whose output is a tuple.
        name: of the copy's class.
        output_count: return only so many outputs, the first ones; None: all.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(graph_module.graph, copies, return_output_node=False)
    (results,) = next(iter(reversed(graph_module.graph.nodes))).args
    graph.output(fx.map_arg(results[:output_count], lambda node: copies[node]))
    if output_count is not None:
        graph.eliminate_dead_code()
    return DeferredModule(graph_module, graph, name)
