"""The helpers that every pass uses: argument reading, the rows builder, dead code, and the loop over a family."""

from __future__ import annotations

import pytest
import torch

from fisedit_compile.errors import GraphError
from fisedit_compile.passes.common.arguments import pair, read_arguments
from fisedit_compile.passes.common.family import Family, rewrite_nodes
from fisedit_compile.passes.common.ir import (
    RowsBuilder,
    eliminate_dead_code,
    origin_of,
    reads_spatial,
    recorded,
    shape_of,
    spatial_of,
    to_map,
    to_rows,
    update,
)
from fisedit_compile.passes.common.report import Report
from fisedit_compile.runtime.spec import Site, Stencil
from support.graphs import DOMAIN, GraphBuilder, aten, calls, layout, outputs, reasons, spell, targets
from support.sparsifying import updates

RELU = aten.relu.default


def test_arguments_by_name_with_defaults() -> None:
    builder = GraphBuilder()
    node = builder.call(aten.conv2d.default, builder.picture(), builder.parameter(8, 6, 3, 3), None, padding=[1, 2])
    given = read_arguments(node)
    assert (given["input"].name, given["weight"].name, given["bias"]) == ("x", "weight", None)
    assert (given["stride"], given["padding"], given["groups"]) == ([1, 1], [1, 2], 1)


@pytest.mark.parametrize(("value", "expected"), [(3, (3, 3)), ([2], (2, 2)), ((1, 2), (1, 2)), ([4, 5], (4, 5))])
def test_pairs(value, expected) -> None:
    assert pair(value) == expected


def test_what_a_node_says_about_itself() -> None:
    builder = GraphBuilder()
    x, prompt = builder.picture(), builder.input(2, 7, 6, name="prompt")
    joined = builder.call(aten.cat.default, [x, x], 1)
    marker = builder.marker(to_map, x, origin="elsewhere")
    assert spatial_of(x) == layout("bchw") and spatial_of(prompt) is None and spatial_of(None) is None
    assert shape_of(joined) == (2, 12, 5, 4)
    assert (origin_of(joined), origin_of(marker)) == (joined.name, "elsewhere")
    assert reads_spatial(joined) and not reads_spatial(builder.call(RELU, prompt))
    with pytest.raises(GraphError, match=f"node {marker.name} carries no tensor value"):
        shape_of(marker)


def test_rows_of_a_map_of_rows_are_taken_over() -> None:
    builder = GraphBuilder()
    x = builder.picture()
    rows = builder.marker(to_rows, x)
    mixed = builder.marker(to_map, rows, like=x)
    node = builder.call(RELU, mixed, spatial="bchw")
    rewriting = RowsBuilder(node)
    assert rewriting.rows(mixed) is rows
    fresh = rewriting.rows(x)
    assert fresh.target is to_rows and fresh.next is node


def test_new_nodes_carry_the_provenance_of_the_old() -> None:
    builder = GraphBuilder()
    x = builder.picture()
    node = builder.call(RELU, x, spatial="bchw")
    provenance = {"nn_module_stack": {"a": ("a", "A")}, "stack_trace": "line", "module_path": "a"}
    node.meta.update(provenance)
    rewriting = RowsBuilder(node)
    rewriting.replace(rewriting.call(RELU, rewriting.rows(x)))
    module = builder.module(*[user for user in x.graph.nodes if user.target is to_map])
    assert len(calls(module)) == 3
    for made in calls(module):
        assert made.meta["nn_module_stack"] == {"a": ("a", "A")} and made.meta["stack_trace"] == "line"


def test_replacing_keeps_value_layout_and_origin() -> None:
    builder = GraphBuilder()
    x = builder.picture()
    node = builder.call(RELU, x, spatial="bchw")
    name, value = node.name, node.meta["val"]
    reader = builder.call(aten.neg.default, node)
    rewriting = RowsBuilder(node)
    rewriting.replace(rewriting.rows(x))
    mixed = reader.args[0]
    assert mixed.target is to_map and node not in builder.graph.nodes
    assert (mixed.meta["origin"], mixed.meta["val"], mixed.meta["spatial"]) == (name, value, layout("bchw"))


