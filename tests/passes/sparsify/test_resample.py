"""resample: pooling, resizing, padding and pixel shuffling read their taps from rows and halo."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from fisedit_compile.passes.sparsify.resample import FAMILY, resample
from fisedit_compile.runtime.spec import Domain, Stencil
from support.execution import check_masked
from support.graphs import DOMAIN, GraphBuilder, aten, layout, outputs, spell
from support.sparsifying import refused, sparsify, taps, updates

AVERAGE, MAXIMUM, ADAPTIVE = aten.avg_pool2d.default, aten.max_pool2d.default, aten.adaptive_avg_pool2d.default
NEAREST, BILINEAR = aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec


def run(builder: GraphBuilder, *results):
    return sparsify(resample, FAMILY, builder, *results)


def window(target: Domain, kernel, stride, padding=(0, 0), dilation=(1, 1)) -> Stencil:
    return Stencil.of(
        "window",
        DOMAIN,
        target,
        kernel_height=kernel[0],
        kernel_width=kernel[1],
        stride_y=stride[0],
        stride_x=stride[1],
        padding_y=padding[0],
        padding_x=padding[1],
        dilation_y=dilation[0],
        dilation_x=dilation[1],
    )


def check(target, arguments, stencil: Stencil, rows) -> None:
    """The rewrite of one operator on the standard picture."""
    builder = GraphBuilder()
    node = builder.call(target, builder.picture(), *arguments)
    module, report = run(builder, node)
    assert spell(outputs(module)[0]) == ("to_map", rows)
    assert node.meta["spatial"] == layout("bchw", stencil.target)
    assert updates(module) == [(("recorded", "x", "rows"), ("to_rows", "x"))]
    assert report.matches == {"resample": 1}


@pytest.mark.parametrize(
    ("arguments", "stencil", "divisor"),
    [
        (([2],), window(Domain(2, 2), (2, 2), (2, 2)), 4),
        (([3, 2], [1, 2], [1, 0]), window(Domain(5, 2), (3, 2), (1, 2), (1, 0)), 6),
        (([2, 2], [2, 2], [0, 0], False, True, 3), window(Domain(2, 2), (2, 2), (2, 2)), 3),
        # Windows that reach beyond the map divide by what is inside.
        (([2, 2], [2, 2], [0, 0], True), window(Domain(3, 2), (2, 2), (2, 2)), None),
        (([3, 3], [2, 2], [1, 1], False, False), window(Domain(3, 2), (3, 3), (2, 2), (1, 1)), None),
    ],
)
def test_average_pooling(arguments, stencil, divisor) -> None:
    total = ("aten.sum.dim_IntList", taps(stencil), [2])
    inside = ("aten.unsqueeze", ("plan", "inside", stencil), 2)
    rows = ("aten.div.Tensor", total, inside) if divisor is None else ("aten.div.Scalar", total, divisor)
    check(AVERAGE, arguments, stencil, rows)


def test_max_pooling_reads_minus_infinity_outside() -> None:
    stencil = window(Domain(3, 2), (3, 3), (2, 2), (1, 1))
    check(MAXIMUM, ([3, 3], [2, 2], [1, 1]), stencil, ("aten.amax", taps(stencil, -math.inf), [2]))


def test_adaptive_pooling_is_pooling_with_equal_windows() -> None:
    stencil = window(Domain(1, 2), (5, 2), (5, 2))
    total = ("aten.sum.dim_IntList", taps(stencil), [2])
    check(ADAPTIVE, ([1, 2],), stencil, ("aten.div.Scalar", total, 10))


@pytest.mark.parametrize(
    ("target", "arguments", "scales"),
    [
        (NEAREST, ([7, 9], None), (0.0, 0.0)),
        (NEAREST, (None, [1.4, 2.25]), (1.4, 2.25)),
        (aten.upsample_nearest2d.default, ([7, 9], 1.4, None), (1.4, 0.0)),
    ],
)
def test_nearest_resizing_reads_one_tap(target, arguments, scales) -> None:
    stencil = Stencil.of("nearest", DOMAIN, Domain(7, 9), scale_y=scales[0], scale_x=scales[1])
    check(target, arguments, stencil, ("aten.select.int", taps(stencil), 2, 0))


@pytest.mark.parametrize("corners", [True, False])
def test_bilinear_resizing_weighs_four_taps(corners) -> None:
    stencil = Stencil.of("bilinear", DOMAIN, Domain(7, 9), align_corners=corners, scale_y=0.0, scale_x=0.0)
    weights = ("aten.to.dtype", ("aten.unsqueeze", ("plan", "weights", stencil), 3), torch.float32)
    rows = ("aten.sum.dim_IntList", ("aten.mul.Tensor", taps(stencil), weights), [2])
    check(BILINEAR, ([7, 9], corners, None), stencil, rows)


@pytest.mark.parametrize(
    ("target", "arguments", "mode", "amounts", "fill"),
    [
        (aten.constant_pad_nd.default, ([1, 0, 2, 1], 0.5), "constant", (1, 0, 2, 1), 0.5),
        (aten.constant_pad_nd.default, ([1, 2],), "constant", (1, 2, 0, 0), 0.0),
        (aten.pad.default, ([0, 1, 0, 1],), "constant", (0, 1, 0, 1), 0.0),
        (aten.pad.default, ([1, 1, 1, 1], "reflect"), "reflect", (1, 1, 1, 1), 0.0),
        (aten.pad.default, ([1, 1, 2, 2], "circular"), "circular", (1, 1, 2, 2), 0.0),
        (aten.reflection_pad2d.default, ([1, 2, 3, 0],), "reflect", (1, 2, 3, 0), 0.0),
        (aten.replication_pad2d.default, ([1, 2, 3, 0],), "replicate", (1, 2, 3, 0), 0.0),
    ],
)
def test_padding_reads_one_tap(target, arguments, mode, amounts, fill) -> None:
    left, right, top, bottom = amounts
    domain = Domain(5 + top + bottom, 4 + left + right)
    stencil = Stencil.of("pad", DOMAIN, domain, left=left, right=right, top=top, bottom=bottom, mode=mode)
    check(target, arguments, stencil, ("aten.select.int", taps(stencil, fill), 2, 0))


def test_a_pixel_shuffle_selects_channels() -> None:
    builder = GraphBuilder()
    node = builder.call(aten.pixel_shuffle.default, builder.picture(2, 12, 5, 4), 2)
    module, _ = run(builder, node)
    stencil = Stencil.of("pixel_shuffle", DOMAIN, Domain(10, 8), factor=2)
    expected = ("fisedit.pixel_select", taps(stencil), ("plan", "subposition", stencil), 2)
    assert spell(outputs(module)[0]) == ("to_map", expected)


def test_a_pixel_unshuffle_puts_taps_into_channels() -> None:
    builder = GraphBuilder()
    node = builder.call(aten.pixel_unshuffle.default, builder.picture(2, 3, 6, 4), 2)
    module, _ = run(builder, node)
    stencil = Stencil.of("pixel_unshuffle", Domain(6, 4), Domain(3, 2), factor=2)
    moved = ("aten.transpose.int", taps(stencil), 2, 3)
    assert spell(outputs(module)[0]) == ("to_map", ("aten.flatten.using_ints", moved, 2, 3))


@pytest.mark.parametrize(
    ("target", "arguments"),
    [(MAXIMUM, ([2],)), (NEAREST, ([8, 10], None)), (ADAPTIVE, ([1, 1],))],
)
@pytest.mark.parametrize("dims", ["bhwc", "bcwh", None])
def test_condition_1_the_input_is_a_picture(target, arguments, dims) -> None:
    builder = GraphBuilder()
    node = builder.call(target, builder.input(2, 6, 5, 4, spatial=dims), *arguments)
    assert refused(resample, FAMILY, builder, node) == [
        "the input is not a spatial value with dimensions (batch, channel, height, width)"
    ]


@pytest.mark.parametrize("dims", ["bsc", None])
def test_condition_1_what_is_padded_has_rows_and_columns(dims) -> None:
    builder = GraphBuilder()
    x = builder.input(2, 20, 6, spatial=dims)
    assert refused(resample, FAMILY, builder, builder.call(aten.constant_pad_nd.default, x, [0, 0, 1, 1])) == [
        "the input is not a spatial value with dimensions (batch, channel, height, width)"
    ]


@pytest.mark.parametrize(
    ("dims", "amounts"), [("bhwc", [0, 0, 1, 2, -1, 3]), ("bchw", [1, 2, -1, 3]), ("bchw", [1, 2])]
)
def test_a_pad_may_have_any_dimensions_and_remove_positions(dims, amounts) -> None:
    builder = GraphBuilder()
    sizes = dict(zip(dims, (2, 5, 4, 6), strict=True))
    source = Domain(sizes["h"], sizes["w"])
    x = builder.input(2, 5, 4, 6, spatial=layout(dims, source))
    module, _ = run(builder, builder.call(aten.constant_pad_nd.default, x, amounts))
    top, bottom = (-1, 3) if len(amounts) > 2 else (0, 0)
    target = Domain(source.height + top + bottom, source.width + 3)
    stencil = Stencil.of("pad", source, target, left=1, right=2, top=top, bottom=bottom, mode="constant")
    assert spell(outputs(module)[0]) == ("to_map", ("aten.select.int", taps(stencil), 2, 0))


PADDED = "it pads other dimensions than height and width"


@pytest.mark.parametrize(
    ("target", "arguments", "reason"),
    [
        (AVERAGE, ([2], [2], [1], True), "the output size is rounded up while padding is counted"),
        (aten.constant_pad_nd.default, ([0, 0, 0, 0, 1, 1],), PADDED),
        (aten.pad.default, ([1, 1, -1, 2], "circular"), "a pad of mode circular that removes positions"),
        (ADAPTIVE, ([2, 2],), "an adaptive pooling with windows of different sizes"),
        (ADAPTIVE, ([10, 8],), "an adaptive pooling with windows of different sizes"),
    ],
)
def test_conditions_2_3_and_5(target, arguments, reason) -> None:
    builder = GraphBuilder()
    node = builder.call(target, builder.picture(), *arguments)
    assert refused(resample, FAMILY, builder, node) == [reason]


def test_condition_5_windows_are_small() -> None:
    builder = GraphBuilder()
    node = builder.call(ADAPTIVE, builder.picture(2, 6, 9, 16), [1, 2])
    assert refused(resample, FAMILY, builder, node) == ["a pooling window of 72 positions, more than 64"]


@pytest.mark.parametrize(
    ("target", "arguments"), [(ADAPTIVE, ([1, 1],)), (AVERAGE, ([5, 4],)), (MAXIMUM, ([5, 4], [1, 1]))]
)
def test_condition_4_the_whole_map_is_no_window(target, arguments) -> None:
    builder = GraphBuilder()
    node = builder.call(target, builder.picture(), *arguments)
    assert refused(resample, FAMILY, builder, node) == ["it pools the whole map"]


@pytest.mark.parametrize(
    ("make", "dense"),
    [
        (
            lambda b, x: b.call(AVERAGE, x, [3, 2], [1, 2], [1, 0]),
            lambda x: functional.avg_pool2d(x, (3, 2), (1, 2), (1, 0)),
        ),
        (
            lambda b, x: b.call(AVERAGE, x, [2, 2], [2, 2], [0, 0], True),
            lambda x: functional.avg_pool2d(x, 2, ceil_mode=True),
        ),
        (
            lambda b, x: b.call(AVERAGE, x, [3, 3], [2, 2], [1, 1], True, False),
            lambda x: functional.avg_pool2d(x, 3, 2, 1, True, False),
        ),
        (
            lambda b, x: b.call(MAXIMUM, x, [3, 3], [2, 2], [1, 1], [1, 1], True),
            lambda x: functional.max_pool2d(x, 3, 2, 1, 1, True),
        ),
        (
            lambda b, x: b.call(MAXIMUM, x, [2, 2], [1, 1], [0, 0], [2, 1]),
            lambda x: functional.max_pool2d(x, 2, 1, 0, (2, 1)),
        ),
        (lambda b, x: b.call(ADAPTIVE, x, [5, 2]), lambda x: functional.adaptive_avg_pool2d(x, (5, 2))),
        (lambda b, x: b.call(NEAREST, x, [7, 9], None), lambda x: functional.interpolate(x, (7, 9))),
        (
            lambda b, x: b.call(NEAREST, x, None, [0.5, 1.3]),
            lambda x: functional.interpolate(x, scale_factor=(0.5, 1.3)),
        ),
        (
            lambda b, x: b.call(BILINEAR, x, [7, 9], True, None),
            lambda x: functional.interpolate(x, (7, 9), mode="bilinear", align_corners=True),
        ),
        (
            lambda b, x: b.call(BILINEAR, x, None, False, [2.0, 0.5]),
            lambda x: functional.interpolate(x, scale_factor=(2.0, 0.5), mode="bilinear"),
        ),
        (
            lambda b, x: b.call(aten.constant_pad_nd.default, x, [1, 0, 2, 1], 0.5),
            lambda x: functional.pad(x, (1, 0, 2, 1), value=0.5),
        ),
        (
            lambda b, x: b.call(aten.pad.default, x, [1, 1, 2, 2], "circular"),
            lambda x: functional.pad(x, (1, 1, 2, 2), "circular"),
        ),
        (
            lambda b, x: b.call(aten.reflection_pad2d.default, x, [1, 2, 3, 0]),
            lambda x: functional.pad(x, (1, 2, 3, 0), "reflect"),
        ),
        (
            lambda b, x: b.call(aten.replication_pad2d.default, x, [1, 2, 3, 0]),
            lambda x: functional.pad(x, (1, 2, 3, 0), "replicate"),
        ),
    ],
)
def test_they_compute_the_masked_dense_result(make, dense) -> None:
    builder = GraphBuilder()
    # A convolution of one position anchors the picture for operators that do not.
    x = builder.call(aten.conv2d.default, builder.picture(), builder.parameter(6, 6, 1, 1))
    node = make(builder, x)
    target = Domain(*node.meta["val"].shape[2:])
    check_masked(builder, node, lambda x, weight: dense(functional.conv2d(x, weight)), batch=2, target=target)


@pytest.mark.parametrize(("factor", "channels", "size"), [(2, 12, (5, 4)), (3, 9, (3, 4))])
def test_pixel_shuffles_compute_the_masked_dense_result(factor, channels, size) -> None:
    builder = GraphBuilder()
    node = builder.call(aten.pixel_shuffle.default, builder.picture(2, channels, *size), factor)
    target = Domain(size[0] * factor, size[1] * factor)
    check_masked(builder, node, lambda x: functional.pixel_shuffle(x, factor), batch=2, target=target)


def test_pixel_unshuffles_compute_the_masked_dense_result() -> None:
    builder = GraphBuilder()
    node = builder.call(aten.pixel_unshuffle.default, builder.picture(2, 3, 6, 4), 2)
    check_masked(builder, node, lambda x: functional.pixel_unshuffle(x, 2), batch=2, target=Domain(3, 2))
