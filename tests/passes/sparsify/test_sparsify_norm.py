"""sparsify_norm: group and instance norms with exact or recorded statistics."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fisedit_compile.options import Options
from fisedit_compile.passes.sparsify.norm import family, sparsify_norm
from support.execution import Edit, check_masked, compile_graph, random_inputs, record, some_mask
from support.graphs import DOMAIN, GraphBuilder, aten, layout, outputs, spell
from support.sparsifying import refused, sparsify, updates
from support.tolerances import assert_near

GROUP, INSTANCE = aten.group_norm.default, aten.instance_norm.default
EXACT = family(cached=False)
WHERE = "the input is not a spatial value with the channels alone in dimension 1"


def group_norm(builder: GraphBuilder, x, groups: int = 3, affine: bool = True):
    weight, bias = (builder.parameter(6), builder.parameter(6, name="bias")) if affine else (None, None)
    return builder.call(GROUP, x, groups, weight, bias, 1e-4)


def instance_norm(builder: GraphBuilder, x, use_input: bool = True):
    running = (None, None) if use_input else (builder.parameter(6, name="mean"), builder.parameter(6, name="variance"))
    return builder.call(INSTANCE, x, None, None, *running, use_input, 0.1, 1e-3, True)


def plan(kind: str):
    return ("plan", kind, DOMAIN)


def test_exact_statistics_are_updated_by_the_active_rows() -> None:
    builder = GraphBuilder()
    module, report = sparsify(sparsify_norm, EXACT, builder, group_norm(builder, builder.picture()))
    center, partials, totals = (("recorded", "x", f"norm_{name}", 3) for name in ("center", "partials", "totals"))
    fresh = ("fisedit.norm_partials", ("to_rows", "x"), center)
    changed = ("fisedit.norm_totals", totals, partials, fresh, plan("index"), plan("valid"))
    expected = ("fisedit.norm_apply", ("to_rows", "x"), center, changed, "weight", "bias", 1e-4, 40)
    assert spell(outputs(module)[0]) == ("to_map", expected)
    assert updates(module) == [(partials, fresh), (totals, changed)]
    assert report.matches == {"sparsify_norm": 1}


def test_cached_statistics_are_the_recorded_ones() -> None:
    builder = GraphBuilder()
    norm = group_norm(builder, builder.picture(), affine=False)
    module, _ = sparsify(sparsify_norm, family(cached=True), builder, norm, options=Options(norm="cached"))
    center, totals = (("recorded", "x", f"norm_{name}", 3) for name in ("center", "totals"))
    expected = ("fisedit.norm_apply", ("to_rows", "x"), center, totals, None, None, 1e-4, 40)
    assert spell(outputs(module)[0]) == ("to_map", expected)
    assert updates(module) == []


def test_an_instance_norm_has_a_group_for_each_channel() -> None:
    builder = GraphBuilder()
    module, _ = sparsify(sparsify_norm, EXACT, builder, instance_norm(builder, builder.picture()))
    name, _, center, _, *rest = spell(outputs(module)[0])[1]
    assert (name, center) == ("fisedit.norm_apply", ("recorded", "x", "norm_center", 6))
    assert rest == [None, None, 1e-3, 20]


def test_flattened_positions_are_normalised_alike() -> None:
    builder = GraphBuilder()
    norm = group_norm(builder, builder.input(2, 6, 20, spatial="bcs"))
    module, _ = sparsify(sparsify_norm, EXACT, builder, norm)
    assert spell(outputs(module)[0])[1][-1] == 40
    assert outputs(module)[0].meta["spatial"] == layout("bcs")


@pytest.mark.parametrize(
    ("dims", "shape"), [("bhwc", (2, 6, 5, 4)), ("bcchw", (2, 6, 1, 5, 4)), ("bsc", (2, 6, 4)), (None, (2, 6, 5, 4))]
)
def test_condition_1_the_channels_stand_alone_in_dimension_1(dims, shape) -> None:
    builder = GraphBuilder()
    norm = group_norm(builder, builder.input(*shape, spatial=dims))
    assert refused(sparsify_norm, EXACT, builder, norm) == [WHERE]


@pytest.mark.parametrize("position", [2, 3])
def test_condition_2_weight_and_bias_are_not_spatial(position) -> None:
    builder = GraphBuilder()
    norm = group_norm(builder, builder.picture())
    norm.args[position].meta["spatial"] = layout("bchw")
    assert refused(sparsify_norm, EXACT, builder, norm) == ["weight or bias is a spatial value"]


def test_condition_3_the_statistics_come_from_the_input() -> None:
    builder = GraphBuilder()
    norm = instance_norm(builder, builder.picture(), use_input=False)
    assert refused(sparsify_norm, EXACT, builder, norm) == ["the statistics are running ones"]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_exact_norms_compute_the_masked_dense_result(groups, batch) -> None:
    builder = GraphBuilder()
    norm = group_norm(builder, builder.picture(), groups)
    check_masked(builder, norm, lambda x, *affine: functional.group_norm(x, groups, *affine, 1e-4), batch=batch)


def test_instance_norms_compute_the_masked_dense_result() -> None:
    builder = GraphBuilder()
    norm = instance_norm(builder, builder.picture())
    check_masked(builder, norm, lambda x: functional.instance_norm(x, eps=1e-3), batch=2)


def test_cached_norms_use_the_statistics_of_the_recorded_call() -> None:
    builder = GraphBuilder()
    program = compile_graph(builder, group_norm(builder, builder.picture()), options=Options(norm="cached"))
    first = random_inputs(builder, 1)
    second = [first[0] * 3 + 1, *first[1:]]
    base = record(program, first)
    mask = some_mask(DOMAIN)
    (result,) = Edit(program, base, second, mask).run()
    grouped = first[0].view(2, 3, -1)
    mean = grouped.mean(2).repeat_interleave(2, 1)[:, :, None, None]
    variance = grouped.var(2, unbiased=False).repeat_interleave(2, 1)[:, :, None, None]
    weight, bias = (value.view(1, 6, 1, 1) for value in first[1:])
    expected = (second[0] - mean) / torch.sqrt(variance + 1e-4) * weight + bias
    assert_near(result, torch.where(mask[:, None], expected, base.outputs[0]))
