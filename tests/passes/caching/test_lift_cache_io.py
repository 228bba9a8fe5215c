"""lift_cache_io: hidden reads become inputs, hidden writes become outputs."""

from __future__ import annotations

import pytest
import torch

from fisedit_compile.errors import GraphError
from fisedit_compile.passes.caching.lift_cache_io import lift_edit, lift_invariants, lift_stores
from fisedit_compile.passes.common.ir import load, plan, store, update
from fisedit_compile.passes.common.program import GraphInput
from fisedit_compile.passes.common.report import Report
from fisedit_compile.runtime.spec import PlanInput, Site
from support.graphs import DOMAIN, GraphBuilder, aten, names, outputs, spell

RELU, ADD, NEG = aten.relu.default, aten.add.Tensor, aten.neg.default
INDEX = PlanInput("index", DOMAIN)


def spatial_site(name: str) -> Site:
    return Site(name, "spatial", DOMAIN, (0, 1, 2), 1, (2, 20, 6), torch.float32)


def value_site(name: str) -> Site:
    return Site(name, "value", None, (), 0, (2, 6), torch.float32)


def test_stores_become_outputs_in_the_order_of_the_sites() -> None:
    builder = GraphBuilder()
    x = builder.picture()
    relu = builder.call(RELU, x)
    builder.marker(store, relu, "a")
    builder.marker(store, x, "b")
    builder.call(NEG, x)  # nothing reads it
    record, report = builder.module(relu), Report()
    assert lift_stores(record, [spatial_site("b"), spatial_site("a")], report) is record
    assert outputs(record) == (relu, x, relu)
    assert [node.target for node in record.graph.nodes if node.op == "call_function"] == [RELU]
    assert report.matches["lift_cache_io"] == 2
    values = record(torch.tensor([-1.0, 2.0]))
    assert [value.tolist() for value in values] == [[0, 2], [-1, 2], [0, 2]]


def edited() -> tuple[GraphBuilder, dict[str, torch.fx.Node]]:
    """An edit graph: ``relu(x) + packed + load("a")``, gathered, with ``a`` updated by ``relu(x)``."""
    builder = GraphBuilder()
    nodes = {"x": builder.tokens(), "weight": builder.parameter(6)}
    nodes["packed"] = builder.call(NEG, nodes["weight"])
    nodes["packed"].meta["hoisted"] = 0
    nodes["load"] = builder.marker(load, "a", origin="something")
    nodes["index"] = builder.marker(plan, "index", "5x4", plan_input=INDEX)
    nodes["relu"] = builder.call(RELU, nodes["x"])
    nodes["sum"] = builder.call(ADD, nodes["relu"], nodes["packed"])
    nodes["mixed"] = builder.marker(ADD, nodes["sum"], nodes["load"])
    nodes["rows"] = builder.marker(torch.ops.fisedit.gather_rows.default, nodes["mixed"], nodes["index"])
    builder.marker(update, nodes["load"], nodes["relu"])
    return builder, nodes


def test_reads_become_inputs_and_updates_outputs() -> None:
    builder, nodes = edited()
    report = Report()
    edit, save, inputs = lift_edit(builder.module(nodes["rows"]), [spatial_site("a")], report)
    assert inputs == (
        GraphInput("argument", 0),
        GraphInput("hoisted", 0),
        GraphInput("recorded", "a"),
        GraphInput("plan", INDEX),
    )
    placeholders = [node for node in edit.graph.nodes if node.op == "placeholder"]
    assert names(placeholders) == ["argument_x", f"hoisted_{nodes['packed'].name}", "recorded_load", "plan_plan"]
    assert placeholders[0].meta["val"] is nodes["x"].meta["val"] and placeholders[2].meta["origin"] == "something"
    packed, relu = f"hoisted_{nodes['packed'].name}", ("aten.relu", "argument_x")
    mixed = ("aten.add.Tensor", ("aten.add.Tensor", relu, packed), "recorded_load")
    rows = ("fisedit.gather_rows", mixed, "plan_plan")
    assert [spell(value) for value in outputs(edit)] == [rows]
    assert [spell(value) for value in outputs(save)] == [rows, relu]
    assert report.matches["lift_cache_io"] == 4


def test_the_lifted_graphs_run() -> None:
    builder, nodes = edited()
    edit, save, _ = lift_edit(builder.module(nodes["rows"]), [spatial_site("a")], Report())
    x, packed, kept, index = torch.randn(2, 20, 6), torch.randn(6), torch.randn(2, 20, 6), torch.tensor([[3, 1]])
    expected = (x.relu() + packed + kept)[:, [3, 1]]
    torch.testing.assert_close(edit(x, packed, kept, index), (expected,))
    torch.testing.assert_close(save(x, packed, kept, index), (expected, x.relu()))


