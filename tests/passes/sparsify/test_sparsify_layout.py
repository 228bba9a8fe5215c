"""sparsify_layout: moving, joining and cutting dimensions of rows."""

from __future__ import annotations

import operator

import pytest
import torch

from fisedit_compile.passes.sparsify.layout import FAMILY, sparsify_layout
from fisedit_compile.runtime.spec import Domain
from support.execution import check_masked
from support.graphs import GraphBuilder, aten, layout, outputs, spell
from support.sparsifying import refused, sparsify, updates

ROWS = ("to_rows", "x")


def run(builder: GraphBuilder, *results):
    return sparsify(sparsify_layout, FAMILY, builder, *results)


@pytest.mark.parametrize(
    ("shape", "dims", "change", "after", "rows"),
    [
        # Names of dimensions change; rows do not.
        ((2, 6, 5, 4), "bchw", (aten.permute.default, [0, 2, 3, 1]), "bhwc", ROWS),
        ((2, 6, 5, 4), "bchw", (aten.movedim.int, 1, -1), "bhwc", ROWS),
        ((2, 6, 5, 4), "bchw", (aten.flatten.using_ints, 2), "bcs", ROWS),
        ((2, 6, 20), "bcs", (aten.transpose.int, 1, 2), "bsc", ROWS),
        ((2, 20, 6), "bsc", (aten.unflatten.int, 1, [5, 4]), "bhwc", ROWS),
        ((2, 20, 6), "bsc", (aten.reshape.default, [2, 5, 4, 6]), "bhwc", ROWS),
        ((2, 20, 3, 2), "bscc", (aten.transpose.int, 1, 2), "bcsc", ROWS),
        ((2, 6, 5, 4), "bchw", (aten.view.default, [2, 6, 20]), "bcs", ROWS),
        ((2, 6, 5, 4), "bchw", (aten._unsafe_view.default, [2, 6, 20]), "bcs", ROWS),
        # Channels are merged, split, added or permuted.
        ((2, 20, 6), "bsc", (aten.reshape.default, [2, 20, 3, 2]), "bscc", ("aten.reshape", ROWS, [2, -1, 3, 2])),
        ((2, 20, 3, 2), "bscc", (aten.flatten.using_ints, 2), "bsc", ("aten.reshape", ROWS, [2, -1, 6])),
        ((2, 6, 5, 4), "bchw", (aten.unsqueeze.default, -1), "bchwc", ("aten.reshape", ROWS, [2, -1, 6, 1])),
        ((2, 6, 5, 4), "bchw", (aten.unsqueeze.default, 1), "bcchw", ("aten.reshape", ROWS, [2, -1, 1, 6])),
        ((2, 1, 5, 4), "bchw", (aten.squeeze.dim, 1), "bhw", ("aten.reshape", ROWS, [2, -1])),
        ((2, 1, 6, 1, 20), "bcccs", (aten.squeeze.dims, [1, -2]), "bcs", ("aten.reshape", ROWS, [2, -1, 6])),
        ((2, 1, 6, 20), "bccs", (aten.squeeze.default,), "bcs", ("aten.reshape", ROWS, [2, -1, 6])),
        ((2, 6, 5, 4), "bchw", (aten.squeeze.dim, 1), "bchw", ROWS),
        (
            (2, 3, 20, 4),
            "bcsc",
            (aten.permute.default, [0, 3, 1, 2]),
            "bccs",
            ("aten.permute", ROWS, [0, 1, 3, 2]),
        ),
        (
            (2, 3, 20, 4),
            "bcsc",
            (aten.movedim.intlist, [1, 3], [3, 0]),
            "cbsc",
            ("aten.permute", ROWS, [0, 1, 3, 2]),
        ),
        ((2, 1, 20, 4), "bcsc", (aten.expand.default, [2, 3, 20, -1]), "bcsc", ("aten.expand", ROWS, [-1, -1, 3, 4])),
    ],
)
def test_shape_changes(shape, dims, change, after, rows) -> None:
    builder = GraphBuilder()
    target, *arguments = change
    node = builder.call(target, builder.input(*shape, spatial=dims), *arguments)
    module, report = run(builder, node)
    assert node.meta["spatial"] == layout(after)
    assert spell(outputs(module)[0]) == ("to_map", rows)
    assert updates(module) == [] and report.matches == {"sparsify_layout": 1}


