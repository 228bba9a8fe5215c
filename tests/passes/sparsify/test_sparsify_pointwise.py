"""sparsify_pointwise: elementwise operators, and reductions over channels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from fisedit_compile.passes.common.targets import ELEMENTWISE, REDUCTIONS, is_elementwise
from fisedit_compile.passes.sparsify.pointwise import FAMILY, sparsify_pointwise
from fisedit_compile.runtime.spec import Domain
from support.execution import check_masked
from support.graphs import DOMAIN, GraphBuilder, aten, layout, outputs, spell
from support.sparsifying import refused, sparsify, updates

ADD, MUL = aten.add.Tensor, aten.mul.Tensor
ROWS = ("to_rows", "x")


def run(builder: GraphBuilder, *results):
    return sparsify(sparsify_pointwise, FAMILY, builder, *results)


def reasons(builder: GraphBuilder, node) -> list[str]:
    return refused(sparsify_pointwise, FAMILY, builder, node)


@pytest.mark.parametrize(
    ("make", "rows"),
    [
        (lambda b, x: b.call(aten.silu.default, x), ("aten.silu", ROWS)),
        (lambda b, x: b.call(aten.gelu.default, x, approximate="tanh"), ("aten.gelu", ROWS, ("approximate", "tanh"))),
        (lambda b, x: b.call(aten.clamp.default, x, -1, 1), ("aten.clamp", ROWS, -1, 1)),
        (lambda b, x: b.call(aten.to.dtype, x, torch.float16), ("aten.to.dtype", ROWS, torch.float16)),
        (lambda b, x: b.call(ADD, x, x, alpha=2), ("aten.add.Tensor", ROWS, ROWS, ("alpha", 2))),
        (lambda b, x: b.call(MUL, x, 3.0), ("aten.mul.Tensor", ROWS, 3.0)),
        (lambda b, x: b.call(aten.where.ScalarOther, b.call(aten.gt.Scalar, x, 0), x, 0.0), None),
    ],
)
def test_operators_of_one_picture_run_on_rows(make, rows) -> None:
    builder = GraphBuilder()
    node = make(builder, builder.picture())
    module, report = run(builder, node)
    rows = rows or ("aten.where.ScalarOther", ("aten.gt.Scalar", ROWS, 0), ROWS, 0.0)
    assert spell(outputs(module)[0]) == ("to_map", rows)
    assert node.meta["spatial"] == layout("bchw")
    assert updates(module) == [] and report.matches["sparsify_pointwise"] == 1 + (rows[0] == "aten.where.ScalarOther")


def test_two_pictures_of_one_layout() -> None:
    builder = GraphBuilder()
    x, y = builder.picture(), builder.picture(name="y")
    module, _ = run(builder, builder.call(aten.addcmul.default, x, y, x, value=0.5))
    expected = ("aten.addcmul", ROWS, ("to_rows", "y"), ROWS, ("value", 0.5))
    assert spell(outputs(module)[0]) == ("to_map", expected)


INDEX = ("plan", "index", DOMAIN)
GATHER = "fisedit.gather_rows"


@pytest.mark.parametrize(
    ("dims", "shape", "other", "expected"),
    [
        # One value for each channel: a reshape.
        ("bchw", (2, 6, 5, 4), (2, 6, 1, 1), ("aten.reshape", "t", [2, 1, 6])),
        ("bchw", (2, 6, 5, 4), (6, 1, 1), ("aten.reshape", "t", [1, 1, 6])),
        ("bsc", (2, 20, 6), (2, 1, 6), ("aten.reshape", "t", [2, 1, 6])),
        ("bsc", (2, 20, 6), (6,), ("aten.reshape", "t", [1, 1, 6])),
        ("bchw", (2, 6, 5, 4), (1, 1, 1), ("aten.reshape", "t", [1, 1, 1])),
        # Numbers in tensors broadcast as they are.
        ("bchw", (2, 6, 5, 4), (), "t"),
        ("bchw", (2, 6, 5, 4), (1,), "t"),
        # Dimensions of channels in another order than those of rows.
        (
            "cbsc",
            (3, 2, 20, 4),
            (3, 2, 1, 4),
            ("aten.reshape", ("aten.permute", ("aten.reshape", "t", [3, 2, 1, 4]), [1, 2, 0, 3]), [2, 1, 3, 4]),
        ),
        # Values that differ from position to position are gathered.
        (
            "bchw",
            (2, 6, 5, 4),
            (1, 6, 5, 4),
            (
                GATHER,
                (
                    "aten.flatten.using_ints",
                    ("aten.permute", ("aten.expand", "t", [2, 6, 5, 4]), [0, 2, 3, 1]),
                    1,
                    2,
                ),
                INDEX,
            ),
        ),
        (
            "bchw",
            (2, 6, 5, 4),
            (4,),
            (
                GATHER,
                (
                    "aten.flatten.using_ints",
                    ("aten.permute", ("aten.expand", "t", [2, 1, 5, 4]), [0, 2, 3, 1]),
                    1,
                    2,
                ),
                INDEX,
            ),
        ),
        ("bsc", (2, 20, 6), (1, 20, 6), (GATHER, ("aten.expand", "t", [2, 20, 6]), INDEX)),
        ("bsc", (2, 20, 6), (2, 20, 1), (GATHER, "t", INDEX)),
    ],
)
def test_operands_that_are_not_spatial_are_brought_to_rows(dims, shape, other, expected) -> None:
    builder = GraphBuilder()
    x, t = builder.input(*shape, spatial=dims), builder.input(*other, name="t")
    module, _ = run(builder, builder.call(ADD, x, t))
    assert spell(outputs(module)[0]) == ("to_map", ("aten.add.Tensor", ROWS, expected))


def test_a_number_that_is_a_graph_input_stays_as_it_is() -> None:
    builder = GraphBuilder()
    x, number = builder.picture(), builder.number(3)
    module, _ = run(builder, builder.call(aten.clamp.default, builder.call(MUL, x, number), 0, number))
    assert spell(outputs(module)[0]) == ("to_map", ("aten.clamp", ("aten.mul.Tensor", ROWS, "number"), 0, "number"))


@pytest.mark.parametrize(
    ("target", "arguments", "rows", "after"),
    [
        (aten.softmax.int, (1,), (2, None), "bchw"),
        (aten.sum.dim_IntList, ([1],), ([2], False, ("dtype", None)), "bhw"),
        (aten.mean.dim, ([-3], True), ([2], True, ("dtype", None)), "bchw"),
        (aten.amax.default, ([1],), ([2], False), "bhw"),
        (aten.linalg_vector_norm.default, (2.0, [1], True), (2.0, [2], True, ("dtype", None)), "bchw"),
        (aten.cumsum.default, (1,), (2, ("dtype", None)), "bchw"),
    ],
)
def test_reductions_over_channels(target, arguments, rows, after) -> None:
    builder = GraphBuilder()
    node = builder.call(target, builder.picture(), *arguments)
    module, _ = run(builder, node)
    name = str(target).removesuffix(".default")
    assert spell(outputs(module)[0]) == ("to_map", (name, ROWS, *rows))
    assert node.meta["spatial"] == layout(after)


def test_a_reduction_finds_its_dimensions_among_those_of_rows() -> None:
    builder = GraphBuilder()
    node = builder.call(aten.var.correction, builder.input(2, 3, 20, 4, spatial="bcsc"), [3, 1], correction=0)
    module, _ = run(builder, node)
    expected = ("aten.var.correction", ROWS, [2, 3], ("correction", 0), ("keepdim", False))
    assert spell(outputs(module)[0]) == ("to_map", expected)
    assert node.meta["spatial"] == layout("bs")


def test_a_memory_format_of_maps_is_none_of_rows() -> None:
    builder = GraphBuilder()
    x = builder.picture()
    cast = builder.call(aten._to_copy.default, x, dtype=torch.float16, memory_format=torch.channels_last)
    other = builder.call(aten.to.dtype, x, torch.float16, False, False, torch.channels_last)
    module, _ = run(builder, cast, other)
    assert spell(outputs(module)[0]) == ("to_map", ("aten._to_copy", ROWS, ("dtype", torch.float16)))
    assert spell(outputs(module)[1]) == ("to_map", ("aten.to.dtype", ROWS, torch.float16, False, False))


@pytest.mark.parametrize(
    ("shapes", "layouts", "reason"),
    [
        (
            ((2, 6, 5, 4), (2, 6, 5, 4)),
            ("bchw", "bcwh"),
            "operands lie on different resolutions or have their dimensions in different order",
        ),
        (
            ((2, 6, 5, 4), (2, 6, 1, 1)),
            ("bchw", layout("bchw", Domain(1, 1))),
            "operands lie on different resolutions or have their dimensions in different order",
        ),
        (((2, 6, 5, 4), (6, 5, 4)), ("bchw", "bhw"), "operands of different rank broadcast against each other"),
        (((2, 20, 6), (2, 2, 20, 6)), ("bsc", None), "operands of different rank broadcast against each other"),
        (((1, 6, 5, 4), (2, 6, 1, 1)), ("bchw", None), "the batch is broadcast"),
        (
            ((2, 6, 1, 1), (2, 6, 5, 4)),
            (layout("bchw", Domain(1, 1)), None),
            "the positions are broadcast",
        ),
    ],
)
def test_conditions_1_and_2_operands_fit(shapes, layouts, reason) -> None:
    builder = GraphBuilder()
    values = [
        builder.input(*shape, name=name, spatial=dims) for name, shape, dims in zip("xy", shapes, layouts, strict=True)
    ]
    assert reasons(builder, builder.call(ADD, *values)) == [reason]


def test_condition_1_there_is_one_output() -> None:
    builder = GraphBuilder()
    node = builder.call(aten.frexp.Tensor, builder.picture())
    assert reasons(builder, node) == ["it does not return one tensor"]


@pytest.mark.parametrize(
    ("target", "arguments"),
    [
        (aten.softmax.int, (-1,)),
        (aten.mean.dim, ([2, 3],)),
        (aten.sum.dim_IntList, (None,)),
        (aten.amax.default, ()),
        (aten.std.correction, ([0, 1],)),
    ],
)
def test_condition_3_reductions_leave_positions_alone(target, arguments) -> None:
    builder = GraphBuilder()
    node = builder.call(target, builder.picture(), *arguments)
    assert reasons(builder, node) == ["it works across positions or samples"]


def test_a_prelu_finds_its_weights_in_dimension_1() -> None:
    builder = GraphBuilder()
    module, _ = run(builder, builder.call(aten.prelu.default, builder.picture(), builder.parameter(6)))
    scaled = ("aten.mul.Tensor", ROWS, ("aten.reshape", "weight", [-1]))
    assert spell(outputs(module)[0]) == ("to_map", ("aten.where.self", ("aten.gt.Scalar", ROWS, 0), ROWS, scaled))


def test_a_prelu_with_one_weight_broadcasts_it() -> None:
    builder = GraphBuilder()
    module, _ = run(builder, builder.call(aten.prelu.default, builder.tokens(), builder.parameter(1)))
    assert spell(outputs(module)[0]) == ("to_map", ("aten.prelu", ROWS, "weight"))


def test_condition_4_the_weights_of_a_prelu_belong_to_channels() -> None:
    builder = GraphBuilder()
    node = builder.call(aten.prelu.default, builder.tokens(), builder.parameter(20))
    assert reasons(builder, node) == ["the weights of a prelu do not belong to a channel dimension"]


def test_random_and_writing_operators_are_not_elementwise() -> None:
    assert not is_elementwise(aten.bernoulli.default) and not is_elementwise(aten.rand_like.default)
    assert not is_elementwise(aten.add_.Tensor) and not is_elementwise(torch.add)
    assert not is_elementwise(aten.layer_norm.default) and not is_elementwise(aten.softmax.int)
    assert all(map(is_elementwise, ELEMENTWISE)) and not any(map(is_elementwise, REDUCTIONS))


def anchored(builder: GraphBuilder):
    """A picture that is spatial because it is padded by nothing."""
    return builder.call(aten.constant_pad_nd.default, builder.picture(), [0, 0])


@settings(max_examples=15)
@given(st.permutations(range(4)), st.lists(st.booleans(), max_size=4))
def test_any_operand_that_broadcasts_gives_the_masked_dense_result(order, full) -> None:
    builder = GraphBuilder()
    moved = builder.call(aten.permute.default, anchored(builder), list(order))
    sizes = moved.meta["val"].shape
    shape = [size if whole else 1 for size, whole in zip(sizes[len(sizes) - len(full) :], full, strict=True)]
    total = builder.call(ADD, moved, builder.parameter(*shape, name="t"))
    back = builder.call(aten.permute.default, total, [order.index(dim) for dim in range(4)])

    def dense(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (x.permute(order) + t).permute([order.index(dim) for dim in range(4)])

    check_masked(builder, back, dense, batch=2)


@pytest.mark.parametrize(
    ("make", "dense"),
    [
        (lambda b, x: b.call(aten.prelu.default, x, b.parameter(6)), functional.prelu),
        (lambda b, x: b.call(aten.prelu.default, x, b.parameter(1)), functional.prelu),
        (lambda b, x: b.call(aten.softmax.int, x, 1), lambda x: x.softmax(1)),
        (
            lambda b, x: b.call(aten.std.correction, x, [1], correction=1, keepdim=True),
            lambda x: x.std(1, keepdim=True),
        ),
        (lambda b, x: b.call(aten.logsumexp.default, x, [1], True), lambda x: x.logsumexp(1, True)),
        (
            lambda b, x: b.call(
                ADD, b.call(aten.zeros_like.default, x, pin_memory=False, memory_format=torch.channels_last), x
            ),
            lambda x: x,
        ),
        (
            lambda b, x: b.call(aten.where.self, b.call(aten.gt.Scalar, x, 0), x, b.call(MUL, x, 0.1)),
            lambda x: functional.leaky_relu(x, 0.1),
        ),
    ],
)
def test_they_compute_the_masked_dense_result(make, dense) -> None:
    builder = GraphBuilder()
    check_masked(builder, make(builder, anchored(builder)), dense, batch=2)
