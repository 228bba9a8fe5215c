"""patches: reshapes that cut a map into patches or put patches together are stencils, whatever surrounds them."""

from __future__ import annotations

import pytest
from torch import Tensor

from fisedit_compile.options import Options
from fisedit_compile.passes.common.layouts import Spatial
from fisedit_compile.passes.common.reading.patches import reshape_patches
from fisedit_compile.passes.sparsify.layout import FAMILY, sparsify_layout
from fisedit_compile.runtime.spec import Domain, Stencil
from support.execution import check_masked
from support.graphs import GraphBuilder, aten, layout, outputs, spell
from support.sparsifying import refused, sparsify, taps, updates

FINE, COARSE = Domain(10, 14), Domain(5, 7)
UNEVEN = "positions are mixed with channels or split unevenly"


@pytest.mark.parametrize(
    ("shape", "dims", "change", "after", "split", "order", "channels"),
    [
        ((2, 3, 10, 14), "bchw", [2, 3, 5, 2, 7, 2], "bchcwc", [2, 2, 3], [2, 0, 1], [3, 2, 2]),
        ((2, 10, 14, 3), "bhwc", [2, 5, 2, 7, 2, 3], "bhcwcc", [2, 2, 3], [0, 1, 2], [2, 2, 3]),
        ((2, 140, 6), "bsc", [2, 5, 2, 7, 2, 3, 2], "bhcwccc", [2, 2, 6], [0, 1, 2], [2, 2, 3, 2]),
        ((2, 3, 2, 10, 14), "bcchw", [2, 6, 5, 2, 7, 2], "bchcwc", [2, 2, 3, 2], [2, 3, 0, 1], [6, 2, 2]),
    ],
)
def test_cutting(shape, dims, change, after, split, order, channels) -> None:
    builder = GraphBuilder()
    node = builder.call(aten.reshape.default, builder.input(*shape, spatial=layout(dims, FINE)), change)
    module, report = sparsify(sparsify_layout, FAMILY, builder, node)
    assert node.meta["spatial"] == layout(after, COARSE)
    rows = ("aten.reshape", taps(Stencil.of("pixel_unshuffle", FINE, COARSE, factor=2)), [2, -1, *split])
    rows = ("aten.permute", rows, [0, 1, *(2 + place for place in order)])
    assert spell(outputs(module)[0]) == ("to_map", ("aten.reshape", rows, [2, -1, *channels]))
    assert updates(module) == [(("recorded", "x", "rows"), ("to_rows", "x"))]
    assert report.matches == {"sparsify_layout": 1}


@pytest.mark.parametrize(
    ("shape", "dims", "change", "after", "order", "channels"),
    [
        ((2, 3, 5, 2, 7, 2), "bchcwc", [2, 3, 10, 14], "bchw", [0, 1, 2], [3]),
        ((2, 5, 2, 7, 2, 3), "bhcwcc", [2, 140, 3], "bsc", [2, 0, 1], [3]),
        ((2, 5, 2, 7, 2, 3), "bhcwcc", [2, 10, 14, 3], "bhwc", [2, 0, 1], [3]),
        ((2, 5, 2, 7, 2), "bhcwc", [2, 10, 14], "bhw", [0, 1], []),
    ],
)
def test_putting_together(shape, dims, change, after, order, channels) -> None:
    builder = GraphBuilder()
    node = builder.call(aten.reshape.default, builder.input(*shape, spatial=layout(dims, COARSE)), change)
    module, _ = sparsify(sparsify_layout, FAMILY, builder, node)
    assert node.meta["spatial"] == layout(after, FINE)
    stencil = Stencil.of("pixel_shuffle", COARSE, FINE, factor=2)
    rows = ("aten.permute", taps(stencil), [0, 1, 2, *(3 + place for place in order)])
    rows = ("fisedit.pixel_select", ("aten.flatten.using_ints", rows, 3), ("plan", "subposition", stencil), 2)
    assert spell(outputs(module)[0]) == ("to_map", ("aten.reshape", rows, [2, -1, *channels]))


@pytest.mark.parametrize(
    ("shape", "dims", "domain", "change"),
    [
        ((2, 3, 10, 14), "bchw", FINE, [2, 3, 10, 2, 7]),  # cut into halves of rows
        ((2, 3, 10, 14), "bchw", FINE, [2, 3, 5, 2, 14]),
        ((2, 3, 5, 2, 7, 1, 3), "bchcwcc", COARSE, [2, 3, 10, 21]),
        ((2, 3, 5, 1, 7, 2), "bchcwc", COARSE, [2, 3, 5, 14]),  # joined across only
        ((2, 3, 5, 7, 2), "bchwc", COARSE, [2, 3, 5, 14]),
        ((2, 3, 2, 5, 2, 7), "bcchcw", COARSE, [2, 3, 10, 14]),  # offsets before positions: nothing lies together
    ],
)
def test_conditions(shape, dims, domain, change) -> None:
    builder = GraphBuilder()
    node = builder.call(aten.reshape.default, builder.input(*shape, spatial=layout(dims, domain)), change)
    assert refused(sparsify_layout, FAMILY, builder, node) == [UNEVEN]


def test_a_map_of_one_patch_is_not_cut() -> None:
    assert reshape_patches(layout("bchw", Domain(4, 4)), (2, 3, 4, 4), (2, 3, 1, 4, 1, 4)) is None
    found = reshape_patches(layout("bchw", Domain(4, 8)), (2, 3, 4, 8), (2, 3, 1, 4, 2, 4))
    assert found is not None and found.after == Spatial(Domain(1, 2), layout("bchcwc").dims)


def test_windows_need_not_be_square() -> None:
    domain = Domain(6, 8)
    found = reshape_patches(layout("bhwc", domain), (2, 6, 8, 3), (2, 3, 2, 2, 4, 3))
    assert found is not None and found.factors == (2, 4) and found.after == Spatial(Domain(3, 2), layout("bhcwcc").dims)
    found = reshape_patches(Spatial(Domain(3, 2), layout("bhcwcc").dims), (2, 3, 2, 2, 4, 3), (2, 6, 8, 3))
    assert found is not None and found.factors == (2, 4) and found.after == Spatial(domain, layout("bhwc").dims)


def windows(x: Tensor) -> Tensor:
    """The largest element of each window of 2x2, everywhere in it."""
    cut = x.reshape(2, 3, 5, 2, 7, 2).permute(0, 2, 4, 3, 5, 1)
    largest = cut.amax((3, 4), keepdim=True).expand(cut.shape) + cut
    return largest.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


@pytest.mark.parametrize("batch", [1, 2])
def test_against_the_dense_operators(batch: int) -> None:
    builder = GraphBuilder()
    x = builder.picture(2, 3, 10, 14)
    padded = builder.call(aten.constant_pad_nd.default, x, [0, 0])  # anchors the input
    cut = builder.call(aten.reshape.default, padded, [2, 3, 5, 2, 7, 2])
    cut = builder.call(aten.permute.default, cut, [0, 2, 4, 3, 5, 1])
    largest = builder.call(aten.amax.default, cut, [3, 4], True)
    total = builder.call(aten.add.Tensor, builder.call(aten.expand.default, largest, [2, 5, 7, 2, 2, 3]), cut)
    moved = builder.call(aten.permute.default, total, [0, 5, 1, 3, 2, 4])
    joined = builder.call(aten.reshape.default, moved, [2, 3, 10, 14])
    check_masked(builder, joined, windows, batch=batch, options=Options(convolution="rows"))