@pytest.mark.parametrize("target", [aten.view_as.default, aten.reshape_as.default])
def test_reshapes_by_example(target) -> None:
    builder = GraphBuilder()
    node = builder.call(target, builder.picture(), builder.input(2, 6, 20, name="like"))
    module, _ = run(builder, node)
    assert spell(outputs(module)[0]) == ("to_map", ROWS) and node.meta["spatial"] == layout("bcs")


@pytest.mark.parametrize(
    ("target", "dim", "expected"),
    [(aten.cat.default, 1, 2), (aten.concat.default, -3, 2), (aten.stack.default, 1, 2), (aten.stack.default, -1, 3)],
)
def test_joins_along_channels(target, dim, expected) -> None:
    builder = GraphBuilder()
    x, y = builder.picture(), builder.picture(name="y")
    module, _ = run(builder, builder.call(target, [x, y], dim))
    name = str(target).removesuffix(".default")
    assert spell(outputs(module)[0]) == ("to_map", (name, [ROWS, ("to_rows", "y")], expected))


def test_a_joined_value_that_is_not_spatial_is_gathered() -> None:
    builder = GraphBuilder()
    x, other = builder.picture(), builder.input(2, 3, 5, 4, name="other")
    module, _ = run(builder, builder.call(aten.cat.default, [other, x], 1))
    moved = ("aten.flatten.using_ints", ("aten.permute", "other", [0, 2, 3, 1]), 1, 2)
    gathered = ("fisedit.gather_rows", moved, ("plan", "index", x.meta["spatial"].domain))
    assert spell(outputs(module)[0]) == ("to_map", ("aten.cat", [gathered, ROWS], 2))


@pytest.mark.parametrize(
    ("target", "arguments", "expected"),
    [
        (aten.chunk.default, (2, -3), (2, 2)),
        (aten.split.Tensor, (3, 1), (3, 2)),
        (aten.split.sizes, ([2, 4], 1), ([2, 4], 2)),
        (aten.split_with_sizes.default, ([2, 4], 1), ([2, 4], 2)),
    ],
)
def test_cuts_of_channels(target, arguments, expected) -> None:
    builder = GraphBuilder()
    node = builder.call(target, builder.picture(), *arguments)
    pieces = [builder.piece(node, number) for number in range(2)]
    module, report = run(builder, *pieces)
    cut = (str(target).removesuffix(".default"), ROWS, *expected)
    assert [spell(piece) for piece in outputs(module)] == [
        ("to_map", (operator.getitem.__name__, cut, number)) for number in range(2)
    ]
    assert report.matches == {"sparsify_layout": 1}


def test_unbinding_removes_the_dimension() -> None:
    builder = GraphBuilder()
    node = builder.call(aten.unbind.int, builder.input(2, 20, 3, 4, spatial="bscc"), 2)
    piece = builder.piece(node, 1)
    module, _ = run(builder, piece)
    assert spell(outputs(module)[0]) == ("to_map", ("getitem", ("aten.unbind.int", ROWS, 2), 1))
    assert piece.meta["spatial"] == layout("bsc")


@pytest.mark.parametrize(
    ("change", "after", "rows"),
    [
        ((aten.slice.Tensor, 1, 0, 4, 2), "bchw", ("aten.slice.Tensor", ROWS, 2, 0, 4, 2)),
        ((aten.slice.Tensor, 1, 2), "bchw", ("aten.slice.Tensor", ROWS, 2, 2, None, 1)),
        ((aten.narrow.default, -3, 1, 2), "bchw", ("aten.narrow", ROWS, 2, 1, 2)),
        ((aten.select.int, 1, 3), "bhw", ("aten.select.int", ROWS, 2, 3)),
    ],
)
def test_slices_of_channels(change, after, rows) -> None:
    builder = GraphBuilder()
    target, *arguments = change
    node = builder.call(target, builder.picture(), *arguments)
    module, _ = run(builder, node)
    assert spell(outputs(module)[0]) == ("to_map", rows) and node.meta["spatial"] == layout(after)


