"""moves: crops, flips, rolls, joins along space and transpositions on rows."""

from __future__ import annotations

import pytest
import torch
from sparsifying import sparsify

from fisedit_compile.passes.sparsify_layout import FAMILY, sparsify_layout
from fisedit_compile.runtime.spec import Domain, Stencil

from execution import check_masked
from graphs import GraphBuilder, aten, layout, outputs, spell


def run(builder: GraphBuilder, *results):
    return sparsify(sparsify_layout, FAMILY, builder, *results)


def moved(stencil: Stencil, value: str = "x"):
    """How the rows of a stencil of one tap are spelled."""
    taps = (
        "fisedit.gather_taps",
        ("to_rows", value),
        ("recorded", value, "rows"),
        ("plan", "halo", f"{stencil.kind}:{stencil.source}->{stencil.target}"),
        ("plan", "table", f"{stencil.kind}:{stencil.source}->{stencil.target}"),
        0.0,
    )
    return ("aten.select.int", taps, 2, 0)


def crop(source: Domain, target: Domain) -> Stencil:
    return Stencil.of("window", source, target)


@pytest.mark.parametrize(
    ("target", "arguments", "size", "kind"),
    [
        (aten.slice.Tensor, (2, 1, 4), Domain(3, 4), "window"),
        (aten.slice.Tensor, (3, 0, 9, 2), Domain(5, 2), "window"),
        (aten.slice.Tensor, (-1, -3, -1), Domain(5, 2), "window"),
        (aten.narrow.default, (2, 2, 3), Domain(3, 4), "window"),
        (aten.flip.default, ([3],), Domain(5, 4), "table"),
        (aten.roll.default, ([2, -1], [2, 3]), Domain(5, 4), "table"),
        (aten.transpose.int, (2, 3), Domain(4, 5), "transposition"),
    ],
)
def test_they_are_stencils_of_one_tap(target, arguments, size, kind) -> None:
    builder = GraphBuilder()
    node = builder.call(target, builder.picture(), *arguments)
    module, _ = run(builder, node)
    assert spell(outputs(module)[0]) == ("to_map", moved(Stencil.of(kind, Domain(5, 4), size)))
    assert outputs(module)[0].meta["spatial"] == layout("bchw", size)


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
    x, y = builder.picture(), builder.input(2, 6, 2, 4, name="y", spatial="bchw")
    module, _ = run(builder, builder.call(aten.cat.default, [x, y], 2))
    first, second = (Stencil.of("table", Domain(size, 4), Domain(7, 4)) for size in (5, 2))
    assert spell(outputs(module)[0]) == ("to_map", ("aten.add.Tensor", moved(first), moved(second, "y")))
    rows = [
        node.meta["plan_input"].of["rows"]
        for node in module.graph.nodes
        if "plan_input" in node.meta and node.meta["plan_input"].kind == "table"
    ]
    assert rows == [(0, 1, 2, 3, 4, -1, -1), (-1, -1, -1, -1, -1, 0, 1)]


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
