"""Run one sparsify pass on a hand-written graph and check what holds for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from fisedit_compile.options import Options
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.family import Family
from fisedit_compile.passes.common.ir import to_map, update
from fisedit_compile.passes.common.layouts import Spatial
from fisedit_compile.passes.common.report import Report
from fisedit_compile.runtime.spec import Stencil
from support.graphs import GraphBuilder, calls, outputs, spell, text


def infer(family: Family, builder: GraphBuilder) -> None:
    """Annotate the family's nodes as propagate_domains does."""
    for node in builder.graph.nodes:
        if node.op != "call_function" or not family.matches(node.target):
            continue
        inferred = family.infer(node)
        key = {str: "dense_reason", list: "spatial_outputs", Spatial: "spatial"}[type(inferred)]
        node.meta[key] = inferred
        if isinstance(inferred, list):
            for user in node.users:
                user.meta["spatial"] = inferred[user.args[1]]


def sparsify(
    run: Callable[[Compilation], None],
    family: Family,
    builder: GraphBuilder,
    *results: fx.Node,
    options: Options | None = None,
) -> tuple[fx.GraphModule, Report]:
    """Infer layouts, run the pass twice, and return the module and the first run's report."""
    infer(family, builder)
    expected = [(node.name, node.meta["val"], node.meta.get("spatial")) for node in results]
    module, report = builder.module(*results), Report()
    run(Compilation(module, options=options or Options(), report=report))
    for node, (name, value, spatial) in zip(outputs(module), expected, strict=True):
        if node.target is to_map:
            assert (node.meta["origin"], node.meta["val"], node.meta["spatial"]) == (name, value, spatial)
    before, second = text(module), Report()
    run(Compilation(module, options=options or Options(), report=second))
    assert text(module) == before, "a second run changes the graph"
    assert not second.matches, "a second run finds something to rewrite"
    assert {miss.reason for miss in second.misses} == {miss.reason for miss in report.misses}
    return module, report


def refused(run: Callable[[Compilation], None], family: Family, builder: GraphBuilder, result: fx.Node) -> list[str]:
    """Run the pass on a graph it must leave alone; returns the reasons it reports for ``result``."""
    infer(family, builder)
    module, report = builder.module(result), Report()
    before = [node for node in module.graph.nodes]
    arguments = [(node.args, node.kwargs) for node in before]
    run(Compilation(module, report=report))
    assert list(module.graph.nodes) == before and [(node.args, node.kwargs) for node in before] == arguments
    assert not report.matches
    assert all(miss.pass_name == family.name for miss in report.misses)
    return [miss.reason for miss in report.misses if miss.node == result.name]


def updates(module: fx.GraphModule) -> list[object]:
    """What a saved edit would store: ``(what, by what)``."""
    return [spell(node)[1:] for node in calls(module) if node.target is update]


def taps(stencil: Stencil, fill: float = 0.0) -> tuple[Any, ...]:
    """How ``spell`` writes what a stencil reads of an input ``x``."""
    return (
        "fisedit.gather_taps",
        ("to_rows", "x"),
        ("recorded", "x", "rows"),
        ("plan", "halo", stencil),
        ("plan", "table", stencil),
        fill,
    )
