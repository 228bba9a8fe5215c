"""What each operator does to the positions of a map along one axis: which it reads, and what becomes of the canvas.

Rules are by operator, from its arguments and sizes alone. They are given for each dimension of a tensor; an operator
without a rule leaves positions where they are (``fields_of_graph.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import Any

import torch
from torch import Tensor, fx

from support.canvas import Canvas


@dataclass(frozen=True)
class Move:
    """One operator along one axis of a map.

    Attributes:
        reads: ``[m, n]`` booleans: which of ``n`` input positions each of ``m`` output positions reads.
        canvas: the output's canvas made from the input's.
    """

    reads: Tensor
    canvas: Callable[[Canvas], Canvas]


Moves = dict[int, Move]


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator by name, defaults included."""
    found = {}
    for number, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if number < len(node.args):
            found[argument.name] = node.args[number]
        else:
            found[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return found


def pair(value: Any) -> tuple[int, int]:
    """One number for each axis."""
    values = [value] if isinstance(value, int) else list(value)
    return (values[0], values[-1])


def table(indices: Sequence[int | None], size: int) -> Tensor:
    """Reads of one position each, or of none."""
    reads = torch.zeros((len(indices), size), dtype=torch.bool)
    for target, source in enumerate(indices):
        if source is not None:
            reads[target, source] = True
    return reads


def window_reads(size: int, target: int, kernel: int, dilation: int, stride: int, padding: int) -> Tensor:
    """``[target, size]``: the taps of windows that lie inside the map."""
    reads = torch.zeros((target, size), dtype=torch.bool)
    for position in range(target):
        for tap in range(kernel):
            source = position * stride - padding + dilation * tap
            if 0 <= source < size:
                reads[position, source] = True
    return reads


def window(size: int, target: int, kernel: int, dilation: int, stride: int, padding: int) -> Move:
    """Convolution, pooling and strided slices."""
    reads = window_reads(size, target, kernel, dilation, stride, padding)
    return Move(reads, lambda canvas: canvas.windowed(kernel, dilation, stride, padding, target))


def transposed(size: int, target: int, kernel: int, dilation: int, stride: int, padding: int) -> Move:
    """Transposed convolution: the windows that would lead from its output to its input, read backwards."""
    reads = window_reads(target, size, kernel, dilation, stride, padding).T
    return Move(reads, lambda canvas: canvas.transposed(kernel, dilation, stride, padding, target))


def padded(size: int, left: int, right: int, mode: str) -> Move:
    """Padding of any mode; negative numbers crop."""
    positions = range(-left, size + right)
    if mode == "constant":
        inside = [position if 0 <= position < size else None for position in positions]
        return Move(table(inside, size), lambda canvas: canvas.extended(left, right))
    if mode == "reflect":
        period = max(2 * (size - 1), 1)
        found = [min(position % period, -position % period) for position in positions]
    elif mode == "replicate":
        found = [min(max(position, 0), size - 1) for position in positions]
    else:
        assert mode == "circular", mode
        found = [position % size for position in positions]
    return Move(table(found, size), lambda canvas: canvas.taken(found))


def resized(reads: Tensor) -> Move:
    """Anything that changes the size of the whole map."""
    return Move(reads, lambda canvas: canvas.resized(len(reads)))


def interpolation_reads(size: int, target: int, taps: Sequence[int], aligned: bool, scale: float | None) -> Tensor:
    """The positions that bilinear (taps 0, 1) and bicubic (-1 to 2) name, whatever their weights are.

    Along an axis that keeps its size, PyTorch's bilinear resize is a copy, also with a scale factor.
    """
    if size == target and len(taps) == 2:
        return torch.eye(size, dtype=torch.bool)
    reads = torch.zeros((target, size), dtype=torch.bool)
    for position in range(target):
        if aligned:
            source = Fraction(position * (size - 1), max(target - 1, 1))
        else:
            ratio = Fraction(size, target) if scale is None else 1 / Fraction(scale)
            source = (position + Fraction(1, 2)) * ratio - Fraction(1, 2)
        if len(taps) == 2:
            source = max(source, Fraction(0))
        for tap in taps:
            reads[position, min(max(floor(source) + tap, 0), size - 1)] = True
    return reads


def _interpolation(node: fx.Node, given: dict[str, Any], size: tuple[int, int], target: tuple[int, int]) -> Moves:
    name = str(node.target)
    if "nearest" in name or "_aa" in name:
        return {2: resized(_impulses(node, size, 0)), 3: resized(_impulses(node, size, 1))}
    taps = (-1, 0, 1, 2) if "bicubic" in name else (0, 1)
    assert "bicubic" in name or "bilinear" in name, name
    factors = given.get("scale_factors") or (given.get("scales_h"), given.get("scales_w"))
    return {
        2 + axis: resized(
            interpolation_reads(size[axis], target[axis], taps, bool(given["align_corners"]), factors[axis])
        )
        for axis in range(2)
    }


def _impulses(node: fx.Node, size: tuple[int, int], axis: int) -> Tensor:
    """Which positions an operator reads along one axis: a one at each of them in turn."""
    count = size[axis]
    ones = torch.eye(count).view((count, 1, count, 1) if axis == 0 else (count, 1, 1, count)).expand(-1, 1, *size)
    result = node.target(ones.contiguous(), *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return (result[:, 0].amax(2 - axis) != 0).T | (result[:, 0].amin(2 - axis) != 0).T


def adaptive_reads(size: int, target: int) -> Tensor:
    """``[target, size]``: the windows of adaptive pooling."""
    reads = torch.zeros((target, size), dtype=torch.bool)
    for position in range(target):
        reads[position, position * size // target : -(-(position + 1) * size // target)] = True
    return reads


def _windows(given: dict[str, Any], name: str, size: tuple[int, int], target: tuple[int, int]) -> Moves:
    if "conv" in name:
        kernel = tuple(given["weight"].meta["val"].shape[2:])
    else:
        kernel = pair(given["kernel_size"])
    stride = pair(given["stride"] or kernel)
    dilation = pair(given.get("dilation") or 1)
    padding = given.get("padding", 0)
    if padding == "same":
        padding = [dilation[axis] * (kernel[axis] - 1) // 2 for axis in range(2)]
    padding = (0, 0) if padding == "valid" else pair(padding)
    make = transposed if "conv_transpose" in name or given.get("transposed") else window
    return {
        2 + axis: make(size[axis], target[axis], kernel[axis], dilation[axis], stride[axis], padding[axis])
        for axis in range(2)
    }


def _pads(given: dict[str, Any], name: str, shape: Sequence[int]) -> Moves:
    numbers = list(given.get("pad") or given.get("padding"))  # type: ignore[arg-type]
    mode = given.get("mode", "constant")
    mode = "reflect" if "reflection" in name else "replicate" if "replication" in name else mode
    rank = len(shape)
    return {
        rank - 1 - number: padded(shape[rank - 1 - number], numbers[2 * number], numbers[2 * number + 1], mode)
        for number in range(len(numbers) // 2)
    }


def _cut(size: int, start: int, length: int, step: int = 1) -> Move:
    return window(size, length, 1, 1, step, -start)


def _pieces(given: dict[str, Any], name: str, shape: Sequence[int], results: Sequence[Tensor]) -> list[Moves]:
    dimension = given["dim"] % len(shape)
    found, start = [], 0
    for result in results:
        length = result.shape[dimension]
        found.append({dimension: _cut(shape[dimension], start, length)})
        start += length
    return found


def moves_of(node: fx.Node, results: Sequence[Tensor]) -> list[Moves] | None:
    """For each result of a node, what happened along which dimensions of its first argument; None: no rule."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source = node.args[0].meta.get("val")
    if not isinstance(source, Tensor):
        return None
    name = node.target._schema.name.removeprefix("aten::")
    given, shape, rank = arguments_of(node), source.shape, source.dim()
    size, target = (tuple(value.shape[2:4]) for value in (source, results[0]))
    if name in ("conv2d", "convolution", "conv_transpose2d", "max_pool2d", "max_pool2d_with_indices", "avg_pool2d"):
        return [_windows(given, name, size, target)] * len(results) if rank == 4 else None
    if name in ("adaptive_avg_pool2d", "adaptive_max_pool2d", "_adaptive_avg_pool2d"):
        return [{2 + axis: resized(adaptive_reads(size[axis], target[axis])) for axis in range(2)}] * len(results)
    if "upsample_" in name and rank == 4:
        return [_interpolation(node, given, size, target)]
    if name in ("pixel_shuffle", "pixel_unshuffle"):
        factor = list(given.values())[1]
        cells = [torch.eye(min(size[axis], target[axis]), dtype=torch.bool) for axis in range(2)]
        finer = [cell.repeat_interleave(factor, dim=0) for cell in cells]
        return [{2 + a: resized(finer[a] if name == "pixel_shuffle" else finer[a].T) for a in range(2)}]
    if name in ("pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d"):
        return [_pads(given, name, shape)]
    if name == "slice":
        dimension, step = given["dim"] % rank, given["step"]
        start = slice(given["start"], given["end"], step).indices(shape[dimension])[0]
        return [{dimension: _cut(shape[dimension], start, results[0].shape[dimension], step)}]
    if name == "narrow":
        dimension = given["dim"] % rank
        return [{dimension: _cut(shape[dimension], given["start"] % shape[dimension], given["length"])}]
    if name in ("split", "split_with_sizes", "chunk"):
        return _pieces(given, name, shape, results)
    if name == "flip":
        return [{dimension % rank: _flip(shape[dimension % rank]) for dimension in given["dims"]}]
    if name == "roll":
        dims = given["dims"]
        pairs = zip(given["shifts"], dims, strict=True) if dims else ()
        found: Moves = {}
        for shift, dimension in pairs:
            count = shape[dimension % rank]
            positions = [(position - shift) % count for position in range(count)]
            found[dimension % rank] = Move(table(positions, count), _rolled(shift % count))
        return [found]
    return None


def _flip(size: int) -> Move:
    return Move(table(list(reversed(range(size))), size), lambda canvas: canvas.reversed())


def _rolled(shift: int) -> Callable[[Canvas], Canvas]:
    return lambda canvas: canvas.taken([(position - shift) % canvas.size for position in range(canvas.size)])