@pytest.mark.parametrize(
    ("dims", "shape", "part", "change", "rows"),
    [
        ("bchw", (2, 6, 5, 4), (2, 2, 5, 4), (aten.slice_scatter.default, 1, 0, 2), (2, 0, 2, 1)),
        ("bsc", (2, 20, 6), (2, 20, 3), (aten.slice_scatter.default, -1, 0, 6, 2), (2, 0, 6, 2)),
        ("bcsc", (2, 3, 20, 4), (2, 3, 20, 2), (aten.slice_scatter.default, 3, 2, 4), (3, 2, 4, 1)),
        ("bchw", (2, 6, 5, 4), (2, 5, 4), (aten.select_scatter.default, 1, 3), (2, 3)),
    ],
)
@pytest.mark.parametrize("spatial", ["both", "whole", "part"])
def test_writes_into_channels(dims, shape, part, change, rows, spatial) -> None:
    builder = GraphBuilder()
    target, dim, *arguments = change
    shorter = dims if len(part) == len(shape) else dims[:dim] + dims[dim + 1 :]
    x = builder.input(*shape, name="x", spatial=dims if spatial != "part" else None)
    y = builder.input(*part, name="y", spatial=shorter if spatial != "whole" else None)
    node = builder.call(target, x, y, dim, *arguments)
    module, _ = run(builder, node)
    marker, (written, whole, piece, *places) = spell(outputs(module)[0])
    assert (marker, written, tuple(places)) == ("to_map", str(target).removesuffix(".default"), rows)
    assert whole == ("to_rows", "x") if spatial != "part" else whole[0] == "fisedit.gather_rows"
    assert piece == ("to_rows", "y") if spatial != "whole" else piece[0] == "fisedit.gather_rows"
    assert node.meta["spatial"] == layout(dims) and updates(module) == []


def reasons(builder: GraphBuilder, node) -> list[str]:
    return refused(sparsify_layout, FAMILY, builder, node)


@pytest.mark.parametrize(
    ("shape", "dims", "change", "reason"),
    [
        # 1. Groups of dimensions
        ((2, 20, 6), "bsc", (aten.reshape.default, [40, 6]), "the batch is folded with another dimension"),
        (
            (2, 20, 6),
            "bsc",
            (aten.reshape.default, [2, 120]),
            "positions are mixed with channels or split unevenly",
        ),
        ((1, 20, 6), "bsc", (aten.squeeze.dim, 0), "the batch dimension is lost"),
        # 2. Channels only
        ((2, 20, 6), "bsc", (aten.slice.Tensor, 1, 0, 4), "it cuts along positions or samples"),
        ((2, 20, 6), "bsc", (aten.flip.default, [1]), "it turns samples, or rows and columns as one"),
        ((2, 6, 5, 4), "bchw", (aten.flip.default, [0, 3]), "it turns samples, or rows and columns as one"),
        ((2, 6, 5, 4), "bchw", (aten.roll.default, [3]), "it rolls all dimensions as one"),
        ((2, 6, 5, 4), "bchw", (aten.slice.Tensor, 0, 0, 1), "it cuts along positions or samples"),
        ((2, 6, 5, 4), "bchw", (aten.select.int, 3, 0), "it cuts along positions or samples"),
        ((2, 6, 5, 4), "bchw", (aten.unbind.int, 0), "it cuts along positions or samples"),
        ((1, 6, 5, 4), "bchw", (aten.expand.default, [3, 6, 5, 4]), "expand repeats positions or samples"),
        ((2, 6, 5, 4), "bchw", (aten.expand.default, [3, 2, 6, 5, 4]), "expand adds dimensions"),
    ],
)
def test_conditions_1_and_2(shape, dims, change, reason) -> None:
    builder = GraphBuilder()
    target, *arguments = change
    assert reasons(builder, builder.call(target, builder.input(*shape, spatial=dims), *arguments)) == [reason]


def test_condition_2_what_a_cut_leaves_has_more_than_one_position() -> None:
    builder = GraphBuilder()
    x = builder.input(2, 6, 5, 1, spatial=layout("bchw", Domain(5, 1)))
    assert reasons(builder, builder.call(aten.slice.Tensor, x, 2, 0, 1)) == ["it cuts out single positions"]


def test_condition_2_an_example_that_is_spatial_is_not_enough() -> None:
    builder = GraphBuilder()
    node = builder.call(aten.view_as.default, builder.input(2, 6, 20), builder.picture(name="like"))
    assert reasons(builder, node) == ["the first operand is not a spatial value"]


ORDER = "the joined values lie on different resolutions or have their dimensions in different order"
ALONG = "values are joined along positions or samples"
MAPS = "values are joined along positions, and not all of them are maps with the same dimensions"


