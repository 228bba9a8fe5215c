"""convolve_maps: recorded and dense calls get the transformed weights of edits."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from fisedit_compile.options import Options
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.ir import store
from fisedit_compile.passes.processor import choose_convolution as choosing
from fisedit_compile.passes.processor.convolve_maps import convolve_maps
from support.execution import Edit, compile_graph, dense_inputs, random_inputs, record, some_mask
from support.graphs import GraphBuilder, aten, calls, outputs, spell
from support.tolerances import assert_near

fisedit = torch.ops.fisedit
CONVOLUTION = ([1, 1], [1, 1], [1, 1], 1)


def edit_graph(name: str = "weight", hoisted: bool = True) -> fx.GraphModule:
    """An edit graph behind ``hoist_parameters`` in which a weight was transformed."""
    graph = fx.Graph()
    transformed = graph.call_function(fisedit.pack_tile_weights.default, (graph.placeholder(name), 20))
    pieces = [graph.call_function(operator.getitem, (transformed, number)) for number in range(16)]
    for number, piece in enumerate(pieces):
        if hoisted:
            piece.meta["hoisted"] = 30 - number
    graph.output(tuple(pieces))
    return fx.GraphModule(torch.nn.Module(), graph)


def record_graph(
    *arguments: object, size: tuple[int, ...] = (2, 6, 4, 8), dtype=torch.float32, kernel: int = 3
) -> tuple[GraphBuilder, fx.Node]:
    """A record graph, still open: a convolution with a bias."""
    builder = GraphBuilder()
    x = builder.picture(*size)
    weight, bias = builder.parameter(8, 6, kernel, kernel), builder.parameter(8, name="bias")
    weight.meta["val"] = weight.meta["val"].to(dtype)
    relu = builder.call(aten.relu.default, x, spatial=x.meta["spatial"])
    with builder.graph.inserting_after(relu):
        node = builder.graph.call_function(aten.conv2d.default, (relu, weight, bias, *(arguments or CONVOLUTION)))
    with builder.mode:
        node.meta.update(val=torch.empty(2, 8, *size[2:]), origin=node.name)
    return builder, node


def run(module: fx.GraphModule, edit: fx.GraphModule | None = None, way: str = "auto"):
    first, second = (
        Compilation(edit or edit_graph(), options=Options(convolution=way), record=module) for _ in range(2)
    )
    convolve_maps(first)
    module.graph.lint()
    convolve_maps(second)
    assert second.dense_inputs == () and second.report.matches["convolve_maps"] == 0
    return outputs(module)[0], first.dense_inputs, first.report


def test_a_choice() -> None:
    builder, node = record_graph()
    result, inputs, report = run(builder.module(node))
    assert result.target is fisedit.conv_map.default
    x, rows, weight, bias, tiles, channels_last = result.args
    assert (spell(x), rows, spell(weight), spell(bias), channels_last) == (
        ("aten.relu", "x"),
        None,
        "weight",
        "bias",
        False,
    )
    assert inputs == tuple(range(30, 14, -1)) and report.matches["convolve_maps"] == 1
    placeholders = [value for value in result.graph.nodes if value.op == "placeholder"]
    assert list(tiles) == placeholders[3:], "behind the inputs that were there, in their order"
    assert result.meta["val"].shape == (2, 8, 4, 8) and result.meta["origin"] == node.name


def test_recorded_rows_are_read() -> None:
    builder, node = record_graph()
    relu = node.args[0]
    moved = builder.call(aten.flatten.using_ints, builder.call(aten.permute.default, relu, [0, 2, 3, 1]), 1, 2)
    rows = builder.call(fisedit.contiguous_rows.default, moved)
    for value in reversed((moved.args[0], moved, rows)):
        relu.append(value)
    builder.graph.call_function(store, (rows, "rows"))
    result, _, _ = run(builder.module(node))
    assert result.args[0] is relu and result.args[1] is rows


def test_tiles_in_any_case() -> None:
    builder, node = record_graph()
    result, inputs, _ = run(builder.module(node), way="tiles")
    assert result.target is fisedit.conv_map_tiles.default and len(inputs) == 16
    x, rows, tiles, bias, channels_last = result.args
    assert (spell(x), rows, len(tiles), spell(bias), channels_last) == (("aten.relu", "x"), None, 16, "bias", False)


def test_the_order_in_memory_is_kept() -> None:
    builder, node = record_graph()
    with builder.mode:
        node.meta["val"] = node.meta["val"].to(memory_format=torch.channels_last)
    assert run(builder.module(node))[0].args[-1] is True


def test_a_weight_read_twice_is_one_input() -> None:
    builder, node = record_graph()
    with builder.graph.inserting_after(node):
        second = builder.graph.node_copy(node)
    module = builder.module(node, second)
    _, inputs, report = run(module)
    assert len(inputs) == 16 and report.matches["convolve_maps"] == 2


@pytest.mark.parametrize("edit", [edit_graph("other"), edit_graph(hoisted=False)], ids=["another", "not hoisted"])
def test_condition_1_a_transformed_weight(edit: fx.GraphModule) -> None:
    builder, node = record_graph()
    result, inputs, report = run(builder.module(node), edit)
    assert result.target is aten.conv2d.default and inputs == () and not report.misses


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (record_graph([2, 2], [1, 1], [1, 1], 1), "not a 3x3 kernel"),
        (record_graph([1, 1], [0, 0], [1, 1], 1), "not a 3x3 kernel"),
        (record_graph([1, 1], [2, 2], [2, 2], 1), "not a 3x3 kernel"),
        (record_graph([1, 1], [1, 1], [1, 1], 2), "not a 3x3 kernel"),
        (record_graph(kernel=5), "not a 3x3 kernel"),
        (record_graph(size=(2, 6, 5, 8)), "odd height or width"),
        (record_graph(size=(2, 6, 4, 7)), "odd height or width"),
        (record_graph(dtype=torch.float64), "different dtypes"),
    ],
)
def test_conditions_2_and_3(graph: tuple[GraphBuilder, fx.Node], reason: str) -> None:
    builder, node = graph
    result, inputs, report = run(builder.module(node))
    assert result.target is aten.conv2d.default and inputs == ()
    (miss,) = report.misses
    assert reason in miss.reason


def test_condition_4_a_result_with_gaps() -> None:
    builder, node = record_graph()
    with builder.mode:
        node.meta["val"] = torch.empty(2, 8, 4, 16)[..., ::2]
    result, _, report = run(builder.module(node))
    assert result.target is aten.conv2d.default and "not contiguous" in report.misses[0].reason


def network() -> tuple[GraphBuilder, fx.Node]:
    """Two convolutions, the second behind a norm."""
    builder = GraphBuilder()
    value = builder.picture(2, 6, 4, 8)
    for width in (6, 8):
        arguments = builder.parameter(width, 6, 3, 3), builder.parameter(width), [1, 1], [1, 1]
        value = builder.call(aten.conv2d.default, value, *arguments)
        value = builder.call(aten.silu.default, builder.call(aten.group_norm.default, value, 2))
    return builder, value


@pytest.mark.parametrize("way", ["auto", "tiles"])
def test_programs_with_it_compute_the_same(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "MANY_POSITIONS", 32)
    monkeypatch.setattr(choosing, "MANY_CHANNELS", 6)
    builder, output = network()
    plain = compile_graph(builder, output, options=Options(convolution="rows"))
    assert plain.dense is None and plain.dense_inputs == ()
    builder, output = network()
    program = compile_graph(builder, output, options=Options(convolution=way))
    wanted = fisedit.conv_map.default if way == "auto" else fisedit.conv_map_tiles.default
    assert program.dense is not None and len(program.dense_inputs) == 32
    for graph_module in (program.record, program.dense):
        assert sum(node.target is wanted for node in calls(graph_module)) == 2
        assert not any(node.target is aten.conv2d.default for node in calls(graph_module))
    assert not any(node.target is fisedit.norm_record.default for node in calls(program.dense))
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
