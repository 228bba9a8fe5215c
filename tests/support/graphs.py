"""Dense graphs written by hand: a small builder, and readers for what a pass left behind.

Every operator runs on fake tensors as it is appended, so each node carries ``meta["val"]`` as after tracing.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx

from fisedit_compile.passes.common.ir import MARKERS
from fisedit_compile.passes.common.layouts import BATCH, CHANNEL, HEIGHT, SPACE, WIDTH, Spatial
from fisedit_compile.passes.common.program import InputInfo, InputKind
from fisedit_compile.passes.common.report import Report
from fisedit_compile.private.graphs import FakeTensorMode
from fisedit_compile.runtime.spec import Domain

aten = torch.ops.aten
LETTERS = {"b": BATCH, "c": CHANNEL, "h": HEIGHT, "w": WIDTH, "s": SPACE}

#: Sizes of most graphs: all different, so that no dimension can be taken for another.
BATCH_SIZE, CHANNELS, ROWS, COLUMNS = 2, 6, 5, 4
DOMAIN = Domain(ROWS, COLUMNS)
PICTURE = (BATCH_SIZE, CHANNELS, ROWS, COLUMNS)
TOKENS = (BATCH_SIZE, ROWS * COLUMNS, CHANNELS)


def layout(dims: str, domain: Domain = DOMAIN) -> Spatial:
    """A layout from one letter for each dimension: ``layout("bchw")``."""
    return Spatial(domain, tuple(LETTERS[letter] for letter in dims))


class GraphBuilder:
    """Appends nodes; a ``spatial`` argument (letters or a layout) annotates what propagate_domains would find."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.root = torch.nn.Module()
        self.infos: list[InputInfo] = []
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def _annotate(self, node: fx.Node, value: Any, spatial: str | Spatial | None) -> fx.Node:
        node.meta.update(val=value, origin=node.name)
        if spatial is not None:
            node.meta["spatial"] = layout(spatial) if isinstance(spatial, str) else spatial
        return node

    def input(
        self,
        *shape: int,
        name: str = "x",
        kind: InputKind = "user",
        dtype: torch.dtype = torch.float32,
        spatial: str | Spatial | None = None,
    ) -> fx.Node:
        """A graph input, placed behind the others at the top; its ``InputInfo`` goes to ``infos``."""
        taken = sum(info.name.split("_")[0] == name for info in self.infos)
        name = f"{name}_{taken}" if taken else name
        self.infos.append(InputInfo(kind, name))
        with self.mode:
            value = torch.empty(shape, dtype=dtype)
        return self._annotate(self._placeholder(name), value, spatial)

    def number(self, value: float, name: str = "number") -> fx.Node:
        """A graph input that is a Python number."""
        self.infos.append(InputInfo("scalar", name))
        return self._annotate(self._placeholder(name), value, None)

    def _placeholder(self, name: str) -> fx.Node:
        rest = [node for node in self.graph.nodes if node.op != "placeholder"]
        with self.graph.inserting_before(rest[0]) if rest else nullcontext():
            return self.graph.placeholder(name)

    def picture(self, *shape: int, name: str = "x", spatial: str | None = "bchw") -> fx.Node:
        """A graph input ``[B, C, H, W]`` annotated as such; by default of the sizes above."""
        shape = shape or PICTURE
        return self.input(*shape, name=name, spatial=layout(spatial, Domain(*shape[2:])) if spatial else None)

    def tokens(self, *shape: int, name: str = "x") -> fx.Node:
        """A graph input ``[B, S, C]`` annotated as such."""
        return self.input(*(shape or TOKENS), name=name, spatial="bsc")

    def parameter(self, *shape: int, name: str = "weight") -> fx.Node:
        """A graph input that is a parameter."""
        return self.input(*shape, name=name, kind="parameter")

    def constant(self, value: Tensor, name: str = "constant") -> fx.Node:
        """A tensor stored in the graph module."""
        self.root.register_buffer(name, value)
        node = self.graph.get_attr(name)
        return self._annotate(node, self.mode.from_tensor(value), None)

    def call(self, target: Any, *args: Any, spatial: str | Spatial | None = None, **kwargs: Any) -> fx.Node:
        """A call to an operator, run on fake tensors."""
        node = self.graph.call_function(target, args, kwargs)
        values = fx.node.map_arg((args, kwargs), lambda value: value.meta["val"])
        with self.mode, torch.no_grad():
            value = target(*values[0], **values[1])
        return self._annotate(node, value, spatial)

    def piece(self, node: fx.Node, number: int, spatial: str | Spatial | None = None) -> fx.Node:
        """One output of an operator with several."""
        return self.call(operator.getitem, node, number, spatial=spatial)

    def marker(self, target: Any, *args: Any, like: fx.Node | None = None, **meta: Any) -> fx.Node:
        """A node that is not run; it takes value, layout and origin of ``like``, and ``meta``."""
        node = self.graph.call_function(target, args)
        if like is not None:
            node.meta.update({key: like.meta[key] for key in ("val", "spatial", "origin") if key in like.meta})
        node.meta.update(meta)
        return node

    def module(self, *outputs: Any) -> fx.GraphModule:
        """The finished graph, returning a tuple."""
        self.graph.output(tuple(outputs))
        self.graph.lint()
        return fx.GraphModule(self.root, self.graph)


