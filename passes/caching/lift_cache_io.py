"""Turn loads, plans and hoisted values into graph inputs, and stores and updates into graph outputs.

Why: a graph that reads or writes hidden state cannot be compiled safely: a void operator without users is dropped as
dead code. Lifted graphs are functional; whoever calls them moves the data.

Before: record: ``store(v, "a")``, ``return (y,)``            After: ``return (y, v)``
Before: edit: ``h = load("a")``, ``i = plan("index", d)``     After: placeholders ``recorded_a``, ``plan_index``
        ``update(h, r)``, ``return (y,)``                     edit: ``return (y,)``; edit_save: ``return (y, r)``

Conditions: none; every such node is lifted, equal ones into one input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from fisedit_compile.errors import GraphError
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.deferred import DeferredModule
from fisedit_compile.passes.common.ir import load, plan, store, update
from fisedit_compile.passes.common.meta import HOISTED, INVARIANT, ORIGIN, PLAN_INPUT, VALUE
from fisedit_compile.passes.common.program import GraphInput
from fisedit_compile.passes.common.report import Report
from fisedit_compile.runtime.spec import Site

NAME = "lift_cache_io"
Read = Callable[[fx.Node], GraphInput | None]


def lift_stores(record: fx.GraphModule, sites: Sequence[Site], report: Report) -> fx.GraphModule:
    """Make the stored values outputs of the record graph, in the order of ``sites``; in place."""
    graph = record.graph
    values: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target is store:
            value, name = node.args
            values[name] = value
            graph.erase_node(node)
            report.match(NAME)
    output = next(iter(reversed(graph.nodes)))
    output.args = ((*output.args[0], *(values[site.name] for site in sites)),)
    graph.eliminate_dead_code()
    record.recompile()
    return record


def _input_of(node: fx.Node, arguments: dict[fx.Node, int]) -> GraphInput | None:
    """What the node is read from, when it becomes a graph input."""
    if node in arguments:
        return GraphInput("argument", arguments[node])
    if HOISTED in node.meta:
        return GraphInput("hoisted", node.meta[HOISTED])
    if INVARIANT in node.meta:
        return GraphInput("invariant", node.meta[INVARIANT])
    if node.target is plan:
        return GraphInput("plan", node.meta[PLAN_INPUT])
    if node.target is load:
        return GraphInput("recorded", str(node.args[0]))
    return None


class _Cut:
    """The part of a graph between its inputs and some wanted nodes, as a graph of its own."""

    def __init__(
        self, graph: fx.Graph, wanted: Sequence[fx.Node], read: Callable[[fx.Node], GraphInput | None]
    ) -> None:
        """``read`` says what a node is read from when it is an input, and None when it is computed."""
        self._graph = graph
        self._needed: set[fx.Node] = set()
        stack = list(wanted)
        while stack:
            node = stack.pop()
            if node not in self._needed:
                self._needed.add(node)
                if read(node) is None:
                    stack.extend(node.all_input_nodes)
        self.inputs: dict[GraphInput, list[fx.Node]] = {}
        for node in graph.nodes:
            if node in self._needed and (source := read(node)) is not None:
                self.inputs.setdefault(source, []).append(node)

    def build(self, root: fx.GraphModule, outputs: Sequence[Any], name: str) -> fx.GraphModule:
        """A module with one placeholder for each input that returns ``outputs``, nodes or constants."""
        lifted = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for source, nodes in self.inputs.items():
            placeholder = lifted.placeholder(f"{source.kind}_{nodes[0].name}")
            placeholder.meta.update({key: value for key, value in nodes[0].meta.items() if key in (VALUE, ORIGIN)})
            copies.update(dict.fromkeys(nodes, placeholder))
        for node in self._graph.nodes:
            if node in self._needed and node not in copies and node.op != "output":
                copies[node] = lifted.node_copy(node, lambda value: copies[value])
        lifted.output(tuple(copies[value] if isinstance(value, fx.Node) else value for value in outputs))
        lifted.eliminate_dead_code()
        return DeferredModule(root, lifted, name)


def _arguments(graph: fx.Graph) -> dict[fx.Node, int]:
    return {node: number for number, node in enumerate(n for n in graph.nodes if n.op == "placeholder")}


def lift_invariants(edit: fx.GraphModule) -> tuple[fx.GraphModule | None, tuple[GraphInput, ...]]:
    """The graph that computes the marked invariants in their order, and its inputs; None when nothing is marked."""
    arguments = _arguments(edit.graph)
    marked = sorted((node for node in edit.graph.nodes if INVARIANT in node.meta), key=lambda n: n.meta[INVARIANT])
    if not marked:
        return None, ()

    def read(node: fx.Node) -> GraphInput | None:
        source = _input_of(node, arguments)
        return None if source is not None and source.kind == "invariant" else source

    cut = _Cut(edit.graph, marked, read)
    return cut.build(edit, marked, "Invariants"), tuple(cut.inputs)


def lift_edit(
    edit: fx.GraphModule, sites: Sequence[Site], report: Report
) -> tuple[fx.GraphModule, fx.GraphModule, tuple[GraphInput, ...]]:
    """Returns the lifted edit graph, the one that also returns each site's update, and their common inputs."""
    graph = edit.graph
    arguments = _arguments(graph)
    output = next(iter(reversed(graph.nodes)))
    originals: tuple[Any, ...] = tuple(output.args[0])
    changed: dict[str, fx.Node] = {}
    for node in graph.nodes:
        if node.target is update:
            source, fresh = node.args
            changed[str(source.args[0])] = fresh
    outputs = {f"output:{number}": value for number, value in enumerate(originals)}
    rows_of = {value: changed[name] for name, value in outputs.items() if name in changed}
    updates: list[Any] = []
    for site in sites:
        fresh = changed.get(site.name)
        if fresh is None and site.name in outputs:
            # An output that is not spatial is replaced as a whole; one equal to an earlier one shares its rows.
            value = outputs[site.name]
            fresh = value if site.kind == "value" else rows_of.get(value)
        updates.append(fresh)
    results = [value for value in (*originals, *updates) if isinstance(value, fx.Node)]
    cut = _Cut(graph, results, lambda node: _input_of(node, arguments))
    report.matches[NAME] += sum(map(len, cut.inputs.values()))
    unknown = set(changed) - {site.name for site in sites}
    if unknown:
        raise GraphError(f"updates of unknown sites: {sorted(unknown)}")
    saving = cut.build(edit, [*originals, *updates], "EditSave")
    return cut.build(edit, originals, "Edit"), saving, tuple(cut.inputs)


def lift_cache_io(compilation: Compilation) -> None:
    """Run the pass: makes all graphs functional, and says what the new ones read."""
    edit, record, sites, report = compilation.edit, compilation.module("record"), compilation.sites, compilation.report
    compilation.edit, compilation.edit_save, compilation.edit_inputs = lift_edit(edit, sites, report)
    compilation.invariants, compilation.invariant_inputs = lift_invariants(edit)
    lift_stores(record, sites, report)
