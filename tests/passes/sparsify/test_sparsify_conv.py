"""sparsify_conv: convolutions become conv_rows, or linear where the kernel is one position."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fisedit_compile.passes.sparsify.convolution import FAMILY, sparsify_conv
from fisedit_compile.runtime.spec import Domain, Stencil
from support.execution import check_masked
from support.graphs import DOMAIN, GraphBuilder, aten, layout, outputs, spell
from support.sparsifying import refused, sparsify, updates

CONV, TRANSPOSED = aten.conv2d.default, aten.conv_transpose2d.input


def stencil(target=DOMAIN, kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), kind="window") -> Stencil:
    """The stencil of a convolution of the standard picture."""
    names = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    values = {}
    for name, (vertical, horizontal) in names.items():
        first, second = ("height", "width") if name == "kernel" else ("y", "x")
        values |= {f"{name}_{first}": vertical, f"{name}_{second}": horizontal}
    return Stencil.of(kind, DOMAIN, target, **values)


def rows_convolution(shape: Stencil, bias=None, groups: int = 1, transposed: bool = False):
    """The spelled result for a convolution of ``x``."""
    return (
        "to_map",
        (
            "fisedit.conv_rows",
            ("to_rows", "x"),
            ("recorded", "x", "rows"),
            ("plan", "halo", shape),
            ("plan", "table", shape),
            ("fisedit.pack_conv_weight", "weight", transposed, groups),
            bias,
            groups,
        ),
    )


def run(builder: GraphBuilder, *results):
    return sparsify(sparsify_conv, FAMILY, builder, *results)


def test_a_convolution_gathers_its_neighbours() -> None:
    builder = GraphBuilder()
    x, weight, bias = builder.picture(), builder.parameter(8, 6, 3, 3), builder.parameter(8, name="bias")
    conv = builder.call(CONV, x, weight, bias, [1, 1], [1, 1])
    module, report = run(builder, conv)
    assert spell(outputs(module)[0]) == rows_convolution(stencil(), "bias")
    assert updates(module) == [(("recorded", "x", "rows"), ("to_rows", "x"))]
    assert report.matches == {"sparsify_conv": 1} and report.misses == []


@pytest.mark.parametrize(
    ("arguments", "weight", "expected"),
    [
        (([2, 2], [1, 1]), (8, 6, 3, 3), stencil(Domain(3, 2), stride=(2, 2))),
        (([1, 2], [2, 0]), (8, 6, 5, 2), stencil(Domain(5, 2), (5, 2), (1, 2), (2, 0))),
        (([1], [2], [2]), (8, 6, 3, 3), stencil(padding=(2, 2), dilation=(2, 2))),
        (([2, 2], [0, 0]), (8, 6, 1, 1), stencil(Domain(3, 2), (1, 1), (2, 2), (0, 0))),
        (([1, 1], [1, 1]), (8, 6, 1, 1), stencil(Domain(7, 6), (1, 1))),
    ],
)
def test_stride_padding_and_dilation_go_into_the_stencil(arguments, weight, expected) -> None:
    builder = GraphBuilder()
    conv = builder.call(CONV, builder.picture(), builder.parameter(*weight), None, *arguments)
    module, _ = run(builder, conv)
    assert spell(outputs(module)[0]) == rows_convolution(expected)
    assert conv.meta["spatial"] == layout("bchw", expected.target)


@pytest.mark.parametrize(
    ("padding", "kernel", "dilation", "expected"),
    [
        ("same", (3, 5), [1, 1], stencil(kernel=(3, 5), padding=(1, 2))),
        ("same", (4, 2), [1, 1], stencil(kernel=(4, 2), padding=(1, 0))),
        ("same", (4, 3), [3, 2], stencil(kernel=(4, 3), padding=(4, 2), dilation=(3, 2))),
        ("valid", (3, 2), [1, 1], stencil(Domain(3, 3), (3, 2), padding=(0, 0))),
    ],
)
def test_padding_by_name(padding, kernel, dilation, expected) -> None:
    builder = GraphBuilder()
    weight = builder.parameter(8, 6, *kernel)
    conv = builder.call(aten.conv2d.padding, builder.picture(), weight, None, [1, 1], padding, dilation)
    module, _ = run(builder, conv)
    assert spell(outputs(module)[0]) == rows_convolution(expected)


def test_groups_and_the_general_overload() -> None:
    builder = GraphBuilder()
    x, weight = builder.picture(), builder.parameter(6, 2, 3, 3)
    arguments = (x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 3)
    module, _ = run(builder, builder.call(aten.convolution.default, *arguments))
    assert spell(outputs(module)[0]) == rows_convolution(stencil(), groups=3)


@pytest.mark.parametrize("general", [False, True])
def test_transposed_convolutions(general) -> None:
    builder = GraphBuilder()
    x, weight = builder.picture(), builder.parameter(6, 4, 3, 3)
    if general:
        arguments = (None, [2, 2], [1, 1], [1, 1], True, [1, 1], 2)
        conv = builder.call(aten.convolution.default, x, weight, *arguments)
    else:
        conv = builder.call(TRANSPOSED, x, weight, None, [2, 2], [1, 1], [1, 1], 2)
    module, _ = run(builder, conv)
    expected = stencil(Domain(10, 8), stride=(2, 2), kind="transposed")
    assert spell(outputs(module)[0]) == rows_convolution(expected, groups=2, transposed=True)


def test_a_kernel_of_one_position_is_linear() -> None:
    builder = GraphBuilder()
    x, weight, bias = builder.picture(), builder.parameter(8, 6, 1, 1), builder.parameter(8, name="bias")
    module, _ = run(builder, builder.call(CONV, x, weight, bias))
    expected = ("aten.linear", ("to_rows", "x"), ("aten.reshape", "weight", [8, 6]), "bias")
    assert spell(outputs(module)[0]) == ("to_map", expected)
    assert updates(module) == []


@pytest.mark.parametrize(("target", "weight", "groups"), [(CONV, (6, 2, 1, 1), 3), (TRANSPOSED, (6, 8, 1, 1), 1)])
def test_other_kernels_of_one_position_are_no_linear_layers(target, weight, groups) -> None:
    builder = GraphBuilder()
    rest = (None, [1, 1], [0, 0], *([[0, 0], groups] if target is TRANSPOSED else [[1, 1], groups]))
    module, _ = run(builder, builder.call(target, builder.picture(), builder.parameter(*weight), *rest))
    assert spell(outputs(module)[0])[1][0] == "fisedit.conv_rows"


def test_convolutions_in_a_row_pass_rows_on() -> None:
    builder = GraphBuilder()
    first = builder.call(CONV, builder.picture(), builder.parameter(6, 6, 1, 1))
    second = builder.call(CONV, first, builder.parameter(6, 6, 3, 3), None, [1, 1], [1, 1])
    module, report = run(builder, second)
    linear = ("aten.linear", ("to_rows", "x"), ("aten.reshape", "weight", [6, 6]), None)
    _, (name, rows, recorded, *_) = spell(outputs(module)[0])
    assert (name, rows, recorded) == ("fisedit.conv_rows", linear, ("recorded", first.name, "rows"))
    assert updates(module) == [(("recorded", first.name, "rows"), linear)]
    assert report.matches == {"sparsify_conv": 2}


NOT_NCHW = "the input is not a spatial value with dimensions (batch, channel, height, width)"


@pytest.mark.parametrize("dims", ["bhwc", "bcwh", "cbhw", None])
def test_condition_1_the_input_is_a_picture(dims) -> None:
    builder = GraphBuilder()
    conv = builder.call(CONV, builder.input(2, 6, 5, 4, spatial=dims), builder.parameter(8, 6, 3, 3))
    assert refused(sparsify_conv, FAMILY, builder, conv) == [NOT_NCHW]


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_condition_2_weight_and_bias_are_not_spatial(name) -> None:
    builder = GraphBuilder()
    x, weight, bias = builder.picture(), builder.parameter(8, 6, 3, 3), builder.parameter(8, name="bias")
    (weight if name == "weight" else bias).meta["spatial"] = layout("bchw")
    reasons = refused(sparsify_conv, FAMILY, builder, builder.call(CONV, x, weight, bias))
    assert reasons == ["weight or bias is a spatial value"]


@pytest.mark.parametrize(("rank", "one"), [(1, [1]), (3, [1, 1, 1])])
def test_condition_3_the_kernel_has_two_dimensions(rank, one) -> None:
    builder = GraphBuilder()
    x = builder.input(2, 6, *[20] * rank)
    x.meta["spatial"] = layout("bcs")
    weight = builder.parameter(8, 6, *one)
    zero = [0] * rank
    conv = builder.call(aten.convolution.default, x, weight, None, one, zero, one, False, zero, 1)
    assert refused(sparsify_conv, FAMILY, builder, conv) == [f"the kernel has {rank} dimensions, not 2"]


def test_other_operators_are_left_alone() -> None:
    builder = GraphBuilder()
    pooled = builder.call(aten.max_pool2d.default, builder.picture(), [2], spatial=layout("bchw", Domain(2, 2)))
    assert refused(sparsify_conv, FAMILY, builder, pooled) == []


@pytest.mark.parametrize(
    ("weight", "options"),
    [
        ((8, 6, 3, 3), {"padding": (1, 1)}),
        ((8, 6, 3, 3), {"stride": (2, 1), "padding": (1, 0)}),
        ((6, 2, 3, 2), {"padding": (2, 1), "dilation": (2, 1), "groups": 3}),
        ((6, 1, 3, 3), {"padding": (1, 1), "groups": 6}),
        ((8, 6, 1, 1), {}),
        ((8, 6, 1, 1), {"stride": (2, 2)}),
    ],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_convolutions_compute_the_masked_dense_result(weight, options, batch) -> None:
    builder = GraphBuilder()
    x, kernel, bias = builder.picture(), builder.parameter(*weight), builder.parameter(weight[0], name="bias")
    pairs = [list(options.get(name, default)) for name, default in (("stride", (1, 1)), ("padding", (0, 0)))]
    conv = builder.call(CONV, x, kernel, bias, *pairs, list(options.get("dilation", (1, 1))), options.get("groups", 1))
    target = Domain(*conv.meta["val"].shape[2:])
    dense = lambda x, kernel, bias: functional.conv2d(x, kernel, bias, **options)  # noqa: E731
    check_masked(builder, conv, dense, batch=batch, target=target)


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_compute_the_masked_dense_result(groups) -> None:
    builder = GraphBuilder()
    x, kernel = builder.picture(), builder.parameter(6, 4, 3, 4)
    conv = builder.call(TRANSPOSED, x, kernel, None, [2, 1], [1, 2], [1, 0], groups)

    def dense(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        return functional.conv_transpose2d(x, kernel, None, (2, 1), (1, 2), (1, 0), groups)

    check_masked(builder, conv, dense, batch=2, target=Domain(*conv.meta["val"].shape[2:]))
