"""moves: crops, flips, rolls, joins along space and transpositions on rows."""

from __future__ import annotations

import pytest
import torch

from fisedit_compile.passes.common.reading.resampling import window_stencil
from fisedit_compile.passes.sparsify.layout import FAMILY, sparsify_layout
from fisedit_compile.runtime.spec import Domain, Stencil
from support.execution import check_masked
from support.graphs import GraphBuilder, aten, layout, outputs, spell
from support.sparsifying import sparsify


def run(builder: GraphBuilder, *results):
    return sparsify(sparsify_layout, FAMILY, builder, *results)


def moved(stencil: Stencil, value: str = "x"):
    """How the rows of a stencil of one tap are spelled."""
    plans = (("plan", "halo", stencil), ("plan", "table", stencil))
    taps = ("fisedit.gather_taps", ("to_rows", value), ("recorded", value, "rows"), *plans, 0.0)
    return ("aten.select.int", taps, 2, 0)


def crop(size: Domain, stride: tuple[int, int] = (1, 1), start: tuple[int, int] = (0, 0)) -> Stencil:
    return window_stencil(Domain(5, 4), size, (1, 1), stride, (-start[0], -start[1]))


def table(rows: tuple[int, ...], columns: tuple[int, ...], source: int = 5) -> Stencil:
    return Stencil.of("table", Domain(source, 4), Domain(len(rows), len(columns)), rows=rows, columns=columns)


@pytest.mark.parametrize(
    ("target", "arguments", "stencil"),
    [
        (aten.slice.Tensor, (2, 1, 4), crop(Domain(3, 4), start=(1, 0))),
        (aten.slice.Tensor, (3, 0, 9, 2), crop(Domain(5, 2), stride=(1, 2))),
        (aten.slice.Tensor, (-1, -3, -1), crop(Domain(5, 2), start=(0, 1))),
        (aten.narrow.default, (2, 2, 3), crop(Domain(3, 4), start=(2, 0))),
        (aten.flip.default, ([3],), table((0, 1, 2, 3, 4), (3, 2, 1, 0))),
        (aten.roll.default, ([2, -1], [2, 3]), table((3, 4, 0, 1, 2), (1, 2, 3, 0))),
        (aten.transpose.int, (2, 3), Stencil.of("transposition", Domain(5, 4), Domain(4, 5))),
    ],
)
def test_they_are_stencils_of_one_tap(target, arguments, stencil) -> None:
    builder = GraphBuilder()
    node = builder.call(target, builder.picture(), *arguments)
    module, _ = run(builder, node)
    assert spell(outputs(module)[0]) == ("to_map", moved(stencil))
    assert outputs(module)[0].meta["spatial"] == layout("bchw", stencil.target)


def test_chunks_are_crops_one_behind_the_other() -> None:
    builder = GraphBuilder()
    both = builder.call(aten.split.sizes, builder.picture(), [2, 3], 2)
    module, _ = run(builder, builder.piece(both, 0), builder.piece(both, 1))
    stencils = [node.meta["plan_input"].of for node in module.graph.nodes if "plan_input" in node.meta]
    tables = [stencil for stencil in stencils if stencil.kind == "window"]
    assert {(stencil.target, stencil["padding_y"]) for stencil in tables} == {(Domain(2, 4), 0), (Domain(3, 4), -2)}


def test_channels_are_turned_on_rows() -> None:
    builder = GraphBuilder()
    module, _ = run(builder, builder.call(aten.flip.default, builder.picture(), [1]))
    assert spell(outputs(module)[0]) == ("to_map", ("aten.flip", ("to_rows", "x"), [2]))


def test_what_is_joined_is_summed_at_its_places() -> None:
    builder = GraphBuilder()
    x, y = builder.picture(), builder.input(2, 6, 2, 4, name="y", spatial=layout("bchw", Domain(2, 4)))
    module, _ = run(builder, builder.call(aten.cat.default, [x, y], 2))
    first = table((0, 1, 2, 3, 4, -1, -1), (0, 1, 2, 3))
    second = table((-1, -1, -1, -1, -1, 0, 1), (0, 1, 2, 3), source=2)
    assert spell(outputs(module)[0]) == ("to_map", ("aten.add.Tensor", moved(first), moved(second, "y")))


@pytest.mark.parametrize(("start", "end"), [(1, 3), (0, 2), (3, 9), (-2, 2**63 - 1)])
def test_rows_that_are_written_over_are_summed_at_their_places(start, end) -> None:
    builder = GraphBuilder()
    first, last, _ = slice(start, end).indices(5)
    x = builder.picture()
    y = builder.input(2, 6, last - first, 4, name="y", spatial=layout("bchw", Domain(last - first, 4)))
    node = builder.call(aten.slice_scatter.default, x, y, 2, start, end)
    module, _ = run(builder, node)
    left = table(tuple(-1 if first <= row < last else row for row in range(5)), (0, 1, 2, 3))
    written = table(tuple(row - first if first <= row < last else -1 for row in range(5)), (0, 1, 2, 3), last - first)
    assert spell(outputs(module)[0]) == ("to_map", ("aten.add.Tensor", moved(left), moved(written, "y")))
    assert node.meta["spatial"] == layout("bchw")


@pytest.mark.parametrize(
    ("make", "dense", "size"),
    [
        (
            lambda b, x: b.call(aten.slice.Tensor, b.call(aten.slice.Tensor, x, 2, 1, 5, 2), 3, 1, 4),
            lambda x: x[:, :, 1:5:2, 1:4],
            Domain(2, 3),
        ),
        (lambda b, x: b.call(aten.flip.default, x, [1, 3]), lambda x: x.flip(1, 3), Domain(5, 4)),
        (lambda b, x: b.call(aten.roll.default, x, [2, -1], [2, 3]), lambda x: x.roll((2, -1), (2, 3)), Domain(5, 4)),
        (lambda b, x: b.call(aten.transpose.int, x, 2, 3), lambda x: x.transpose(2, 3), Domain(4, 5)),
        (
            lambda b, x: b.call(aten.cat.default, [x, b.call(aten.flip.default, x, [2])], 3),
            lambda x: torch.cat([x, x.flip(2)], 3),
            Domain(5, 8),
        ),
        (
            lambda b, x: b.call(
                aten.slice_scatter.default, x, b.call(aten.silu.default, b.call(aten.slice.Tensor, x, 3, 1, 3)), 3, 1, 3
            ),
            lambda x: x.slice_scatter(torch.nn.functional.silu(x[..., 1:3]), 3, 1, 3),
            Domain(5, 4),
        ),
    ],
)
def test_they_compute_the_masked_dense_result(make, dense, size) -> None:
    builder = GraphBuilder()
    # A convolution of one position anchors the picture.
    x = builder.call(aten.conv2d.default, builder.picture(), builder.parameter(6, 6, 1, 1))
    check_masked(
        builder,
        make(builder, x),
        lambda x, weight: dense(torch.nn.functional.conv2d(x, weight)),
        batch=2,
        target=size,
    )
