"""lower_conversions: conversions between maps and rows become operators."""

from __future__ import annotations

import pytest

from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.ir import to_map, to_rows
from fisedit_compile.passes.common.report import Report
from fisedit_compile.passes.sparsify.lower_conversions import lower_conversions
from support.graphs import DOMAIN, GraphBuilder, aten, layout, outputs, spell, text
from support.sparsifying import updates

INDEX, VALID = ("plan", "index", DOMAIN), ("plan", "valid", DOMAIN)
FLATTEN, UNFLATTEN, PERMUTE = "aten.flatten.using_ints", "aten.unflatten.int", "aten.permute"


def run(builder: GraphBuilder, *results):
    module, report = builder.module(*results), Report()
    lower_conversions(Compilation(module, report=report))
    before = text(module)
    second = Report()
    lower_conversions(Compilation(module, report=second))
    assert text(module) == before and not second.matches, "a second run changes the graph"
    return module, report


@pytest.mark.parametrize(
    ("dims", "shape", "flat"),
    [
        ("bchw", (2, 6, 5, 4), lambda v: (FLATTEN, (PERMUTE, v, [0, 2, 3, 1]), 1, 2)),
        ("bhwc", (2, 5, 4, 6), lambda v: (FLATTEN, v, 1, 2)),
        ("bsc", (2, 20, 6), lambda v: v),
        ("bcs", (2, 6, 20), lambda v: (PERMUTE, v, [0, 2, 1])),
        ("cbsc", (3, 2, 20, 4), lambda v: (PERMUTE, v, [1, 2, 0, 3])),
    ],
)
def test_maps_become_rows(dims, shape, flat) -> None:
    builder = GraphBuilder()
    x = builder.input(*shape, spatial=dims)
    module, report = run(builder, builder.marker(aten.relu.default, builder.marker(to_rows, x)))
    assert spell(outputs(module)[0]) == ("aten.relu", ("fisedit.gather_rows", flat("x"), INDEX))
    assert report.matches == {"lower_conversions": 1}


@pytest.mark.parametrize(
    ("dims", "shape", "flat", "back"),
    [
        (
            "bchw",
            (2, 6, 5, 4),
            lambda v: (FLATTEN, (PERMUTE, v, [0, 2, 3, 1]), 1, 2),
            lambda v: (PERMUTE, (UNFLATTEN, v, 1, [5, 4]), [0, 3, 1, 2]),
        ),
        ("bhwc", (2, 5, 4, 6), lambda v: (FLATTEN, v, 1, 2), lambda v: (UNFLATTEN, v, 1, [5, 4])),
        ("bsc", (2, 20, 6), lambda v: v, lambda v: v),
        ("cbsc", (3, 2, 20, 4), lambda v: (PERMUTE, v, [1, 2, 0, 3]), lambda v: (PERMUTE, v, [2, 0, 1, 3])),
    ],
)
def test_rows_are_written_into_the_recorded_map(dims, shape, flat, back) -> None:
    builder = GraphBuilder()
    x = builder.input(*shape, spatial=dims)
    rows = builder.input(2, 3, 6, name="rows")
    module, _ = run(builder, builder.marker(to_map, rows, like=x, origin="y"))
    recorded = ("recorded", "y", "map")
    assert spell(outputs(module)[0]) == back(("fisedit.scatter_rows", flat(recorded), "rows", INDEX, VALID))
    assert updates(module) == [(recorded, "rows")]
    assert outputs(module)[0].meta["origin"] == "y"


def test_every_layout_comes_back_as_it_went() -> None:
    for dims in ("bchw", "bcwh", "cbhcw", "bscc", "csbc"):
        order = layout(dims).order
        assert [order[order.index(dim)] for dim in range(len(order))] == list(range(len(order)))
        assert sorted(order) == list(range(len(dims)))
