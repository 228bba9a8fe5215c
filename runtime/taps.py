"""Tap geometry: which source positions each target position of a stencil reads.

Every stencil is separable, so its geometry is two small tables, one for each axis: for a target coordinate, the source
coordinates of its taps, or outside. Where PyTorch's own rounding matters (nearest resizing) or its own border rules
(padding), the table comes from running PyTorch's operator on a ramp of coordinates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from fisedit_compile.errors import GraphError
from fisedit_compile.runtime.spec import Stencil, StencilKind

OUTSIDE = -1
Axis = Literal["y", "x"]


@dataclass(frozen=True)
class AxisTaps:
    """The taps along one axis.

    Attributes:
        source: int64 ``[target size, taps]``, the source coordinate of each tap, ``OUTSIDE`` beyond the map.
        weights: float32 ``[target size, taps]`` of interpolating stencils, else None.
    """

    source: Tensor
    weights: Tensor | None = None


@lru_cache(maxsize=1024)
def axis_taps(stencil: Stencil) -> tuple[AxisTaps, AxisTaps]:
    """Taps along the vertical and the horizontal axis; tap ``(i, j)`` has number ``i * horizontal taps + j``.

    Raises:
        GraphError: the stencil's kind or its padding mode is unknown, or a padding does not fit the sizes.
    """
    if stencil.kind not in _GEOMETRY:
        raise GraphError(f"stencil kinds are {', '.join(sorted(_GEOMETRY))}; got {stencil.kind!r}.")
    geometry = _GEOMETRY[stencil.kind]
    vertical = geometry(stencil, "y", stencil.source.height, stencil.target.height)
    horizontal = geometry(stencil, "x", stencil.source.width, stencil.target.width)
    return vertical, horizontal


def subpositions(stencil: Stencil, positions: Tensor) -> Tensor:
    """Which channel of those of each output channel a target position of a pixel shuffle reads.

    There are ``height * width`` of them, the two factors.

    Args:
        stencil: of kind ``pixel_shuffle``.
        positions: int64, any shape, in the target domain.

    Returns:
        int64 of the same shape, ``(y % height) * width + x % width``.
    """
    (height, width), columns = stencil.factors, stencil.target.width
    return (positions // columns % height) * width + positions % columns % width


def _kernel(stencil: Stencil, axis: Axis) -> int:
    return stencil.integer("kernel_height" if axis == "y" else "kernel_width")


def _bounded(coordinates: Tensor, size: int) -> Tensor:
    return torch.where((coordinates >= 0) & (coordinates < size), coordinates, OUTSIDE)


def _window(stencil: Stencil, axis: Axis, source: int, target: int) -> AxisTaps:
    start = torch.arange(target)[:, None] * stencil.integer(f"stride_{axis}") - stencil.integer(f"padding_{axis}")
    steps = torch.arange(_kernel(stencil, axis)) * stencil.integer(f"dilation_{axis}")
    return AxisTaps(_bounded(start + steps, source))


def _transposed(stencil: Stencil, axis: Axis, source: int, target: int) -> AxisTaps:
    stride = stencil.integer(f"stride_{axis}")
    steps = torch.arange(_kernel(stencil, axis)) * stencil.integer(f"dilation_{axis}")
    # Input position i adds to output position i * stride - padding + k * dilation for every kernel tap k.
    scaled = torch.arange(target)[:, None] + stencil.integer(f"padding_{axis}") - steps
    return AxisTaps(_bounded(torch.where(scaled % stride == 0, scaled.div(stride, rounding_mode="floor"), -1), source))


def _nearest(stencil: Stencil, axis: Axis, source: int, target: int) -> AxisTaps:
    operator = (
        torch.ops.aten._upsample_nearest_exact2d if "exact" in stencil.kind else torch.ops.aten.upsample_nearest2d
    )
    ramp = torch.arange(source, dtype=torch.float32).view(1, 1, source, 1)
    resized = operator(ramp, [target, 1], stencil.number(f"scale_{axis}") or None, None)
    return AxisTaps(resized.to(torch.int64).view(target, 1))


def _bilinear(stencil: Stencil, axis: Axis, source: int, target: int) -> AxisTaps:
    # The steps of ATen's area_pixel_compute_source_index, in float32 as for a float32 input.
    numbers = torch.arange(target, dtype=torch.float32)
    if source == target:
        # An equal size is a copy, whatever the scale factor says.
        places = torch.arange(target)[:, None].repeat(1, 2)
        return AxisTaps(places, torch.tensor([[1.0, 0.0]]).repeat(target, 1))
    factor = stencil.number(f"scale_{axis}")
    if stencil["align_corners"]:
        scale = torch.tensor(source - 1, dtype=torch.float32) / (target - 1) if target > 1 else torch.tensor(0.0)
        places = numbers * scale
    else:
        scale = torch.tensor(1.0 / factor if factor > 0 else source / target, dtype=torch.float32)
        places = (numbers + 0.5) * scale - 0.5  # from -0.5; the clamps below bring it into the map
    first = places.to(torch.int64).clamp(max=source - 1)
    second = (first + 1).clamp(max=source - 1)
    share = (places - first).clamp(0.0, 1.0)
    return AxisTaps(torch.stack([first, second], 1), torch.stack([1.0 - share, share], 1))


def _pad(stencil: Stencil, axis: Axis, source: int, target: int) -> AxisTaps:
    before, after = ("top", "bottom") if axis == "y" else ("left", "right")
    padding = [stencil.integer(before), stencil.integer(after)]
    mode = str(stencil["mode"])
    ramp = torch.arange(source, dtype=torch.float64).view(1, 1, source)
    try:
        padded = functional.pad(ramp, padding, mode, *([float(OUTSIDE)] if mode == "constant" else []))
    except (RuntimeError, NotImplementedError) as error:
        raise GraphError(f"padding {padding} in mode {mode!r} does not fit a size of {source}: {error}") from error
    if padded.numel() != target:
        raise GraphError(f"padding {source} by {padding} gives {padded.numel()} positions, not the target's {target}.")
    return AxisTaps(padded.to(torch.int64).view(target, 1))


def _pixel_shuffle(stencil: Stencil, axis: Axis, source: int, target: int) -> AxisTaps:
    return AxisTaps(_bounded(torch.arange(target).view(target, 1) // stencil.factors[axis == "x"], source))


def _pixel_unshuffle(stencil: Stencil, axis: Axis, source: int, target: int) -> AxisTaps:
    factor = stencil.factors[axis == "x"]
    return AxisTaps(_bounded(torch.arange(target)[:, None] * factor + torch.arange(factor), source))


def _table(stencil: Stencil, axis: Axis, source: int, target: int) -> AxisTaps:
    numbers = stencil["rows" if axis == "y" else "columns"]
    assert isinstance(numbers, tuple) and len(numbers) == target
    return AxisTaps(_bounded(torch.tensor(numbers).view(target, 1), source))


_GEOMETRY: dict[StencilKind, Callable[[Stencil, Axis, int, int], AxisTaps]] = {
    "window": _window,
    "transposed": _transposed,
    "nearest": _nearest,
    "nearest_exact": _nearest,
    "bilinear": _bilinear,
    "pad": _pad,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
    "table": _table,
}
