"""Pooling, resizing, padding and pixel shuffling on rows.

Why: these change the resolution. Like a convolution they are stencils: each target position reads a few source
positions, the inactive ones among them from the recorded input.

Before: ``y = avg_pool2d(x, 2)``            After: ``y = to_map(div(sum(gather_taps(x rows), 2), 4))``
Before: ``y = max_pool2d(x, 3, 2, 1)``      After: ``y = to_map(amax(gather_taps(x rows, fill=-inf), 2))``
Before: ``y = upsample_nearest2d(x, ...)``  After: ``y = to_map(select(gather_taps(x rows), 2, 0))``
Before: ``y = upsample_bilinear2d(x, ...)`` After: ``y = to_map(sum(mul(gather_taps(x rows), weights), 2))``
Before: ``y = pixel_shuffle(x, f)``         After: ``y = to_map(pixel_select(gather_taps(x rows), subposition, f))``

Conditions:
1. x is spatial with dimensions (batch, channel, height, width); what is padded may have others.
2. Pooling does not round its output size up while it counts padding.
3. A pad adds to height and width only; only one of a constant removes positions.
4. A pooling leaves more than one position: what it makes of a whole map is no map, and meets maps by broadcasting.
5. An adaptive pooling divides both sizes evenly, into windows of at most 64 positions.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from fisedit_compile.passes.common.arguments import read_arguments
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.family import Family, Inferred, rewrite_nodes
from fisedit_compile.passes.common.ir import RowsBuilder, shape_of, spatial_of
from fisedit_compile.passes.common.layouts import NCHW, Spatial
from fisedit_compile.passes.common.meta import VALUE
from fisedit_compile.passes.common.reading.resampling import read_resampling
from fisedit_compile.passes.common.targets import BILINEAR, PADS, POOLS, RESAMPLINGS, aten
from fisedit_compile.runtime.spec import Domain, Stencil

NAME = "resample"


def infer(node: fx.Node) -> Inferred:
    """The layout of the input at the resolution of the output."""
    spatial = spatial_of(node.args[0])
    padded = node.target in PADS and spatial is not None and spatial.space_rank == 2
    if spatial is None or not (padded or spatial.dims == NCHW):
        return "the input is not a spatial value with dimensions (batch, channel, height, width)"
    sizes = shape_of(node)
    target = Domain(*(sizes[dim] for dim in spatial.space_dims))
    stencil = read_resampling(node, spatial.domain, target, spatial.dims)
    return stencil if isinstance(stencil, str) else Spatial(target, spatial.dims)


def _average(node: fx.Node, builder: RowsBuilder, taps: fx.Node, stencil: Stencil) -> fx.Node:
    given = read_arguments(node)
    total = builder.call(aten.sum.dim_IntList, taps, [2])
    divisor = given.get("divisor_override")
    ceil_without_padding = bool(given.get("ceil_mode"))
    if divisor or (given.get("count_include_pad", True) and not ceil_without_padding):
        return builder.call(aten.div.Scalar, total, divisor or stencil.taps)
    inside = builder.call(aten.unsqueeze.default, builder.plan("inside", stencil), 2)
    return builder.call(aten.div.Tensor, total, inside)


def rewrite(node: fx.Node, builder: RowsBuilder) -> str | None:
    """Gather the taps and combine them."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    source, target = spatial_of(x), spatial_of(node)
    assert source is not None and target is not None
    stencil = read_resampling(node, source.domain, target.domain, source.dims)
    assert isinstance(stencil, Stencil)
    fill = 0.0
    if node.target is aten.max_pool2d.default:
        fill = -math.inf
    elif node.target in PADS:
        fill = float(read_arguments(node).get("value") or 0.0)
    taps = builder.taps(x, stencil, fill)  # [B, N, K, C]
    if node.target is aten.max_pool2d.default:
        rows = builder.call(aten.amax.default, taps, [2])
    elif node.target in POOLS:
        rows = _average(node, builder, taps, stencil)
    elif node.target in BILINEAR:
        weights = builder.call(aten.unsqueeze.default, builder.plan("weights", stencil), 3)
        weights = builder.call(aten.to.dtype, weights, node.meta[VALUE].dtype)
        rows = builder.call(aten.sum.dim_IntList, builder.call(aten.mul.Tensor, taps, weights), [2])
    elif node.target is aten.pixel_shuffle.default:
        subposition = builder.plan("subposition", stencil)
        rows = builder.call(torch.ops.fisedit.pixel_select.default, taps, subposition, stencil.integer("factor"))
    elif node.target is aten.pixel_unshuffle.default:
        rows = builder.call(aten.flatten.using_ints, builder.call(aten.transpose.int, taps, 2, 3), 2, 3)
    else:
        rows = builder.call(aten.select.int, taps, 2, 0)
    builder.replace(rows)
    return None


FAMILY = Family(NAME, RESAMPLINGS.__contains__, infer, rewrite)


def resample(compilation: Compilation) -> None:
    """Run the pass on the edit graph."""
    rewrite_nodes(FAMILY, compilation.edit.graph, compilation.report)
