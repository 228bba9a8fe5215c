"""returned: values that are maps only where the graph returns them, by the maps that they were made from."""

from __future__ import annotations

import pytest
from torch import fx

from fisedit_compile.options import Options
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.report import Report
from fisedit_compile.passes.domains.propagate_domains import propagate_domains
from fisedit_compile.passes.manager import families
from fisedit_compile.runtime.spec import Domain
from support.graphs import GraphBuilder, aten, layout, outputs, targets, text

SQUARE = Domain(8, 8)


def picture(builder: GraphBuilder, channels: int) -> fx.Node:
    """The output of a 1x1 convolution ``[2, channels, 8, 8]``."""
    return builder.call(aten.conv2d.default, builder.input(2, 3, 8, 8), builder.parameter(channels, 3, 1, 1))


def queries(builder: GraphBuilder, x: fx.Node, count: int = 8) -> fx.Node:
    """``[2, count, channels]`` of which nothing is known: a parameter whose sizes may be those of the map."""
    channels = x.meta["val"].shape[1]
    means = builder.call(aten.reshape.default, builder.call(aten.mean.dim, x, [2, 3]), [2, 1, channels])
    return builder.call(aten.mul.Tensor, means, builder.parameter(count, channels))


def product(builder: GraphBuilder, x: fx.Node) -> fx.Node:
    flat = builder.call(aten.flatten.using_ints, x, 2)
    return builder.call(aten.matmul.default, queries(builder, x), flat)


def einsum(builder: GraphBuilder, x: fx.Node) -> fx.Node:
    return builder.call(aten.einsum.default, "bqc,bchw->bqhw", [queries(builder, x), x])


def compiling(builder: GraphBuilder, module: fx.GraphModule) -> Compilation:
    return Compilation(module, tuple(builder.infos), families=families(Options()))


def run(builder: GraphBuilder, *results: fx.Node) -> tuple[fx.GraphModule, Report]:
    compilation = compiling(builder, builder.module(*results))
    propagate_domains(compilation)
    return compilation.edit, compilation.report


@pytest.mark.parametrize(
    ("make", "dims", "channels"),
    [
        (einsum, "bchw", 5),
        (einsum, "bchw", 64),
        (lambda b, x: b.call(aten.sigmoid.default, einsum(b, x)), "bchw", 5),
        (lambda b, x: b.call(aten.permute.default, einsum(b, x), [0, 2, 3, 1]), "bhwc", 5),
        (lambda b, x: b.call(aten.reshape.default, product(b, x), [2, 8, 8, 8]), "bchw", 64),
    ],
    ids=["queries as rows", "channels as positions", "behind an activation", "moved", "reshaped"],
)
def test_the_map_in_a_product_tells(make, dims, channels) -> None:
    builder = GraphBuilder()
    node = make(builder, picture(builder, channels))
    module, report = run(builder, node)
    (returned,) = outputs(module)
    assert report.dense_reason is None and not report.lost
    assert returned.target is aten.alias.default and returned.args[0] is node
    assert returned.meta["spatial"] == layout(dims, SQUARE)
    assert "spatial" not in node.meta
    before = text(module)
    propagate_domains(compiling(builder, module))
    assert text(module) == before


def test_who_reads_the_value_inside_reads_no_map() -> None:
    builder = GraphBuilder()
    node = einsum(builder, picture(builder, 64))
    inside = builder.call(aten.amax.default, builder.call(aten.cumsum.default, node, 3), [2, 3])
    module, report = run(builder, node, inside)
    first, second = outputs(module)
    assert first.meta["spatial"] == layout("bchw", SQUARE) and second is inside
    assert "spatial" not in inside.meta and inside.all_input_nodes[0].args[0] is node


def test_a_value_that_is_not_returned_is_none() -> None:
    builder = GraphBuilder()
    x = picture(builder, 64)
    node = einsum(builder, x)
    run(builder, x, builder.call(aten.amax.default, node, [2, 3]))
    assert "spatial" not in node.meta


@pytest.mark.parametrize(
    ("make", "blamed"),
    [
        (lambda b, x: b.call(aten.fft_fft.default, x, 8, 1), "aten.fft_fft.default"),
        (lambda b, x: b.call(aten.mul.Tensor, b.call(aten.fft_fft.default, x, 8, 1), 2.0), "aten.fft_fft.default made"),
        (lambda b, x: b.call(aten.cumsum.default, product_of_unknowns(b, x), 1), "aten.cumsum.default"),
    ],
    ids=["itself", "behind a product", "without a map"],
)
def test_what_the_maps_do_not_tell_stays_unknown_and_names_its_maker(make, blamed) -> None:
    builder = GraphBuilder()
    x = picture(builder, 4)
    module, report = run(builder, x, make(builder, x))
    assert report.dense_reason is not None and blamed in report.dense_reason
    assert "its sizes do not tell which of its dimensions are positions" in report.dense_reason
    assert aten.alias.default not in targets(module)


def product_of_unknowns(builder: GraphBuilder, x: fx.Node) -> fx.Node:
    """``[2, 8, 8, 8]``, made of no map: of two values of which nothing is known."""
    first, second = queries(builder, x), queries(builder, x)
    scores = builder.call(aten.einsum.default, "bqc,bkc->bqk", [first, second])
    return builder.call(aten.reshape.default, builder.call(aten.cat.default, [scores] * 8, 1), [2, 8, 8, 8])
