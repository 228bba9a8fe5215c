"""insert_cache_ops: what a recorded call stores, once for each origin and transform."""

from __future__ import annotations

from operator import getitem

import pytest
import torch

from fisedit_compile.errors import GraphError
from fisedit_compile.passes.caching.insert_cache_ops import insert_cache_ops
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.ir import load, recorded, store, update
from fisedit_compile.runtime.spec import Site
from support.graphs import DOMAIN, GraphBuilder, aten, calls, outputs, spell
from support.sparsifying import updates

fisedit = torch.ops.fisedit
FLAT = ("aten.flatten.using_ints", ("aten.permute", "x", [0, 2, 3, 1]), 1, 2)


def dense(spatial: str | None = "bchw", shape=(2, 6, 5, 4)) -> tuple[GraphBuilder, torch.fx.Node]:
    """The record graph: ``relu(x)``, still open."""
    builder = GraphBuilder()
    x = builder.input(*shape, spatial=spatial)
    return builder, builder.call(aten.relu.default, x, spatial=spatial)


def edit(*transforms: tuple) -> torch.fx.GraphModule:
    """An edit graph that reads these recorded values and sums them up."""
    builder = GraphBuilder()
    builder.picture()
    nodes = [builder.marker(recorded, *arguments) for arguments in transforms]
    return builder.module(*(builder.marker(aten.neg.default, node) for node in nodes))


def run(record: torch.fx.GraphModule, *transforms: tuple):
    """Sites, what is stored by name, and what the edit graph loads in order."""
    edited = edit(*transforms)
    compilation = Compilation(edited, record=record)
    insert_cache_ops(compilation)
    sites = compilation.sites
    assert not any(node.target is recorded for node in calls(edited))
    stored = {node.args[1]: spell(node.args[0]) for node in calls(record) if node.target is store}
    assert list(stored) == [site.name for site in sites], "stores and sites differ in order"
    assert all(not node.users for node in calls(record) if node.target is store)
    assert compilation.report.matches["insert_cache_ops"] == len(transforms)
    return sites, stored, [node.args[0].args[0] for node in outputs(edited)]


def test_condition_1_every_output_is_a_site() -> None:
    builder, relu = dense()
    pooled = builder.call(aten.mean.dim, relu, [2, 3])
    sites, stored, loads = run(builder.module(relu, pooled))
    assert sites == (
        Site("output:0", "spatial", DOMAIN, (0, 2, 3, 1), 2, (2, 6, 5, 4), torch.float32, lossless=True),
        Site("output:1", "value", None, (), 0, (2, 6), torch.float32),
    )
    assert stored == {"output:0": ("aten.relu", "x"), "output:1": spell(pooled)} and loads == []


def test_condition_1_an_output_is_the_recorded_map_of_its_value() -> None:
    builder, relu = dense()
    name = relu.name
    sites, _, loads = run(builder.module(relu, relu), (name, "map"), (name, "rows"))
    assert loads == ["output:0", f"{name}:rows"]
    assert [site.name for site in sites] == ["output:0", "output:1", f"{name}:rows"]


def test_condition_2_a_map_is_stored_as_it_is() -> None:
    builder, relu = dense()
    sites, stored, loads = run(builder.module(relu), ("x", "map"))
    assert stored["x:map"] == "x" and loads == ["x:map"]
    assert sites[1] == Site("x:map", "spatial", DOMAIN, (0, 2, 3, 1), 2, (2, 6, 5, 4), torch.float32)


@pytest.mark.parametrize(
    ("spatial", "shape", "rows", "stored_shape"),
    [
        ("bchw", (2, 6, 5, 4), FLAT, (2, 20, 6)),
        ("bsc", (2, 20, 6), "x", (2, 20, 6)),
        ("bcsc", (2, 3, 20, 4), ("aten.permute", "x", [0, 2, 1, 3]), (2, 20, 3, 4)),
    ],
)
def test_condition_2_rows_are_contiguous_with_positions_in_front(spatial, shape, rows, stored_shape) -> None:
    builder, relu = dense(spatial, shape)
    sites, stored, _ = run(builder.module(relu), ("x", "rows"))
    assert stored["x:rows"] == ("aten.contiguous" if spatial == "bsc" else "fisedit.contiguous_rows", rows)
    order = tuple(range(len(stored_shape)))
    assert sites[1] == Site("x:rows", "spatial", DOMAIN, order, 1, stored_shape, torch.float32)


