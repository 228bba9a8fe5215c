"""choose_convolution: 3x3 convolutions get more ways to be computed."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fisedit_compile.operators.products.aten import TYPICAL_ROWS
from fisedit_compile.options import Options
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.ir import plan
from fisedit_compile.passes.processor import choose_convolution as module_under_test
from fisedit_compile.passes.processor.choose_convolution import choose_convolution, tile_stencils
from fisedit_compile.runtime.spec import Domain, PlanInput, Stencil
from support.graphs import GraphBuilder, spell

fisedit = torch.ops.fisedit
DOMAIN = Domain(4, 6)
WINDOW = {name: 1 for name in ("stride_y", "stride_x", "padding_y", "padding_x", "dilation_y", "dilation_x")}
WINDOW |= {"kernel_height": 3, "kernel_width": 3}


def convolution(
    builder: GraphBuilder,
    domain: Domain = DOMAIN,
    groups: int = 1,
    kind: str = "window",
    dtype: torch.dtype = torch.float32,
    weight_kind: str = "parameter",
    **window: int,
):
    stencil = Stencil.of(kind, domain, domain, **{**WINDOW, **window})
    rows = builder.input(2, 3, 6, name="rows", dtype=dtype)
    recorded = builder.input(2, domain.size, 6, name="recorded", dtype=dtype)
    halo = builder.input(1, 2, name="halo", dtype=torch.int64)
    table = builder.input(1, 3, 9, name="table", dtype=torch.int64)
    for node, name in ((halo, "halo"), (table, "table")):
        node.meta["plan_input"] = PlanInput(name, stencil)
    weight = builder.input(8, 6 // groups, 3, 3, name="weight", kind=weight_kind, dtype=dtype)
    packed = builder.call(fisedit.pack_conv_weight.default, weight, False, groups)
    return builder.call(fisedit.conv_rows.default, rows, recorded, halo, table, packed, None, groups)


def run(builder: GraphBuilder, node, way: str = "auto", limit: int | None = None):
    module, options = builder.module(node), Options(convolution=way, packing=limit)
    first, second = (Compilation(module, tuple(builder.infos), options) for _ in range(2))
    choose_convolution(first)
    (result,) = next(node for node in module.graph.nodes if node.op == "output").args[0]
    choose_convolution(second)
    assert second.report.matches["choose_convolution"] == 0
    return result, first.report


def plans(nodes) -> list[PlanInput]:
    assert all(node.target is plan for node in nodes)
    return [node.meta["plan_input"] for node in nodes]


def test_tiles() -> None:
    builder = GraphBuilder()
    result, report = run(builder, convolution(builder), "tiles")
    patches, places = tile_stencils(DOMAIN)
    rows, recorded, halo, table, place, subposition, weights, bias = result.args
    assert result.target is fisedit.conv_tiles.default and bias is None
    assert (spell(rows), spell(recorded)) == ("rows", "recorded")
    assert plans([halo, table, place, subposition]) == [
        PlanInput("halo", patches),
        PlanInput("table", patches),
        PlanInput("table", places),
        PlanInput("subposition", places),
    ]
    assert [weight.args[1] for weight in weights] == list(range(16))
    assert {spell(weight.args[0]) for weight in weights} == {("fisedit.pack_tile_weights", "weight", TYPICAL_ROWS // 4)}
    assert report.matches["choose_convolution"] == 1


def test_tiles_read_four_positions_and_cover_four_rows() -> None:
    patches, places = tile_stencils(DOMAIN)
    assert (patches.source, patches.target, patches.taps) == (DOMAIN, Domain(2, 3), 16)
    assert (places.source, places.target, places.taps) == (Domain(2, 3), DOMAIN, 1)


def test_dense() -> None:
    builder = GraphBuilder()
    result, _ = run(builder, convolution(builder), "dense")
    rows, recorded, index, valid, weight, bias, height, width = result.args
    assert result.target is fisedit.conv_dense.default and (height, width, bias) == (4, 6, None)
    assert plans([index, valid]) == [PlanInput("index", DOMAIN), PlanInput("valid", DOMAIN)]
    assert (spell(rows), spell(recorded), spell(weight)) == ("rows", "recorded", "weight")


def test_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "MANY_POSITIONS", 24)
    monkeypatch.setattr(module_under_test, "MANY_CHANNELS", 6)
    builder = GraphBuilder()
    result, report = run(builder, convolution(builder))
    assert result.target is fisedit.conv_choice.default
    rows, recorded, halo, table, packed, bias, tiles, weights, index, valid, weight, height, width = result.args
    assert spell(packed) == ("fisedit.pack_conv_weight", "weight", False, 1) and (height, width) == (4, 6)
    assert len(plans(tiles)) == 4 and len(weights) == 16 and plans([index, valid])[0].kind == "index"
    assert [spell(node) for node in (rows, recorded, halo, table, weight)] == [
        "rows",
        "recorded",
        "halo",
        "table",
        "weight",
    ]
    assert not report.row_convolutions


def test_a_choice_in_half_precision_has_no_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "MANY_POSITIONS", 24)
    monkeypatch.setattr(module_under_test, "MANY_CHANNELS", 6)
    builder = GraphBuilder()
    result, _ = run(builder, convolution(builder, dtype=torch.bfloat16))
    assert result.target is fisedit.conv_choice.default and result.args[7] == []


def test_a_weight_read_twice_is_transformed_once() -> None:
    builder = GraphBuilder()
    first = convolution(builder)
    second = builder.call(fisedit.conv_rows.default, *first.args)
    both = builder.call(torch.ops.aten.add.Tensor, first, second)
    run(builder, both, "tiles")
    transforms = [node for node in builder.graph.nodes if node.target is fisedit.pack_tile_weights.default]
    assert len(transforms) == 1


OTHER = "not a 3x3 kernel with stride, padding and dilation 1 and one group"


@pytest.mark.parametrize(
    ("settings", "way", "reason"),
    [
        ({"kernel_height": 1}, "dense", OTHER),
        ({"stride_x": 2}, "dense", OTHER),
        ({"padding_y": 0}, "dense", OTHER),
        ({"dilation_x": 2}, "dense", OTHER),
        ({"groups": 2}, "dense", OTHER),
        ({"kind": "transposed"}, "dense", OTHER),
        ({"weight_kind": "user"}, "dense", "the weight depends on the inputs"),
        ({"domain": Domain(5, 6)}, "dense", "the map has an odd height or width"),
        ({"domain": Domain(4, 7)}, "tiles", "the map has an odd height or width"),
        ({"dtype": torch.bfloat16}, "tiles", "tiles need float32"),
        ({}, "auto", "rows are as fast with few positions or channels"),
    ],
)
def test_conditions(settings: dict, way: str, reason: str) -> None:
    builder = GraphBuilder()
    result, report = run(builder, convolution(builder, **settings), way)
    assert result.target is fisedit.conv_rows.default and report.row_convolutions == {reason: 1}


BYTES = 8 * 6 * 16 * 4


@pytest.mark.parametrize(("limit", "fits"), [(None, True), (BYTES, True), (BYTES - 1, False), (0, False)])
def test_condition_3_the_limit(limit: int | None, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = GraphBuilder()
    result, report = run(builder, convolution(builder), "tiles", limit)
    assert report.packed_bytes == (BYTES if fits else 0)
    if fits:
        assert result.target is fisedit.conv_tiles.default
    else:
        reason = f"copies of weights would take more than {limit} bytes"
        assert result.target is fisedit.conv_rows.default and report.row_convolutions == {reason: 1}
    monkeypatch.setattr(module_under_test, "MANY_POSITIONS", 24)
    monkeypatch.setattr(module_under_test, "MANY_CHANNELS", 6)
    builder = GraphBuilder()
    result, _ = run(builder, convolution(builder), "auto", limit)
    assert result.target is fisedit.conv_choice.default and len(result.args[7]) == (16 if fits else 0)


def on_device(builder: GraphBuilder, device: str) -> None:
    """Pretend that all values are there."""
    with FakeTensorMode():
        for node in builder.graph.nodes:
            value = node.meta["val"]
            node.meta["val"] = torch.empty(value.shape, dtype=value.dtype, device=device)


@pytest.mark.parametrize("domain", [DOMAIN, Domain(5, 7)])
def test_on_a_gpu_the_choice_has_no_tiles(domain: Domain) -> None:
    builder = GraphBuilder()
    node = convolution(builder, domain=domain)
    on_device(builder, "cuda")
    result, report = run(builder, node)
    assert result.target is fisedit.conv_choice.default
    assert (result.args[6], result.args[7], result.args[11:]) == ([], [], (domain.height, domain.width))
    assert plans(result.args[8:10]) == [PlanInput("index", domain), PlanInput("valid", domain)]
    assert spell(result.args[10]) == "weight" and report.packed_bytes == 0


def test_on_a_gpu_tiles_are_refused() -> None:
    builder = GraphBuilder()
    node = convolution(builder)
    on_device(builder, "cuda")
    result, report = run(builder, node, "tiles")
    assert result.target is fisedit.conv_rows.default
    assert report.row_convolutions == {"tiles are made for processors": 1}


def test_convolutions_on_other_devices_are_passed_over() -> None:
    builder = GraphBuilder()
    node = convolution(builder)
    for other in builder.graph.nodes:
        other.meta["val"] = torch.empty_like(other.meta["val"], device="meta")
    result, report = run(builder, node, "tiles")
    assert result.target is fisedit.conv_rows.default and not report.row_convolutions
