"""propagate_domains: which inputs are spatial, and what every operator's output is."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from fisedit_compile.options import Options
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.family import Family
from fisedit_compile.passes.common.report import Report
from fisedit_compile.passes.domains.propagate_domains import BEHIND, UNKNOWN, find_spatial_inputs, propagate_domains
from fisedit_compile.passes.manager import families
from fisedit_compile.runtime.spec import Domain
from support.graphs import DOMAIN, GraphBuilder, aten, layout, reasons, text

CONV = aten.conv2d.default


def run(builder: GraphBuilder, *results, kinds=None) -> Report:
    module, kinds = builder.module(*results), families(Options()) if kinds is None else kinds
    first, second = (Compilation(module, tuple(builder.infos), families=tuple(kinds)) for _ in range(2))
    propagate_domains(first)
    again = text(module)
    propagate_domains(second)
    assert text(module) == again, "a second run changes the graph"
    return first.report


def convolved(builder: GraphBuilder, x, out: int = 6):
    """A 3x3 convolution that keeps the resolution."""
    return builder.call(CONV, x, builder.parameter(out, x.meta["val"].shape[1], 3, 3), None, [1, 1], [1, 1])


def test_a_picture_that_reaches_a_convolution_is_spatial() -> None:
    builder = GraphBuilder()
    x = builder.input(2, 6, 5, 4)
    active = builder.call(aten.silu.default, x)
    y = convolved(builder, active, out=3)
    report = run(builder, y)
    assert [node.meta.get("spatial") for node in (x, active, y)] == [layout("bchw")] * 3
    assert all(node.meta["origin"] == node.name for node in builder.graph.nodes)
    assert not any("dense_reason" in node.meta for node in builder.graph.nodes)
    assert report.matches["propagate_domains"] == 1 and report.misses == []
    assert report.connections == {("5x4", "5x4", "rows"): 1, ("5x4", "5x4", "stencil"): 1}


POSITIONS = "it is not a floating tensor with more than one position"


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((2, 6, 5, 4), torch.int64, POSITIONS),
        ((2, 6, 1, 1), torch.float32, POSITIONS),
        ((3, 6, 5, 4), torch.float32, "its batch is 3, not 2"),
    ],
)
def test_conditions_1_and_3_inputs_of_rank_four_that_are_not_spatial_say_why(shape, dtype, reason) -> None:
    builder = GraphBuilder()
    x, other = builder.input(2, 6, 5, 4), builder.input(*shape, name="other", dtype=dtype)
    cast = builder.call(aten.to.dtype, other, torch.float32)
    report = run(builder, convolved(builder, x), convolved(builder, cast))
    assert "spatial" in x.meta and "spatial" not in other.meta and "spatial" not in cast.meta
    assert reasons(report, "propagate_domains") == [reason]
    assert report.misses[0].node == "other"


@pytest.mark.parametrize("shape", [(2, 6, 1, 4), (2, 6, 5, 1)])
@pytest.mark.parametrize("anchored", [True, False])
def test_condition_2_a_single_row_or_column_needs_an_anchor(shape, anchored) -> None:
    builder = GraphBuilder()
    x = builder.input(*shape)
    y = convolved(builder, x) if anchored else builder.call(aten.relu.default, x)
    report = run(builder, y)
    assert ("spatial" in x.meta) is ("spatial" in y.meta) is anchored
    expected = "it is a single row or column and reaches no convolution, norm or resampling"
    assert reasons(report) == ([] if anchored else [expected])


def test_condition_2_other_pictures_need_none() -> None:
    builder = GraphBuilder()
    x = builder.input(2, 6, 5, 4)
    y = builder.call(aten.relu.default, x)
    assert run(builder, y).misses == [] and y.meta["spatial"] == layout("bchw")


@pytest.mark.parametrize("named", [True, False])
def test_condition_2_the_mask_of_an_attention_is_not_spatial(named) -> None:
    builder = GraphBuilder()
    x, bias = builder.input(2, 6, 7, 4), builder.input(2, 3, 7, 7, name="bias")
    scaled = builder.call(aten.mul.Tensor, bias, 2.0)
    query = builder.input(2, 3, 7, 4, name="query")
    key = builder.input(2, 3, 7, 4, name="key", kind="parameter")
    target = aten.scaled_dot_product_attention.default
    if named:
        attention = builder.call(target, query, key, key, attn_mask=scaled)
    else:
        attention = builder.call(target, query, key, key, scaled)
    report = run(builder, convolved(builder, x), attention)
    assert "spatial" not in bias.meta and "spatial" not in scaled.meta and "spatial" in query.meta
    assert [(miss.node, miss.reason) for miss in report.misses] == [("bias", "it is the mask of an attention")]


def test_condition_2_a_picture_that_is_also_a_mask_is_a_picture() -> None:
    builder = GraphBuilder()
    x = builder.input(2, 3, 7, 7)
    query = builder.input(2, 3, 7, 4, name="query", kind="parameter")
    attention = builder.call(aten.scaled_dot_product_attention.default, query, query, query, x)
    assert run(builder, convolved(builder, x), attention).misses == [] and "spatial" in x.meta


@pytest.mark.parametrize("kind", ["parameter", "scalar"])
def test_parameters_and_scalars_are_not_looked_at(kind) -> None:
    builder = GraphBuilder()
    x = builder.input(2, 6, 5, 4, kind=kind)
    y = convolved(builder, x)
    report = run(builder, y)
    assert "spatial" not in x.meta and "spatial" not in y.meta and "dense_reason" not in y.meta
    assert report.misses == [] and report.matches["propagate_domains"] == 0


def test_tensors_of_other_ranks_are_not_looked_at() -> None:
    builder = GraphBuilder()
    text_tokens = builder.input(2, 7, 6, name="text")
    report = run(builder, builder.call(aten.linear.default, text_tokens, builder.parameter(3, 6)))
    assert report.misses == [] and "spatial" not in text_tokens.meta


def test_several_inputs_may_have_several_resolutions() -> None:
    builder = GraphBuilder()
    x, hint = builder.input(2, 6, 5, 4), builder.input(2, 3, 10, 8, name="hint")
    results = convolved(builder, x), convolved(builder, hint)
    graph, infos, report = builder.module(*results).graph, builder.infos, Report()
    assert find_spatial_inputs(graph, infos, report) == [x, hint]
    assert report.misses == []


def test_resolutions_follow_convolutions_and_resizing() -> None:
    builder = GraphBuilder()
    x = builder.input(2, 6, 5, 4)
    down = builder.call(CONV, x, builder.parameter(8, 6, 3, 3), None, [2, 2], [1, 1])
    up = builder.call(aten.upsample_nearest2d.vec, down, [5, 4], None)
    tokens = builder.call(aten.flatten.using_ints, builder.call(aten.permute.default, up, [0, 2, 3, 1]), 1, 2)
    report = run(builder, tokens)
    assert down.meta["spatial"] == layout("bchw", Domain(3, 2))
    assert up.meta["spatial"] == layout("bchw")
    assert tokens.meta["spatial"] == layout("bsc")
    assert report.connections["5x4", "3x2", "stencil"] == 1
    assert report.connections["3x2", "5x4", "stencil"] == 1


def test_an_unknown_operator_says_so_and_its_output_is_recognised_by_shape() -> None:
    builder = GraphBuilder()
    x = builder.input(2, 6, 5, 4)
    multiplied = builder.call(aten.cumprod.default, x, 1)
    flat = builder.call(aten.permute.default, builder.call(aten.cumprod.default, multiplied, 1), [0, 2, 3, 1])
    lost = builder.call(aten.diff.default, x, 1, 3)
    report = run(builder, flat, lost, convolved(builder, x))
    assert multiplied.meta["dense_reason"] == lost.meta["dense_reason"] == UNKNOWN
    assert multiplied.meta["spatial"] == layout("bchw")
    assert flat.meta["spatial"] == layout("bhwc") and "dense_reason" not in flat.meta
    assert "spatial" not in lost.meta
    assert report.connections["5x4", "not spatial", "ends locality"] == 1


def test_what_was_made_from_a_map_may_become_one_again() -> None:
    """Behind a value that is not spatial, a value that depends on a map and has the shape of one."""
    builder = GraphBuilder()
    y = convolved(builder, builder.input(2, 6, 5, 4))
    table = builder.input(2, 6, 5, 4, name="table", kind="parameter")
    pooled = builder.call(aten.mean.dim, y, [2, 3])
    gate = builder.call(aten.reshape.default, builder.call(aten.sigmoid.default, pooled), [2, 6, 1, 1])
    again = builder.call(aten.mul.Tensor, gate, table)
    other = builder.call(aten.mul.Tensor, table, table)
    behind = builder.call(aten.relu.default, again)
    run(builder, behind, other)
    assert "spatial" not in gate.meta and gate.meta["dense_reason"] == BEHIND
    assert again.meta["spatial"] == layout("bchw") and again.meta["dense_reason"] == BEHIND
    assert behind.meta["spatial"] == layout("bchw") and "dense_reason" not in behind.meta
    assert "spatial" not in other.meta and "dense_reason" not in other.meta


@pytest.mark.parametrize(
    ("make", "domain"),
    [
        (lambda b, x: b.call(aten.adaptive_avg_pool2d.default, x, [3, 3]), Domain(3, 3)),
        (lambda b, x: b.call(aten.upsample_bicubic2d.vec, x, [7, 9], False, None), Domain(7, 9)),
        (lambda b, x: b.call(aten.constant_pad_nd.default, x, [-1, 0]), Domain(5, 3)),
        (lambda b, x: b.piece(b.call(aten.max_pool2d_with_indices.default, x, [2, 1]), 0), None),
        (lambda b, x: b.call(aten.adaptive_avg_pool2d.default, x, [1, 1]), None),
    ],
)
def test_a_resized_map_is_a_map_without_a_rule(make, domain) -> None:
    builder = GraphBuilder()
    y = convolved(builder, builder.input(2, 6, 5, 4))
    squeezed = builder.call(aten.softmax.int, y, 3)  # a reason, and a map
    resized = make(builder, squeezed)
    run(builder, resized)
    found = resized.meta.get("spatial")
    assert (found if found is None else found.at()) == (None if domain is None else layout("bchw", domain))


def test_a_rule_that_gives_a_reason_leaves_it_on_the_node() -> None:
    builder = GraphBuilder()
    x = builder.input(2, 6, 5, 4)
    y = convolved(builder, x)
    pooled = builder.call(aten.mean.dim, y, [2, 3])
    scaled = builder.call(aten.softmax.int, y, 3)
    run(builder, pooled, scaled)
    assert pooled.meta["dense_reason"] == scaled.meta["dense_reason"] == "it works across positions or samples"
    assert "spatial" not in pooled.meta
    assert scaled.meta["spatial"] == layout("bchw")


def test_pieces_take_their_layouts_from_the_operator_that_makes_them() -> None:
    builder = GraphBuilder()
    y = convolved(builder, builder.input(2, 6, 5, 4))
    halves = builder.call(aten.split.Tensor, y, 4, 1)
    pieces = [builder.piece(halves, number) for number in range(2)]
    greatest = builder.call(aten.max.dim, y, 1, True)
    best = builder.piece(greatest, 0)
    squeezed = builder.call(aten.max.dim, y, 3)
    gone = builder.piece(squeezed, 0)
    run(builder, *pieces, best, gone)
    assert halves.meta["spatial_outputs"] == [layout("bchw")] * 2 and "spatial" not in halves.meta
    assert [piece.meta["spatial"] for piece in pieces] == [layout("bchw")] * 2
    assert greatest.meta["dense_reason"] == UNKNOWN and "spatial" not in greatest.meta
    assert best.meta["spatial"] == layout("bchw")
    assert "spatial" not in gone.meta


def test_a_rule_cannot_change_the_batch() -> None:
    builder = GraphBuilder()
    x = builder.input(2, 6, 5, 4)
    folded = builder.call(aten.reshape.default, x, [4, 3, 5, 4])
    conv = convolved(builder, folded)
    wrong = Family("wrong", lambda target: True, lambda node: layout("bchw"), lambda node, builder: None)
    run(builder, conv, kinds=[wrong])
    assert folded.meta["dense_reason"] == "its batch is not 2"
    assert "spatial" not in folded.meta


def test_without_a_spatial_input_only_origins_are_set() -> None:
    builder = GraphBuilder()
    y = builder.call(aten.relu.default, builder.input(2, 7, 6))
    report = run(builder, y)
    assert [set(node.meta) - {"val"} for node in builder.graph.nodes] == [{"origin"}] * 3
    assert report.matches["propagate_domains"] == 0 and not report.connections


def test_the_first_spatial_input_gives_the_batch() -> None:
    builder = GraphBuilder()
    x, other = builder.input(3, 6, 5, 4), builder.input(2, 6, 5, 4, name="other")
    report = run(builder, convolved(builder, x), convolved(builder, other))
    assert x.meta["spatial"].domain == DOMAIN and "spatial" not in other.meta
    assert reasons(report) == ["its batch is 2, not 3"]


def test_an_input_with_channels_last_has_its_own_layout() -> None:
    builder = GraphBuilder()
    x = builder.input(2, 5, 4, 6)
    moved = builder.call(aten.permute.default, x, [0, 3, 1, 2])
    run(builder, convolved(builder, moved))
    assert x.meta["spatial"] == layout("bhwc") and moved.meta["spatial"] == layout("bchw")


def test_a_cropped_map_is_a_map_of_its_own_resolution() -> None:
    builder = GraphBuilder()
    y = convolved(builder, builder.input(2, 6, 5, 4), out=7)
    rows = builder.call(aten.slice.Tensor, y, 2, 1, 4)
    both = builder.call(aten.slice.Tensor, rows, 3, 0, 4, 2)
    behind = convolved(builder, both)
    run(builder, behind)
    domains = [node.meta["spatial"].domain for node in (rows, both, behind)]
    assert [domain.whole for domain in domains] == [Domain(3, 4), Domain(3, 2), Domain(3, 2)]
    assert domains[1] == domains[2] and not any(domain.cover.whole for domain in domains)
    assert all("dense_reason" not in node.meta for node in (rows, both, behind))


def test_what_is_put_together_of_other_dimensions_is_a_map_where_a_convolution_made_it() -> None:
    """No rule knows the reshapes; the resolution is known from the convolution behind them."""
    builder = GraphBuilder()
    y = convolved(builder, builder.input(2, 3, 10, 14), out=3)
    cut = builder.call(aten.reshape.default, y, [2, 3, 5, 2, 2, 7])
    moved = builder.call(aten.permute.default, cut, [0, 1, 3, 4, 2, 5])
    deep = builder.call(aten.reshape.default, moved, [2, 12, 5, 7])
    behind = convolved(builder, deep)
    run(builder, behind)
    # The cut is one into patches of 2x7, but what is put together are not their positions.
    assert cut.meta["spatial"].domain == Domain(5, 2) and moved.meta["spatial"].domain.whole == Domain(2, 5)
    assert "spatial" not in deep.meta and deep.meta["dense_reason"]
    assert behind.meta["spatial"].at() == layout("bchw", Domain(5, 7))


def tokens_of_images(builder: GraphBuilder, *shape: int) -> tuple[fx.Node, fx.Node]:
    """The input of an image prompt, and what a linear layer makes of it."""
    images = builder.input(*shape, name="images")
    return images, builder.call(aten.linear.default, images, builder.parameter(6, shape[-1]))


def test_condition_2_the_tokens_of_images_are_no_picture() -> None:
    builder = GraphBuilder()
    y = convolved(builder, builder.input(2, 6, 5, 4))
    images, behind = tokens_of_images(builder, 2, 3, 7, 8)
    report = run(builder, y, behind)
    assert "spatial" in y.meta and "spatial" not in images.meta and "spatial" not in behind.meta
    expected = "it reaches no convolution, norm or resampling, unlike an input of another size"
    assert [(miss.node, miss.reason) for miss in report.misses] == [("images", expected)]


def test_condition_2_rows_and_columns_are_those_of_the_layout() -> None:
    builder = GraphBuilder()
    images, _ = tokens_of_images(builder, 2, 1, 7, 8)  # one row of seven tokens
    report = run(builder, _)
    assert "spatial" not in images.meta
    assert reasons(report) == ["it is a single row or column and reaches no convolution, norm or resampling"]


def test_condition_2_maps_of_a_known_resolution_need_no_anchor() -> None:
    builder = GraphBuilder()
    y = convolved(builder, builder.input(2, 6, 5, 4))
    other = builder.input(2, 5, 4, 8, name="other")
    behind = builder.call(aten.linear.default, other, builder.parameter(6, 8))
    assert run(builder, y, behind).misses == [] and behind.meta["spatial"] == layout("bhwc")


@pytest.mark.parametrize("returned", [True, False])
def test_a_refused_reshape_that_is_returned_is_a_map(returned) -> None:
    builder = GraphBuilder()
    x = builder.input(2, 6, 5, 12)
    deep = builder.call(aten.conv2d.default, x, builder.parameter(4, 6, 1, 2), None, [1, 2])  # patches of 1x2
    split = builder.call(aten.reshape.default, deep, [2, 2, 2, 5, 6])
    moved = builder.call(aten.permute.default, split, [0, 1, 3, 4, 2])
    joined = builder.call(aten.reshape.default, moved, [2, 2, 5, 12])
    run(builder, joined if returned else builder.call(aten.sum.default, joined))
    assert joined.meta["dense_reason"] == "positions are mixed with channels or split unevenly"
    assert joined.meta.get("spatial") == (layout("bchw", Domain(5, 12)) if returned else None)