def test_what_is_stored_is_computed_right_behind_its_value() -> None:
    builder, relu = dense()
    last = builder.call(aten.neg.default, relu, spatial="bchw")
    record = builder.module(last)
    run(record, (relu.name, "rows"), (relu.name, "norm_totals", 3), (relu.name, "norm_center", 3), ("x", "rows"))
    record.graph.lint()
    order = [node.name for node in record.graph.nodes]
    computed = [node for node in calls(record) if node.target in (fisedit.contiguous_rows.default, getitem)]
    assert len(computed) == 4
    assert all(order.index(node.name) < order.index(last.name) for node in computed)
    first = next(node for node in calls(record) if node.target is fisedit.contiguous_rows.default)
    assert order.index(first.name) < order.index(relu.name), "rows of the input"


def test_condition_2_statistics_of_one_norm_share_their_computation() -> None:
    builder, relu = dense()
    record = builder.module(relu)
    kinds = ("norm_totals", "norm_partials", "norm_center")
    sites, stored, loads = run(record, *(("x", kind, 3) for kind in kinds))
    assert loads == [f"x:{kind}:3" for kind in kinds]
    computed = ("fisedit.norm_record", FLAT, 3)
    assert list(stored.values())[1:] == [("getitem", computed, number) for number in (2, 1, 0)]
    assert len([node for node in calls(record) if node.target is torch.ops.fisedit.norm_record.default]) == 1
    assert sites[1:] == (
        Site("x:norm_totals:3", "value", None, (), 0, (2, 2, 3), torch.float32),
        Site("x:norm_partials:3", "spatial", DOMAIN, (0, 1, 2, 3), 1, (2, 20, 2, 3), torch.float32, lossless=True),
        Site("x:norm_center:3", "value", None, (), 0, (2, 3), torch.float32),
    )


def test_condition_2_statistics_are_float32_whatever_the_value() -> None:
    builder = GraphBuilder()
    x = builder.input(2, 6, 5, 4, dtype=torch.float16, spatial="bchw")
    sites, _, _ = run(
        builder.module(builder.call(aten.relu.default, x, spatial="bchw")), ("x", "norm_partials", 2), ("x", "rows")
    )
    assert [site.dtype for site in sites] == [torch.float16, torch.float32, torch.float16]


def test_nothing_is_stored_twice() -> None:
    builder, relu = dense()
    transforms = [
        ("x", "rows"),
        ("x", "rows"),
        ("x", "norm_center", 3),
        ("x", "norm_center", 3),
        ("x", "norm_center", 6),
    ]
    sites, _, loads = run(builder.module(relu), *transforms)
    assert loads == ["x:rows", "x:rows", "x:norm_center:3", "x:norm_center:3", "x:norm_center:6"]
    assert [site.name for site in sites[1:]] == ["x:rows", "x:norm_center:3", "x:norm_center:6"]


def test_sites_are_named_after_the_module_of_their_value() -> None:
    builder, relu = dense()
    relu.meta["module_path"] = "down.0.norm"
    name, record = relu.name, builder.module(relu)
    sites, stored, loads = run(record, (name, "rows"), ("x", "rows"), (name, "norm_center", 2))
    assert loads == [f"down.0.norm:{name}:rows", "x:rows", f"down.0.norm:{name}:norm_center:2"]
    assert [site.name for site in sites[1:]] == loads


def test_updates_follow_their_recorded_values() -> None:
    builder = GraphBuilder()
    x = builder.picture()
    kept = builder.marker(recorded, "x", "rows")
    rows = builder.marker(aten.neg.default, x)
    builder.marker(update, kept, rows)
    edited = builder.module(builder.marker(aten.neg.default, kept))
    record, relu = dense()
    insert_cache_ops(Compilation(edited, record=record.module(relu)))
    assert updates(edited) == [(("load", "x:rows"), ("aten.neg", "x"))]
    assert kept.target is load


def test_a_value_that_is_not_spatial_cannot_be_recorded() -> None:
    builder, relu = dense(spatial=None)
    with pytest.raises(GraphError, match="the value x to be recorded is not spatial"):
        run(builder.module(relu), ("x", "rows"))
