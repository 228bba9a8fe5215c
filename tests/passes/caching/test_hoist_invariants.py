"""hoist_invariants: what depends on the step is recorded, what depends on the prompt is marked."""

from __future__ import annotations

import operator

import pytest
import torch

from fisedit_compile.passes.caching import hoist_invariants as module_under_test
from fisedit_compile.passes.caching.hoist_invariants import hoist_invariants
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.deferred import copy_graph
from fisedit_compile.passes.common.ir import store, to_rows
from support.execution import Edit, compile_graph, random_inputs, record, some_mask
from support.graphs import DOMAIN, GraphBuilder, aten, spell
from support.tolerances import assert_identical, assert_near

LINEAR, RELU, ADD = aten.linear.default, aten.relu.default, aten.add.Tensor


def run(builder: GraphBuilder, *results, again: bool = True):
    """The edit graph's results spelled, what the record graph stores, the marked nodes, the compilation."""
    edit = builder.module(*results)
    dense = copy_graph(edit)
    first, second = (Compilation(edit, tuple(builder.infos), record=dense) for _ in range(2))
    hoist_invariants(first)
    stored = {node.args[1]: spell(node.args[0]) for node in dense.graph.nodes if node.target is store}
    assert tuple(stored) == tuple(site.name for site in first.sites)
    marked = {node.meta["invariant"]: spell(node) for node in edit.graph.nodes if "invariant" in node.meta}
    assert first.report.matches["hoist_invariants"] == len(stored) + len(marked)
    if again:
        hoist_invariants(second)
        assert (
            second.sites == ()
            and {node.meta["invariant"]: spell(node) for node in edit.graph.nodes if "invariant" in node.meta} == marked
        )
    (returned,) = next(node for node in edit.graph.nodes if node.op == "output").args
    return [spell(value) for value in returned], stored, marked, first


def test_a_step_is_recorded() -> None:
    builder = GraphBuilder()
    x, step = builder.tokens(), builder.input(6, name="step", kind="scalar")
    embedding = builder.call(RELU, builder.call(LINEAR, step, builder.parameter(6, 6)))
    texts, stored, marked, compilation = run(builder, builder.call(ADD, x, embedding))
    name = f"{embedding.name}:value"
    assert stored == {name: ("aten.relu", ("aten.linear", "step", "weight"))} and marked == {}
    assert texts == [("aten.add.Tensor", "x", ("load", name))]
    (site,) = compilation.sites
    assert (site.kind, site.shape, site.dtype, site.lossless) == ("value", (6,), torch.float32, True)


def test_a_prompt_is_marked() -> None:
    builder = GraphBuilder()
    x, prompt = builder.picture(), builder.input(2, 7, 6, name="prompt")
    keys = builder.call(RELU, builder.call(LINEAR, prompt, builder.parameter(6, 6)))
    rows = builder.marker(to_rows, x)
    texts, stored, marked, _ = run(builder, builder.marker(ADD, rows, keys))
    assert stored == {} and marked == {0: ("aten.relu", ("aten.linear", "prompt", "weight"))}
    assert texts == [("aten.add.Tensor", ("to_rows", "x"), marked[0])]


def test_only_the_last_of_a_chain_is_marked_and_each_that_others_read() -> None:
    builder = GraphBuilder()
    rows = builder.marker(to_rows, builder.picture())
    first = builder.call(RELU, builder.input(2, 7, 6, name="prompt"))
    second = builder.call(aten.neg.default, first)
    third = builder.call(aten.abs.default, second)
    _, _, marked, _ = run(builder, builder.marker(ADD, rows, third), builder.marker(ADD, rows, first))
    assert [text[0] for text in marked.values()] == ["aten.relu", "aten.abs"]


def test_pieces_of_an_operator_with_several_outputs_are_marked() -> None:
    builder = GraphBuilder()
    rows = builder.marker(to_rows, builder.picture())
    pieces = builder.call(aten.split.Tensor, builder.input(2, 8, 6, name="prompt"), 4, 1)
    piece = builder.call(operator.getitem, pieces, 1)
    _, _, marked, _ = run(builder, builder.marker(ADD, rows, piece))
    assert len(marked) == 1 and marked[0][0].endswith("getitem")


def test_condition_1_what_depends_on_step_and_prompt_is_neither() -> None:
    builder = GraphBuilder()
    x, step = builder.picture(), builder.input(6, name="step", kind="scalar")
    mixed = builder.call(ADD, builder.input(2, 7, 6, name="prompt"), step)
    _, stored, marked, _ = run(builder, builder.marker(ADD, builder.marker(to_rows, x), mixed))
    assert (stored, marked) == ({}, {})