def test_taps_and_recorded_rows() -> None:
    builder = GraphBuilder()
    x = builder.picture()
    stencil = Stencil.of("pixel_shuffle", DOMAIN, DOMAIN, factor=1)
    taps = RowsBuilder(builder.call(RELU, x)).taps(x, stencil, 0.5)
    kept, rows = ("recorded", "x", "rows"), ("to_rows", "x")
    expected = ("fisedit.gather_taps", rows, kept, ("plan", "halo", stencil), ("plan", "table", stencil), 0.5)
    assert spell(taps) == expected
    assert updates(builder.module(taps)) == [(kept, rows)]


def test_an_operand_of_higher_rank_is_refused() -> None:
    builder = GraphBuilder()
    x, big = builder.tokens(), builder.input(3, 2, 20, 6, name="big")
    found = RowsBuilder(builder.call(RELU, x)).dense_rows(big, layout("bsc"), (2, 20, 6))
    assert found == "an operand of rank 4 broadcasts beyond rank 3"


def test_dead_code_takes_its_updates_along() -> None:
    builder = GraphBuilder()
    x = builder.picture()
    rows = builder.marker(to_rows, x)
    dead, live = builder.marker(recorded, "x", "map"), builder.marker(recorded, "x", "rows")
    for value in (dead, live):
        builder.marker(update, value, rows)
    builder.call(RELU, builder.call(RELU, x))
    module = builder.module(builder.marker(aten.add.Tensor, live, live))
    eliminate_dead_code(module.graph)
    assert targets(module) == [to_rows, recorded, update, aten.add.Tensor]
    assert [node for node in module.graph.nodes if node.op == "placeholder"] == [x]


def relu_family(reason: str | None) -> Family:
    """Rewrites relu to relu on rows, or refuses."""

    def rewrite(node, builder: RowsBuilder) -> str | None:
        if reason is None:
            builder.replace(builder.call(RELU, builder.rows(node.args[0])))
        return reason

    return Family("relus", {RELU}.__contains__, lambda node: layout("bchw"), rewrite)


def test_a_family_rewrites_its_annotated_nodes() -> None:
    builder = GraphBuilder()
    x, prompt = builder.picture(), builder.input(2, 7, 6, name="prompt")
    annotated, other = builder.call(RELU, x, spatial="bchw"), builder.call(RELU, prompt)
    unknown = builder.call(RELU, x)
    module, report = builder.module(annotated, other, unknown), Report()
    rewrite_nodes(relu_family(None), module.graph, report)
    module.graph.lint()
    assert [spell(node) for node in outputs(module)] == [
        ("to_map", ("aten.relu", ("to_rows", "x"))),
        ("aten.relu", "prompt"),
        ("aten.relu", "x"),
    ]
    assert report.matches == {"relus": 1} and report.misses == []


def test_a_refused_rewrite_leaves_its_reason() -> None:
    builder = GraphBuilder()
    node = builder.call(RELU, builder.picture(), spatial="bchw")
    module, report = builder.module(node), Report()
    rewrite_nodes(relu_family("not today"), module.graph, report)
    assert node.meta["dense_reason"] == "not today" and outputs(module) == (node,)
    assert reasons(report, "relus") == ["not today"] and not report.matches
    assert (report.misses[0].node, report.misses[0].target) == (node.name, "aten.relu.default")


def test_a_node_with_a_reason_is_not_tried_again() -> None:
    builder = GraphBuilder()
    node = builder.call(RELU, builder.picture(), spatial="bchw")
    node.meta["dense_reason"] = "known before"
    module, report = builder.module(node), Report()
    rewrite_nodes(relu_family(None), module.graph, report)
    assert outputs(module) == (node,) and reasons(report) == ["known before"]


def test_a_report_counts_bytes() -> None:
    sites = (
        Site("a", "value", None, (), 0, (2, 3), torch.float32),
        Site("b", "spatial", DOMAIN, (0, 1, 2), 1, (2, 20, 6), torch.float16),
    )
    assert Report(sites=sites).bytes_stored == 24 + 480
    assert Report().bytes_stored == 0