def test_equal_reads_are_one_input() -> None:
    builder = GraphBuilder()
    loads = [builder.marker(load, "a") for _ in range(2)]
    plans = [builder.marker(plan, "index", "5x4", plan_input=INDEX) for _ in range(2)]
    total = builder.marker(ADD, builder.marker(ADD, *loads), builder.marker(ADD, *plans))
    edit, _, inputs = lift_edit(builder.module(total), [spatial_site("a")], Report())
    assert inputs == (GraphInput("recorded", "a"), GraphInput("plan", INDEX))
    twice = [("aten.add.Tensor", name, name) for name in ("recorded_load", "plan_plan")]
    assert spell(outputs(edit)[0]) == ("aten.add.Tensor", *twice)


def test_what_only_the_prologue_reads_is_no_input() -> None:
    builder, nodes = edited()
    _, _, inputs = lift_edit(builder.module(nodes["rows"]), [spatial_site("a")], Report())
    assert GraphInput("argument", 1) not in inputs


def test_what_only_a_saved_edit_reads_is_an_input_of_both() -> None:
    builder = GraphBuilder()
    x, y = builder.tokens(), builder.tokens(name="y")
    kept = builder.marker(load, "a")
    builder.marker(update, kept, builder.call(NEG, y))
    edit, save, inputs = lift_edit(builder.module(builder.call(RELU, x)), [spatial_site("a")], Report())
    assert inputs == (GraphInput("argument", 0), GraphInput("argument", 1))
    for module in (edit, save):
        assert sum(node.op == "placeholder" for node in module.graph.nodes) == 2
    assert spell(outputs(save)[1]) == ("aten.neg", "argument_y")


def test_sites_without_an_update_are_kept() -> None:
    builder = GraphBuilder()
    relu = builder.call(RELU, builder.tokens())
    _, save, _ = lift_edit(builder.module(relu), [value_site("center"), spatial_site("a")], Report())
    assert outputs(save)[1:] == (None, None)


def test_an_output_that_is_not_spatial_replaces_its_site() -> None:
    builder = GraphBuilder()
    first, second = builder.call(RELU, builder.tokens()), builder.call(NEG, builder.tokens(name="y"))
    _, save, _ = lift_edit(builder.module(first, second), [value_site("output:1"), value_site("output:0")], Report())
    assert [spell(value) for value in outputs(save)[2:]] == [("aten.neg", "argument_y"), ("aten.relu", "argument_x")]


def test_an_output_returned_twice_updates_both_sites() -> None:
    builder = GraphBuilder()
    x = builder.tokens()
    kept, rows = builder.marker(load, "output:0"), builder.call(NEG, x)
    builder.marker(update, kept, rows)
    mixed = builder.marker(ADD, kept, rows)
    sites = [spatial_site("output:0"), spatial_site("output:1")]
    _, save, _ = lift_edit(builder.module(mixed, mixed), sites, Report())
    assert [spell(value) for value in outputs(save)[2:]] == [("aten.neg", "argument_x")] * 2


def test_a_site_of_a_module_called_output_is_no_output() -> None:
    builder = GraphBuilder()
    relu = builder.call(RELU, builder.tokens())
    _, save, _ = lift_edit(builder.module(relu), [spatial_site("output:relu:rows")], Report())
    assert outputs(save)[1:] == (None,)


def test_outputs_that_are_no_tensors_pass() -> None:
    builder = GraphBuilder()
    edit, save, inputs = lift_edit(builder.module(builder.call(RELU, builder.tokens()), None, 3), [], Report())
    assert outputs(edit)[1:] == outputs(save)[1:] == (None, 3) and len(inputs) == 1


def test_an_update_of_an_unknown_site_is_an_error() -> None:
    builder, nodes = edited()
    with pytest.raises(GraphError, match=r"updates of unknown sites: \['a'\]"):
        lift_edit(builder.module(nodes["rows"]), [spatial_site("b")], Report())


def test_invariants_are_a_graph_of_their_own() -> None:
    builder = GraphBuilder()
    x, text, weight = builder.tokens(), builder.input(2, 7, 6, name="text"), builder.parameter(6)
    packed = builder.call(NEG, weight)
    packed.meta["hoisted"] = 0
    second = builder.call(ADD, text, packed)
    first = builder.call(RELU, second)
    second.meta["invariant"], first.meta["invariant"] = 1, 0
    total = builder.marker(ADD, x, builder.marker(ADD, first, second))
    module = builder.module(total)
    invariants, sources = lift_invariants(module)
    assert sources == (GraphInput("argument", 1), GraphInput("hoisted", 0))
    added = ("aten.add.Tensor", "argument_text", f"hoisted_{packed.name}")
    assert [spell(value) for value in outputs(invariants)] == [("aten.relu", added), added]
    edit, _, inputs = lift_edit(module, [], Report())
    assert inputs == (GraphInput("argument", 0), GraphInput("invariant", 1), GraphInput("invariant", 0))
    names = (f"invariant_{first.name}", f"invariant_{second.name}")
    assert spell(outputs(edit)[0]) == ("aten.add.Tensor", "argument_x", ("aten.add.Tensor", *names))


def test_a_graph_without_invariants_has_none() -> None:
    builder = GraphBuilder()
    assert lift_invariants(builder.module(builder.call(RELU, builder.tokens()))) == (None, ())