def test_condition_1_what_depends_on_the_picture_is_neither() -> None:
    builder = GraphBuilder()
    x = builder.picture()
    _, stored, marked, _ = run(builder, builder.call(RELU, builder.call(aten.neg.default, x)))
    assert (stored, marked) == ({}, {})


def test_condition_1_a_random_operator() -> None:
    builder = GraphBuilder()
    rows = builder.marker(to_rows, builder.picture())
    noise = builder.call(aten.rand_like.default, builder.input(2, 7, 6, name="prompt"))
    _, _, marked, _ = run(builder, builder.marker(ADD, rows, noise))
    assert marked == {}


def test_condition_2_an_input_itself_is_left_alone() -> None:
    builder = GraphBuilder()
    rows = builder.marker(to_rows, builder.picture())
    step, prompt = builder.input(6, name="step", kind="scalar"), builder.input(2, 7, 6, name="prompt")
    _, stored, marked, _ = run(builder, builder.marker(ADD, rows, step), builder.marker(ADD, rows, prompt))
    assert (stored, marked) == ({}, {})


def test_condition_3_a_large_value_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "STEP_BYTES", 23)
    builder = GraphBuilder()
    embedding = builder.call(RELU, builder.input(6, name="step", kind="scalar"))
    _, stored, _, compilation = run(builder, builder.call(ADD, builder.tokens(), embedding))
    assert stored == {} and [miss.reason for miss in compilation.report.misses] == ["it takes 24 bytes"]


def test_condition_3_what_a_pass_made_is_not_recorded() -> None:
    builder = GraphBuilder()
    x, step = builder.tokens(), builder.input(6, name="step", kind="scalar")
    embedding = builder.call(RELU, step)
    total = builder.call(ADD, x, embedding)
    edit = builder.module(total)
    dense = copy_graph(edit)
    with edit.graph.inserting_before(total):
        moved = edit.graph.call_function(aten.reshape.default, (embedding, [1, 1, 6]))
    total.args = (x, moved)
    hoist_invariants(Compilation(edit, tuple(builder.infos), record=dense))
    name = f"{embedding.name}:value"
    assert spell(total) == ("aten.add.Tensor", "x", ("aten.reshape", ("load", name), [1, 1, 6]))


def small() -> tuple[GraphBuilder, torch.fx.Node]:
    """A picture plus a step's embedding, attending to a prompt."""
    builder = GraphBuilder()
    x, step = builder.picture(), builder.input(6, name="step", kind="scalar")
    prompt = builder.input(2, 7, 5, name="prompt")
    embedding = builder.call(LINEAR, step, builder.parameter(6, 6))
    tokens = builder.call(aten.permute.default, builder.call(aten.flatten.using_ints, x, 2, 3), [0, 2, 1])
    tokens = builder.call(ADD, tokens, embedding)
    keys = builder.call(LINEAR, prompt, builder.parameter(6, 5, name="keys"))
    return builder, builder.call(aten.scaled_dot_product_attention.default, tokens, keys, keys)


def test_an_edit_uses_the_recorded_step_and_the_new_prompt() -> None:
    builder, output = small()
    program = compile_graph(builder, output)
    assert program.invariants is not None and program.report.matches["hoist_invariants"] == 2
    first = random_inputs(builder, 1)
    second = random_inputs(builder, 2, fixed=first)
    second[1] = first[1]
    base = record(program, first)
    mask = some_mask(DOMAIN)
    (result,) = Edit(program, base, second, mask).run()
    inside = mask.flatten(1)[:, :, None]
    mixed = torch.where(mask[:, None], second[0], first[0]).flatten(2).transpose(1, 2)
    tokens = mixed + torch.nn.functional.linear(first[1], first[3])
    keys = torch.nn.functional.linear(second[2], first[4])
    expected = torch.nn.functional.scaled_dot_product_attention(tokens, keys, keys)
    assert_near(result, torch.where(inside, expected, base.outputs[0]))
    assert_identical(torch.where(inside, 0, result), torch.where(inside, 0, base.outputs[0]))
    saved = Edit(program, base, second, mask).save()
    (name,) = (name for name in saved.sites if name.endswith(":value"))
    assert_identical(saved.sites[name], base.sites[name])