@pytest.mark.parametrize(
    ("first", "second", "dim", "reason"),
    [
        (("bchw", (2, 6, 5, 4)), ("bcwh", (2, 6, 5, 4)), 1, ORDER),
        (("bchw", (2, 6, 5, 4)), (None, (2, 6, 5, 4)), 0, ALONG),
        (("bchw", (2, 6, 5, 4)), (None, (2, 6, 5, 4)), -1, MAPS),
        (("bchw", (2, 6, 5, 4)), (None, (0,)), 1, "the joined values differ in rank"),
    ],
)
def test_condition_3_joined_values_agree(first, second, dim, reason) -> None:
    builder = GraphBuilder()
    values = [builder.input(*shape, name=name, spatial=dims) for name, (dims, shape) in (("x", first), ("y", second))]
    assert reasons(builder, builder.call(aten.cat.default, values, dim)) == [reason]


WRITTEN = "what is written lies on another resolution or has its dimensions in different order"


@pytest.mark.parametrize(
    ("part", "dims", "place", "reason"),
    [
        ((2, 6, 2, 4), None, (2, 0, 2), "it writes along positions or samples"),
        ((1, 6, 5, 4), None, (0, 0, 1), "it writes along positions or samples"),
        ((2, 2, 5, 4), "bcwh", (1, 0, 2), WRITTEN),
        ((2, 6, 3, 4), "bchw", (2, 0, 5, 2), "it writes along positions or samples"),
        ((1, 6, 5, 4), "bchw", (0, 0, 1), "it writes along positions or samples"),
    ],
)
def test_conditions_2_and_3_of_writes(part, dims, place, reason) -> None:
    builder = GraphBuilder()
    x, y = builder.input(2, 6, 5, 4, spatial="bchw"), builder.input(*part, name="y", spatial=dims)
    assert reasons(builder, builder.call(aten.slice_scatter.default, x, y, *place)) == [reason]


def anchored(builder: GraphBuilder):
    """A picture that is spatial because it is padded by nothing."""
    return builder.call(aten.constant_pad_nd.default, builder.picture(), [0, 0])


@pytest.mark.parametrize(
    ("make", "dense", "height_dim", "flat"),
    [
        (
            lambda b, x: b.call(
                aten.permute.default, b.call(aten.reshape.default, x, [2, 3, 2, 5, 4]), [0, 2, 3, 4, 1]
            ),
            lambda x: x.reshape(2, 3, 2, 5, 4).permute(0, 2, 3, 4, 1),
            2,
            False,
        ),
        (
            # A channel shuffle: two halves interleaved.
            lambda b, x: b.call(
                aten.reshape.default,
                b.call(aten.transpose.int, b.call(aten.reshape.default, x, [2, 2, 3, 20]), 1, 2),
                [2, 6, 20],
            ),
            lambda x: x.reshape(2, 2, 3, 20).transpose(1, 2).reshape(2, 6, 20),
            2,
            True,
        ),
        (
            lambda b, x: b.call(aten.stack.default, [x, b.call(aten.slice.Tensor, x, 1, 0, 6)], 2),
            lambda x: torch.stack([x, x], 2),
            3,
            False,
        ),
        (
            lambda b, x: b.call(aten.cat.default, [x, b.input(2, 3, 5, 4, name="other")], 1),
            lambda x, other: torch.cat([x, other], 1),
            2,
            False,
        ),
        (
            lambda b, x: b.call(aten.mul.Tensor, *(b.piece(b.call(aten.chunk.default, x, 2, 1), i) for i in (0, 1))),
            lambda x: x[:, :3] * x[:, 3:],
            2,
            False,
        ),
        (
            lambda b, x: b.call(
                aten.expand.default, b.call(aten.select.int, b.call(aten.unsqueeze.default, x, 1), 2, 4), [2, 3, 5, 4]
            ),
            lambda x: x[:, 4:5].expand(2, 3, 5, 4),
            2,
            False,
        ),
        (
            lambda b, x: b.call(aten.slice_scatter.default, x, b.call(aten.slice.Tensor, x, 1, 0, 3), 1, 1, 6, 2),
            lambda x: x.slice_scatter(x[:, 0:3], 1, 1, 6, 2),
            2,
            False,
        ),
    ],
)
def test_they_compute_the_masked_dense_result(make, dense, height_dim, flat) -> None:
    builder = GraphBuilder()
    check_masked(builder, make(builder, anchored(builder)), dense, height_dim, flat, batch=2)
