"""multiply_maps: recorded and dense calls get the packed weights of edits."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from fisedit_compile.options import Options
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.report import Report
from fisedit_compile.passes.processor.multiply_maps import multiply_maps
from support.execution import Edit, compile_graph, dense_inputs, random_inputs, record, some_mask
from support.graphs import GraphBuilder, aten, calls, outputs, spell
from support.tolerances import assert_near

fisedit = torch.ops.fisedit


def edit_graph(name: str = "weight", hoisted: bool = True, reordered: bool = False) -> fx.GraphModule:
    """An edit graph behind ``hoist_parameters`` in which a weight was packed."""
    graph = fx.Graph()
    weight = graph.placeholder(name)
    if reordered:
        weight = graph.call_function(fisedit.pack_conv_weight.default, (weight, False, 1))
    packed = graph.call_function(fisedit.pack_matrix.default, (weight, 40))
    if hoisted:
        packed.meta["hoisted"] = 7
    graph.output((packed,))
    return fx.GraphModule(torch.nn.Module(), graph)


def record_graph(biased: bool = True, dtype: torch.dtype = torch.float32) -> tuple[GraphBuilder, fx.Node]:
    """A record graph, still open: a linear layer over tokens."""
    builder = GraphBuilder()
    x = builder.picture(2, 6, 4, 8)
    tokens = builder.call(aten.permute.default, builder.call(aten.flatten.using_ints, x, 2, 3), [0, 2, 1])
    weight, bias = builder.parameter(8, 6), builder.parameter(8, name="bias")
    node = builder.call(aten.linear.default, tokens, weight, *([bias] if biased else []))
    weight.meta["val"] = weight.meta["val"].to(dtype)
    return builder, node


def run(module: fx.GraphModule, edit: fx.GraphModule | None = None) -> tuple[fx.Node, tuple[int, ...], Report]:
    first, second = (Compilation(edit or edit_graph(), record=module) for _ in range(2))
    multiply_maps(first)
    module.graph.lint()
    multiply_maps(second)
    assert second.dense_inputs == () and second.report.matches["multiply_maps"] == 0
    return outputs(module)[0], first.dense_inputs, first.report


@pytest.mark.parametrize("biased", [True, False])
def test_a_linear_layer(biased: bool) -> None:
    builder, node = record_graph(biased)
    result, inputs, report = run(builder.module(node))
    tokens = ("aten.permute", ("aten.flatten.using_ints", "x", 2, 3), [0, 2, 1])
    assert spell(result) == ("fisedit.linear_map", tokens, "weight", "hoisted_7", "bias" if biased else None)
    assert inputs == (7,) and report.matches["multiply_maps"] == 1
    placeholders = [value.name for value in result.graph.nodes if value.op == "placeholder"]
    assert placeholders == ["x", "weight", "bias", "hoisted_7"], "behind the inputs that were there"
    assert result.meta["val"].shape == (2, 32, 8) and result.meta["origin"] == node.name


def test_a_weight_read_twice_is_one_input() -> None:
    builder, node = record_graph()
    with builder.graph.inserting_after(node):
        second = builder.graph.node_copy(node)
    module = builder.module(node, second)
    _, inputs, report = run(module)
    assert inputs == (7,) and report.matches["multiply_maps"] == 2


@pytest.mark.parametrize(
    "edit",
    [edit_graph("other"), edit_graph(hoisted=False), edit_graph(reordered=True)],
    ids=["another weight", "not hoisted", "no input"],
)
def test_condition_1_a_packed_weight(edit: fx.GraphModule) -> None:
    builder, node = record_graph()
    result, inputs, report = run(builder.module(node), edit)
    assert result.target is aten.linear.default and inputs == () and not report.misses


def test_condition_2_one_dtype() -> None:
    builder, node = record_graph(dtype=torch.bfloat16)
    result, inputs, report = run(builder.module(node))
    assert result.target is aten.linear.default and inputs == ()
    (miss,) = report.misses
    assert "different dtypes" in miss.reason


def network() -> tuple[GraphBuilder, fx.Node]:
    """Two linear layers over tokens, the second of which reads a weight that the first reads too."""
    builder = GraphBuilder()
    x = builder.picture(2, 6, 4, 8)
    value = builder.call(aten.permute.default, builder.call(aten.flatten.using_ints, x, 2, 3), [0, 2, 1])
    weight, bias = builder.parameter(6, 6), builder.parameter(6)
    for _ in range(2):
        value = builder.call(aten.silu.default, builder.call(aten.linear.default, value, weight, bias))
    value = builder.call(aten.linear.default, value, builder.parameter(5, 6))
    return builder, value


def test_programs_with_it_compute_the_same() -> None:
    builder, output = network()
    plain = compile_graph(builder, output, options=Options(packing=0))
    assert plain.dense is None and plain.dense_inputs == ()
    builder, output = network()
    program = compile_graph(builder, output, options=Options(pack_all=True))
    assert program.dense is not None and len(program.dense_inputs) == 2
    for graph_module in (program.record, program.dense):
        assert sum(node.target is fisedit.linear_map.default for node in calls(graph_module)) == 3
        assert not any(node.target is aten.linear.default for node in calls(graph_module))
    first = random_inputs(builder, 1)
    second = random_inputs(builder, 2, fixed=first)
    base, expected = record(program, first), record(plain, first)
    assert_near(base.outputs[0], expected.outputs[0])
    for name, value in expected.sites.items():
        assert_near(base.sites[name], value)
    with torch.no_grad():
        (dense,) = program.dense(*first, *dense_inputs(program, first))
    assert_near(dense, expected.outputs[0])
    mask = some_mask(program.mask_domain, batch=2)
    assert_near(Edit(program, base, second, mask).run()[0], Edit(plain, expected, second, mask).run()[0])


def test_it_can_be_left_out() -> None:
    builder, output = network()
    options = Options(pack_all=True, disabled_passes=frozenset({"multiply_maps"}))
    assert compile_graph(builder, output, options=options).dense_inputs == ()
