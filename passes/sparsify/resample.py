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
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fisedit_compile.passes.common.arguments import pair, read_arguments
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.family import Family, Inferred, rewrite_nodes
from fisedit_compile.passes.common.ir import RowsBuilder, shape_of, spatial_of
from fisedit_compile.passes.common.layouts import HEIGHT, NCHW, WIDTH, Spatial
from fisedit_compile.passes.common.targets import aten
from fisedit_compile.runtime.spec import Domain, Stencil

NAME = "resample"
NEAREST = {aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default}
BILINEAR = {aten.upsample_bilinear2d.vec, aten.upsample_bilinear2d.default}
PADS = {
    aten.constant_pad_nd.default: "constant",
    aten.reflection_pad2d.default: "reflect",
    aten.replication_pad2d.default: "replicate",
    aten.pad.default: "",
}
POOLS = {aten.avg_pool2d.default, aten.max_pool2d.default, aten.adaptive_avg_pool2d.default}
SHUFFLES = {aten.pixel_shuffle.default: "pixel_shuffle", aten.pixel_unshuffle.default: "pixel_unshuffle"}
TARGETS = NEAREST | BILINEAR | set(PADS) | POOLS | set(SHUFFLES)
LARGEST_WINDOW = 64


def _scales(given: dict[str, Any]) -> tuple[float, float]:
    """Scale factors as the operator uses them; 0.0 where it derives them from the sizes."""
    factors = given.get("scale_factors")
    if factors:
        return float(factors[0]), float(factors[1])
    return float(given.get("scales_h") or 0.0), float(given.get("scales_w") or 0.0)


def window_stencil(
    source: Domain,
    target: Domain,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int] = (1, 1),
) -> Stencil:
    """Windows over a map, each of the numbers vertically and horizontally."""
    return Stencil.of(
        "window",
        source,
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


def pool_stencil(source: Domain, target: Domain, given: dict[str, Any]) -> Stencil:
    """The windows of a pooling, from its arguments by name."""
    kernel = pair(given["kernel_size"])
    stride = pair(given["stride"]) if given["stride"] else kernel
    return window_stencil(source, target, kernel, stride, pair(given["padding"]), pair(given.get("dilation", 1)))


def read_pad(node: fx.Node, dims: Sequence[str]) -> tuple[dict[str, tuple[int, int]], str] | str:
    """What a pad adds in front and behind by the name of the dimension, and its mode; or why rows cannot be padded."""
    given = read_arguments(node)
    amounts = [int(amount) for amount in given["padding" if "padding" in given else "pad"]]
    target: Any = node.target
    mode = PADS[target] or str(given["mode"])
    pairs = list(zip(amounts[::2], amounts[1::2], strict=True))
    named = {HEIGHT: (0, 0), WIDTH: (0, 0)}
    for name, added in zip(reversed(dims), pairs, strict=False):
        if name in named:
            named[name] = added
        elif any(added):
            return "it pads other dimensions than height and width"
    if mode != "constant" and min(amounts, default=0) < 0:
        return f"a pad of mode {mode} that removes positions"
    return named, mode


def read_stencil(node: fx.Node, source: Domain, target: Domain, dims: Sequence[str] = NCHW) -> Stencil | str:
    """The stencil of a resampling node whose input has the given dimensions, or the reason why it has none."""
    given = read_arguments(node)
    if node.target in POOLS and target.size == 1:
        return "it pools the whole map"
    if node.target in NEAREST:
        scale_y, scale_x = _scales(given)
        return Stencil.of("nearest", source, target, scale_y=scale_y, scale_x=scale_x)
    if node.target in BILINEAR:
        scale_y, scale_x = _scales(given)
        corners = bool(given["align_corners"])
        return Stencil.of("bilinear", source, target, align_corners=corners, scale_y=scale_y, scale_x=scale_x)
    if node.target in SHUFFLES:
        factor = int(given.get("upscale_factor") or given["downscale_factor"])
        return Stencil.of(SHUFFLES[node.target], source, target, factor=factor)
    if node.target in PADS:
        pad = read_pad(node, dims)
        if isinstance(pad, str):
            return pad
        (top, bottom), (left, right) = pad[0][HEIGHT], pad[0][WIDTH]
        return Stencil.of("pad", source, target, left=left, right=right, top=top, bottom=bottom, mode=pad[1])
    if node.target is aten.adaptive_avg_pool2d.default:
        if source.height % target.height or source.width % target.width:
            return "an adaptive pooling with windows of different sizes"
        kernel = (source.height // target.height, source.width // target.width)
        if math.prod(kernel) > LARGEST_WINDOW:
            return f"a pooling window of {math.prod(kernel)} positions, more than {LARGEST_WINDOW}"
        given = {"kernel_size": kernel, "stride": kernel, "padding": 0}
    elif given["ceil_mode"] and given.get("count_include_pad") and pair(given["padding"]) != (0, 0):
        return "the output size is rounded up while padding is counted"
    return pool_stencil(source, target, given)


def infer(node: fx.Node) -> Inferred:
    """The layout of the input at the resolution of the output."""
    spatial = spatial_of(node.args[0])
    padded = node.target in PADS and spatial is not None and spatial.space_rank == 2
    if spatial is None or not (padded or spatial.dims == NCHW):
        return "the input is not a spatial value with dimensions (batch, channel, height, width)"
    sizes = shape_of(node)
    target = Domain(*(sizes[dim] for dim in spatial.space_dims))
    stencil = read_stencil(node, spatial.domain, target, spatial.dims)
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
    stencil = read_stencil(node, source.domain, target.domain, source.dims)
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
        weights = builder.call(aten.to.dtype, weights, node.meta["val"].dtype)
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


FAMILY = Family(NAME, TARGETS.__contains__, infer, rewrite)


def resample(compilation: Compilation) -> None:
    """Run the pass on the edit graph."""
    rewrite_nodes(FAMILY, compilation.edit.graph, compilation.report)
