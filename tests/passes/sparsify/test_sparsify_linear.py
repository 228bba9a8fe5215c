"""sparsify_linear: operators within the channels of one position run on the rows as they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fisedit_compile.passes.sparsify.linear import FAMILY, sparsify_linear
from support.execution import check_masked
from support.graphs import GraphBuilder, aten, outputs, spell
from support.sparsifying import refused, sparsify, updates

LINEAR, MATMUL, LAYER, RMS, BATCH = (
    aten.linear.default,
    aten.matmul.default,
    aten.layer_norm.default,
    aten.rms_norm.default,
    aten.batch_norm.default,
)


def batch_norm(builder: GraphBuilder, x, training: bool = False):
    names = ("weight", "bias", "mean", "variance")
    return builder.call(BATCH, x, *(builder.parameter(6, name=name) for name in names), training, 0.1, 1e-3, True)


@pytest.mark.parametrize(
    ("target", "shape", "rest"),
    [(LINEAR, (8, 6), ()), (LINEAR, (8, 6), (None,)), (MATMUL, (6, 8), ())],
)
def test_products_with_a_matrix_run_on_rows(target, shape, rest) -> None:
    builder = GraphBuilder()
    node = builder.call(target, builder.tokens(), builder.parameter(*shape), *rest)
    module, report = sparsify(sparsify_linear, FAMILY, builder, node)
    name = str(target).removesuffix(".default")
    assert spell(outputs(module)[0]) == ("to_map", (name, ("to_rows", "x"), "weight", *rest))
    assert updates(module) == [] and report.matches == {"sparsify_linear": 1}


@pytest.mark.parametrize("target", [LAYER, RMS])
def test_norms_over_channels_run_on_rows(target) -> None:
    builder = GraphBuilder()
    x = builder.input(2, 20, 3, 4, spatial="bscc")
    node = builder.call(target, x, [3, 4], builder.parameter(3, 4), eps=1e-3)
    module, _ = sparsify(sparsify_linear, FAMILY, builder, node)
    name = str(target).removesuffix(".default")
    assert spell(outputs(module)[0]) == ("to_map", (name, ("to_rows", "x"), [3, 4], "weight", ("eps", 1e-3)))


def test_a_batch_norm_finds_its_channels_in_dimension_1() -> None:
    builder = GraphBuilder()
    module, _ = sparsify(sparsify_linear, FAMILY, builder, batch_norm(builder, builder.picture()))
    moved = ("aten.transpose.int", ("to_rows", "x"), 1, 2)
    inner = ("aten.batch_norm", moved, "weight", "bias", "mean", "variance", False, 0.1, 1e-3, True)
    assert spell(outputs(module)[0]) == ("to_map", ("aten.transpose.int", inner, 1, 2))


def reasons(builder: GraphBuilder, node) -> list[str]:
    return refused(sparsify_linear, FAMILY, builder, node)


@pytest.mark.parametrize(
    ("target", "rest", "reason"),
    [
        (LINEAR, (), "the last dimension is not a channel dimension"),
        (MATMUL, (), "the last dimension is not a channel dimension"),
        (LAYER, ([4],), "the normalised dimensions are not all channels"),
        (LAYER, ([5, 4],), "the normalised dimensions are not all channels"),
        (RMS, ([6, 5, 4],), "the normalised dimensions are not all channels"),
    ],
)
def test_condition_1_the_operator_works_on_channels(target, rest, reason) -> None:
    builder = GraphBuilder()
    node = builder.call(target, builder.picture(), *(rest or [builder.parameter(4, 4)]))
    assert reasons(builder, node) == [reason]


def test_condition_1_a_batch_norm_has_its_channels_in_dimension_1() -> None:
    builder = GraphBuilder()
    node = batch_norm(builder, builder.input(2, 6, 5, 4, spatial="bhwc"))
    assert reasons(builder, node) == ["the channels do not stand alone in dimension 1"]


@pytest.mark.parametrize("target", [LINEAR, MATMUL])
def test_condition_2_no_other_operand_is_spatial(target) -> None:
    builder = GraphBuilder()
    x, other = builder.tokens(), builder.input(6, 6, name="other", spatial="bs")
    assert reasons(builder, builder.call(target, x, other)) == ["an operand other than the first is a spatial value"]


def test_condition_2_the_first_operand_is_spatial() -> None:
    builder = GraphBuilder()
    node = builder.call(MATMUL, builder.parameter(20, 20), builder.tokens())
    assert reasons(builder, node) == ["an operand other than the first is a spatial value"]


@pytest.mark.parametrize(("target", "shape"), [(LINEAR, (6,)), (MATMUL, (6,)), (MATMUL, (2, 6, 8))])
def test_condition_2_the_right_side_is_a_matrix(target, shape) -> None:
    builder = GraphBuilder()
    node = builder.call(target, builder.tokens(), builder.parameter(*shape))
    assert reasons(builder, node) == ["the right side of the product is not a matrix"]


def test_condition_3_a_batch_norm_uses_running_statistics() -> None:
    builder = GraphBuilder()
    assert reasons(builder, batch_norm(builder, builder.picture(), training=True)) == [
        "the statistics are those of the batch"
    ]


def to_tokens(builder: GraphBuilder, x):
    """A picture anchored by a padding of nothing, as tokens [B, S, C]."""
    padded = builder.call(aten.constant_pad_nd.default, x, [0, 0])
    return builder.call(aten.flatten.using_ints, builder.call(aten.permute.default, padded, [0, 2, 3, 1]), 1, 2)


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


@pytest.mark.parametrize(
    ("make", "dense"),
    [
        (lambda b, t: b.call(LINEAR, t, b.parameter(8, 6)), lambda x, w: functional.linear(tokens(x), w)),
        (lambda b, t: b.call(MATMUL, t, b.parameter(6, 8)), lambda x, w: tokens(x) @ w),
        (lambda b, t: b.call(LAYER, t, [6]), lambda x: functional.layer_norm(tokens(x), [6])),
        (lambda b, t: b.call(RMS, t, [6], b.parameter(6)), lambda x, w: functional.rms_norm(tokens(x), [6], w)),
    ],
)
def test_they_compute_the_masked_dense_result(make, dense) -> None:
    builder = GraphBuilder()
    check_masked(builder, make(builder, to_tokens(builder, builder.picture())), dense, 1, flat=True, batch=2)


def test_a_batch_norm_computes_the_masked_dense_result() -> None:
    builder = GraphBuilder()
    x = builder.picture()
    names = ("weight", "bias", "mean")
    rest = [builder.parameter(6, name=name) for name in names]
    variance = builder.constant(torch.arange(1.0, 7.0))
    node = builder.call(BATCH, x, *rest, variance, False, 0.1, 1e-3, True)

    def dense(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor) -> Tensor:
        return functional.batch_norm(x, mean, torch.arange(1.0, 7.0), weight, bias, eps=1e-3)

    check_masked(builder, node, dense, batch=2)
