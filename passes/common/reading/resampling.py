"""Pooling, resizing, padding and pixel shuffling: which positions they read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import fx

from fisedit_compile.passes.common.arguments import pair, read_arguments
from fisedit_compile.passes.common.layouts import HEIGHT, NCHW, WIDTH, Dimension
from fisedit_compile.passes.common.reading.patches import patch_stencil
from fisedit_compile.passes.common.targets import BILINEAR, NEAREST, PADS, POOLS, SHUFFLES, aten
from fisedit_compile.runtime.spec import Domain, Stencil

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


def read_pad(node: fx.Node, dims: Sequence[Dimension]) -> tuple[dict[Dimension, tuple[int, int]], str] | str:
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


def read_resampling(node: fx.Node, source: Domain, target: Domain, dims: Sequence[Dimension] = NCHW) -> Stencil | str:
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
        return patch_stencil(node.target is aten.pixel_unshuffle.default, source, target, (factor, factor))
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