def calls(graph_module: fx.GraphModule) -> list[fx.Node]:
    """All calls, in order."""
    return [node for node in graph_module.graph.nodes if node.op == "call_function"]


def targets(graph_module: fx.GraphModule) -> list[Any]:
    """What is called, in order."""
    return [node.target for node in calls(graph_module)]


def only(graph_module: fx.GraphModule, target: Any) -> fx.Node:
    """The one call of ``target``."""
    found = [node for node in calls(graph_module) if node.target is target]
    assert len(found) == 1, f"{len(found)} calls of {target} in\n{graph_module.graph}"
    return found[0]


def outputs(graph_module: fx.GraphModule) -> tuple[Any, ...]:
    """What the graph returns."""
    return tuple(next(iter(reversed(graph_module.graph.nodes))).args[0])


def text(graph_module: fx.GraphModule) -> str:
    """The graph with its annotations, checked: two equal texts are equal graphs."""
    graph_module.graph.lint()
    lines = []
    for node in graph_module.graph.nodes:
        kept = {key: node.meta[key] for key in ("spatial", "origin", "dense_reason", "hoisted") if key in node.meta}
        lines.append(f"{node.format_node()} {node.args} {node.kwargs} {kept}")
    return "\n".join(lines)


def spell(node: Any) -> Any:
    """A node as nested tuples ``(name of target, arguments...)``; inputs by name, plans by kind and what they plan."""
    if isinstance(node, (list, tuple)):
        return [spell(item) for item in node]
    if not isinstance(node, fx.Node):
        return node
    if node.op != "call_function":
        return str(node.target)
    if "plan_input" in node.meta:
        return ("plan", node.meta["plan_input"].kind, node.meta["plan_input"].of)
    name = node.target.__name__ if node.target in MARKERS or node.target is operator.getitem else str(node.target)
    keywords = [(key, spell(value)) for key, value in node.kwargs.items()]
    return (name.removesuffix(".default"), *(spell(item) for item in node.args), *keywords)


def reasons(report: Report, pass_name: str | None = None) -> list[str]:
    """Why rules of a pass did not apply."""
    return [miss.reason for miss in report.misses if pass_name in (None, miss.pass_name)]


def dense_reasons(report: Report) -> dict[str, str]:
    """Nodes that stay dense, and why."""
    return {miss.node: miss.reason for miss in report.dense_nodes}


def names(values: Sequence[Any]) -> list[str]:
    """Names of nodes."""
    return [value.name for value in values]
