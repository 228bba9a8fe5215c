"""pack_weights: constant weights of products are packed, and nothing else."""

from __future__ import annotations

import pytest
import torch

from fisedit_compile.operators.products.aten import TYPICAL_ROWS, packs
from fisedit_compile.options import Options
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.ir import TYPICAL_DENSITY
from fisedit_compile.passes.common.report import Report
from fisedit_compile.passes.processor.pack_weights import pack_weights
from support.execution import compile_graph
from support.graphs import GraphBuilder, aten, spell

fisedit = torch.ops.fisedit
PACK, CONV = fisedit.pack_conv_weight.default, fisedit.conv_rows.default


def run(builder: GraphBuilder, result, limit: int | None = None):
    """The result spelled, and the report."""
    compilation = Compilation(builder.module(result), tuple(builder.infos), Options(packing=limit))
    pack_weights(compilation)
    return spell(result), compilation.report


def convolution(builder: GraphBuilder, groups: int = 1):
    rows, recorded = builder.input(2, 3, 6, name="rows"), builder.input(2, 20, 6, name="recorded")
    halo = builder.input(1, 2, name="halo", dtype=torch.int64)
    table = builder.input(1, 3, 9, name="table", dtype=torch.int64)
    packed = builder.call(PACK, builder.parameter(8, 6 // groups, 3, 3), False, groups)
    return builder.call(CONV, rows, recorded, halo, table, packed, None, groups)


def reasons(report: Report) -> list[str]:
    return [miss.reason for miss in report.misses]


def test_a_linear_layer() -> None:
    builder = GraphBuilder()
    weight, bias = builder.parameter(8, 6), builder.parameter(8, name="bias")
    text, report = run(builder, builder.call(aten.linear.default, builder.tokens(), weight, bias))
    assert text == ("fisedit.linear_rows", "x", ("fisedit.pack_matrix", "weight", 40), "bias")
    assert report.matches["pack_weights"] == 1 and report.packed_bytes == 8 * 6 * 4


def test_a_linear_layer_without_bias() -> None:
    builder = GraphBuilder()
    text, _ = run(builder, builder.call(aten.linear.default, builder.tokens(), builder.parameter(8, 6)))
    assert text == ("fisedit.linear_rows", "x", ("fisedit.pack_matrix", "weight", 40), None)


def test_a_convolution() -> None:
    builder = GraphBuilder()
    text, report = run(builder, convolution(builder))
    weight = ("fisedit.pack_matrix", ("fisedit.pack_conv_weight", "weight", False, 1), TYPICAL_ROWS)
    assert text == ("fisedit.conv_rows", "rows", "recorded", "halo", "table", weight, None, 1)
    assert report.packed_bytes == 8 * 6 * 9 * 4


def test_without_measuring_everything_is_packed() -> None:
    builder = GraphBuilder()
    result = builder.call(aten.linear.default, builder.tokens(), builder.parameter(8, 6))
    pack_weights(Compilation(builder.module(result), tuple(builder.infos), Options(packing=None, pack_all=True)))
    assert spell(result) == ("fisedit.linear_rows", "x", ("fisedit.pack_matrix", "weight"), None)


def test_products_have_as_many_rows_as_edits_are_likely_to_have() -> None:
    builder = GraphBuilder()
    x = builder.picture()
    sizes = [int(size) for size in x.meta["val"].shape]
    window = builder.call(aten.conv2d.default, x, builder.parameter(8, sizes[1], 3, 3), None, [1, 1], [1, 1])
    pointwise = builder.call(aten.conv2d.default, window, builder.parameter(8, 8, 1, 1, name="other"))
    program = compile_graph(builder, pointwise, options=Options(convolution="rows"))
    assert program.prologue is not None
    packings = [node for node in program.prologue.graph.nodes if node.target is fisedit.pack_matrix.default]
    likely = max(1, round(TYPICAL_DENSITY * sizes[2] * sizes[3]))
    # A convolution multiplies sample by sample, a linear layer all rows at once.
    assert [node.args[1] for node in packings] == [likely, sizes[0] * likely]


def test_a_weight_read_twice_is_packed_once() -> None:
    builder = GraphBuilder()
    weight = builder.parameter(6, 6)
    first = builder.call(aten.linear.default, builder.tokens(), weight)
    second = builder.call(aten.linear.default, first, weight)
    _, report = run(builder, second)
    assert first.args[1] is second.args[1] and report.packed_bytes == 6 * 6 * 4
    assert report.matches["pack_weights"] == 2


def test_twice_is_once() -> None:
    builder = GraphBuilder()
    result = builder.call(aten.linear.default, builder.tokens(), builder.parameter(8, 6))
    once, _ = run(builder, result)
    again, report = run(builder, result)
    assert once == again and report.matches["pack_weights"] == 0


def test_condition_1_a_weight_that_is_an_input() -> None:
    builder = GraphBuilder()
    weight = builder.input(8, 6, name="weight")
    text, report = run(builder, builder.call(aten.linear.default, builder.tokens(), weight))
    assert text[0] == "aten.linear" and reasons(report) == ["the weight depends on the inputs"]


def test_condition_1_a_computed_weight() -> None:
    builder = GraphBuilder()
    weight = builder.call(aten.cat.default, [builder.parameter(4, 6), builder.parameter(4, 6, name="other")])
    result = builder.call(aten.linear.default, builder.tokens(), weight)
    del weight.meta["val"]  # as behind a pass that makes nodes
    _, report = run(builder, result)
    assert reasons(report) == ["the weight is computed from parameters"]


def test_condition_1_a_vector() -> None:
    builder = GraphBuilder()
    _, report = run(builder, builder.call(aten.linear.default, builder.tokens(), builder.parameter(6)))
    assert reasons(report) == ["the weight is not a matrix"]


def test_condition_2_a_dtype_without_an_order() -> None:
    builder = GraphBuilder()
    assert not packs("cpu", torch.float64)
    x = builder.input(2, 5, 6, dtype=torch.float64)
    weight = builder.input(8, 6, name="weight", kind="parameter", dtype=torch.float64)
    _, report = run(builder, builder.call(aten.linear.default, x, weight))
    assert reasons(report) == ["no order is known for float64"]


def test_products_on_other_devices_are_passed_over() -> None:
    builder = GraphBuilder()
    result = builder.call(aten.linear.default, builder.tokens(), builder.parameter(8, 6))
    for node in builder.graph.nodes:
        node.meta["val"] = torch.empty_like(node.meta["val"], device="meta")
    text, report = run(builder, result)
    assert text[0] == "aten.linear" and reasons(report) == [] and report.packed_bytes == 0


def test_condition_3_autocast() -> None:
    builder = GraphBuilder()
    result = builder.call(aten.linear.default, builder.tokens(), builder.parameter(8, 6))
    with torch.autocast("cpu", torch.bfloat16):
        _, report = run(builder, result)
    assert reasons(report) == ["autocast is on"]


def test_condition_4_groups() -> None:
    builder = GraphBuilder()
    _, report = run(builder, convolution(builder, groups=2))
    assert reasons(report) == ["a convolution with groups"]


@pytest.mark.parametrize(("limit", "packed"), [(8 * 6 * 4 - 1, 0), (8 * 6 * 4, 1), (2 * 8 * 6 * 4 + 100, 2)])
def test_condition_5_the_limit(limit: int, packed: int) -> None:
    builder = GraphBuilder()
    x = builder.tokens()
    first = builder.call(aten.linear.default, x, builder.parameter(8, 6))
    second = builder.call(aten.linear.default, x, builder.parameter(8, 6, name="other"))
    _, report = run(builder, builder.call(aten.add.Tensor, first, second), limit)
    assert report.matches["pack_weights"] == packed and report.packed_bytes <= limit
    assert reasons(report) == [f"packed weights would take more than {limit} bytes"] * (2 - packed)
