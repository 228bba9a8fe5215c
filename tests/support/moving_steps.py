"""The steps of random networks: each appends operators that move positions, or change their number, to a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from fisedit_compile.private.graphs import FakeTensorMode

aten = torch.ops.aten

LEAST, MOST = 5, 34  # positions along an axis


class Choices(Protocol):
    """Where a network's random choices come from."""

    def whole(self, least: int, most: int) -> int:
        """A number from ``least`` to ``most``."""

    def one(self, values: Sequence[Any]) -> Any:
        """One of these."""


@dataclass
class Writer:
    """Appends operators to a graph; each runs once, on zeros, so that sizes are known."""

    choices: Choices
    graph: fx.Graph = field(default_factory=fx.Graph)
    mode: Any = field(default_factory=lambda: FakeTensorMode(allow_non_fake_inputs=True))
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    maps: list[fx.Node] = field(default_factory=list)
    values: dict[fx.Node, Tensor] = field(default_factory=dict)

    def input(self, name: str, *shape: int) -> fx.Node:
        """A graph input, placed behind the others."""
        rest = [node for node in self.graph.nodes if node.op != "placeholder"]
        if rest:
            with self.graph.inserting_before(rest[0]):
                node = self.graph.placeholder(name)
        else:
            node = self.graph.placeholder(name)
        self.shapes.append(shape)
        return self._noted(node, torch.zeros(shape))

    def _noted(self, node: fx.Node, value: Tensor) -> fx.Node:
        with self.mode:
            node.meta["val"] = torch.empty(value.shape)
        self.values[node] = value
        return node

    def weight(self, *shape: int) -> fx.Node:
        """A new weight."""
        return self.input(f"weight_{len(self.shapes) - 1}", *shape)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of an operator with one result."""
        node = self.graph.call_function(target, args, kwargs)
        given: Any = fx.node.map_arg((args, kwargs), lambda value: self.values[value])
        return self._noted(node, target(*given[0], **given[1]))

    def size(self, x: fx.Node) -> tuple[int, int]:
        """Height and width of a map."""
        return x.meta["val"].shape[2], x.meta["val"].shape[3]

    def channels(self, x: fx.Node) -> int:
        """Number of channels of a map."""
        return x.meta["val"].shape[1]

    def note(self, step: str) -> None:
        """Add to the description."""
        self.steps.append(step)

    # Steps: each takes a map and returns one.

    def convolution(self, x: fx.Node, strides: Sequence[int] = (1, 1, 1, 2, 3)) -> fx.Node:
        """Any kernel, stride, dilation and padding that leaves enough positions."""
        pick, size = self.choices, self.size(x)
        kernel = [pick.whole(1, 5) for _ in range(2)] if pick.whole(0, 2) == 0 else [3, 3]
        dilation, stride = [pick.one((1, 1, 2)) for _ in range(2)], [pick.one(strides) for _ in range(2)]
        padding: Any = [pick.whole(0, kernel[axis]) for axis in range(2)]
        if pick.whole(0, 2):
            padding = [dilation[axis] * (kernel[axis] - 1) // 2 for axis in range(2)]
        if stride == [1, 1] and pick.whole(0, 5) == 0:
            padding = "same"
        for axis in range(2):
            around = 0 if padding == "same" else 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1)
            if (size[axis] + around - 1) // stride[axis] + 1 < LEAST or size[axis] + around > MOST:
                kernel, dilation, stride, padding = [3, 3], [1, 1], [1, 1], [1, 1]
                break
        channels = pick.whole(2, 4)
        weight, bias = self.weight(channels, self.channels(x), *kernel), self.weight(channels)
        self.note(f"conv k{kernel} s{stride} p{padding} d{dilation}")
        if padding == "same":
            return self.call(aten.conv2d.padding, x, weight, bias, stride, padding, dilation)
        return self.call(aten.conv2d.default, x, weight, bias, stride, padding, dilation)

    def mixed(self, x: fx.Node, channels: int) -> fx.Node:
        """A pointwise convolution to a number of channels."""
        weight, bias = self.weight(channels, self.channels(x), 1, 1), self.weight(channels)
        return self.call(aten.conv2d.default, x, weight, bias)

    def transposed(self, x: fx.Node) -> fx.Node:
        """A transposed convolution."""
        pick, size = self.choices, self.size(x)
        stride, kernel = pick.whole(1, 3), pick.whole(1, 4)
        dilation, padding = pick.one((1, 1, 2)), pick.whole(0, 2)
        extra = pick.whole(0, max(stride, dilation) - 1)
        sizes = [(n - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1 + extra for n in size]
        if min(sizes) < LEAST or max(sizes) > MOST:
            return x
        channels = pick.whole(2, 4)
        weight, bias = self.weight(self.channels(x), channels, kernel, kernel), self.weight(channels)
        self.note(f"transposed k{kernel} s{stride} p{padding} o{extra} d{dilation}")
        pairs = [[value, value] for value in (stride, padding, extra)]
        return self.call(aten.conv_transpose2d.input, x, weight, bias, *pairs, 1, [dilation, dilation])

    def pointwise(self, x: fx.Node) -> fx.Node:
        """An activation or a number."""
        target = self.choices.one((aten.silu.default, aten.gelu.default, aten.tanh.default, aten.sigmoid.default))
        self.note(str(target).split(".")[1])
        return self.call(target, x)

    def pad(self, x: fx.Node) -> fx.Node:
        """Padding of any mode, sometimes with negative numbers."""
        pick, size = self.choices, self.size(x)
        mode = pick.one(("constant", "constant", "reflect", "replicate", "circular"))
        numbers = [pick.whole(0, 4) for _ in range(4)]
        if mode == "constant" and pick.whole(0, 3) == 0:
            numbers[pick.whole(0, 3)] = -pick.whole(1, 3)
        return self.padded(x, numbers, mode) if self._fits(size, numbers) else x

    def _fits(self, size: tuple[int, int], numbers: Sequence[int]) -> bool:
        height, width = size[0] + numbers[2] + numbers[3], size[1] + numbers[0] + numbers[1]
        return LEAST <= min(height, width) and max(height, width) <= MOST

    def padded(self, x: fx.Node, numbers: Sequence[int], mode: str) -> fx.Node:
        """Padding by left, right, top and bottom."""
        self.note(f"pad {list(numbers)} {mode}")
        value = {"value": 0.5} if mode == "constant" and self.choices.whole(0, 1) else {}
        return self.call(aten.pad.default, x, list(numbers), mode, **value)

    def pad_to_multiple(self, x: fx.Node) -> fx.Node:
        """Padding at the right and below, as restoration networks do."""
        factor, size = self.choices.one((4, 8)), self.size(x)
        numbers = [0, -size[1] % factor, 0, -size[0] % factor]
        if not self._fits(size, numbers):
            return x
        return self.padded(x, numbers, self.choices.one(("constant", "reflect", "replicate", "circular")))

    def crop(self, x: fx.Node) -> fx.Node:
        """A slice of one axis, sometimes of every second position."""
        pick, axis = self.choices, self.choices.whole(0, 1)
        count = self.size(x)[axis]
        start, end = pick.whole(0, 3), count - pick.whole(0, 3)
        step = pick.one((1, 1, 1, 2))
        if len(range(start, end, step)) < LEAST:
            return x
        return self.cut(x, axis, start, end, step)

    def cut(self, x: fx.Node, axis: int, start: int, end: int, step: int = 1) -> fx.Node:
        """A slice along an axis."""
        self.note(f"slice {'hw'[axis]}[{start}:{end}:{step}]")
        return self.call(aten.slice.Tensor, x, 2 + axis, start, end, step)

    def flip(self, x: fx.Node) -> fx.Node:
        """A flip of one or both axes."""
        dims = self.choices.one(([2], [3], [-1], [2, 3]))
        self.note(f"flip {dims}")
        return self.call(aten.flip.default, x, dims)

    def roll(self, x: fx.Node) -> fx.Node:
        """A cyclic shift."""
        shifts, dims = [self.choices.whole(-4, 4), self.choices.whole(-4, 4)], [2, 3]
        self.note(f"roll {shifts}")
        return self.call(aten.roll.default, x, shifts, dims)

    def transposition(self, x: fx.Node) -> fx.Node:
        """An exchange of height and width."""
        self.note("transpose")
        if self.choices.whole(0, 1):
            return self.call(aten.permute.default, x, [0, 1, 3, 2])
        return self.call(aten.transpose.int, x, 2, 3)

    def resize(self, x: fx.Node) -> fx.Node:
        """A resize to any size, or twice as large."""
        pick, size = self.choices, self.size(x)
        if pick.whole(0, 2) == 0 and 2 * max(size) <= MOST:
            return self.resized(x, (2 * size[0], 2 * size[1]))
        return self.resized(x, tuple(max(LEAST, min(MOST, n * pick.whole(2, 8) // 5)) for n in size))

    def resized(self, x: fx.Node, size: Sequence[int]) -> fx.Node:
        """A resize of any mode to a size."""
        mode = self.choices.one(("nearest", "nearest-exact", "bilinear", "bilinear", "bicubic"))
        self.note(f"resize {mode} {list(size)}")
        if mode == "nearest":
            return self.call(aten.upsample_nearest2d.vec, x, list(size), None)
        if mode == "nearest-exact":
            return self.call(aten._upsample_nearest_exact2d.vec, x, list(size), None)
        target = aten.upsample_bicubic2d.vec if mode == "bicubic" else aten.upsample_bilinear2d.vec
        aligned = bool(self.choices.whole(0, 1))
        self.steps[-1] += " aligned" if aligned else ""
        return self.call(target, x, list(size), aligned, None)

    def adaptive(self, x: fx.Node) -> fx.Node:
        """Adaptive pooling."""
        size = [max(LEAST, n * self.choices.whole(2, 6) // 6) for n in self.size(x)]
        self.note(f"adaptive {size}")
        return self.call(aten.adaptive_avg_pool2d.default, x, size)

    def pool(self, x: fx.Node) -> fx.Node:
        """Pooling by maximum or average, padded or not, rounded up or down."""
        pick = self.choices
        kernel, stride, ceil = pick.whole(2, 3), pick.whole(1, 3), bool(pick.whole(0, 1))
        padding = pick.whole(0, 1)
        if (min(self.size(x)) + 2 * padding - kernel) // stride + 1 < LEAST:
            return x
        average = pick.whole(0, 1)
        self.note(f"{'average' if average else 'maximum'} pool k{kernel} s{stride} p{padding} {'ceil' if ceil else ''}")
        pairs = [[value, value] for value in (kernel, stride, padding)]
        if average:
            return self.call(aten.avg_pool2d.default, x, *pairs, ceil)
        return self.call(aten.max_pool2d.default, x, *pairs, [1, 1], ceil)

    def shuffle(self, x: fx.Node) -> fx.Node:
        """A pixel shuffle, or the reverse of one."""
        if 2 * max(self.size(x)) <= MOST and self.choices.whole(0, 1):
            self.note("pixel shuffle")
            return self.call(aten.pixel_shuffle.default, self.mixed(x, 12), 2)
        for axis, count in enumerate(self.size(x)):
            if count // 2 < LEAST:
                return x
            if count % 2:
                x = self.cut(x, axis, 0, count - 1)
        self.note("pixel unshuffle")
        return self.mixed(self.call(aten.pixel_unshuffle.default, x, 2), 3)

    def join(self, x: fx.Node) -> fx.Node:
        """A concatenation along an axis: of the parts of a map in another order, or of different maps."""
        pick, axis = self.choices, self.choices.whole(0, 1)
        count = self.size(x)[axis]
        others = [
            other
            for other in self.maps
            if self.size(other)[1 - axis] == self.size(x)[1 - axis] and self.size(other)[axis] + count <= MOST
        ]
        if others and pick.whole(0, 1):
            other = self.mixed(pick.one(others), self.channels(x))
            parts = [x, other] if pick.whole(0, 1) else [other, x]
        else:
            middle = pick.whole(1, count - 1)
            parts = [self.cut(x, axis, 0, middle), self.cut(x, axis, middle, count)]
            parts[0] = self.pointwise(parts[0])
            parts = parts if pick.whole(0, 2) == 0 else parts[::-1]
        self.note(f"join along {'hw'[axis]}")
        return self.call(aten.cat.default, parts, 2 + axis)

    def write(self, x: fx.Node) -> fx.Node:
        """A stretch of rows or columns that is written over: by what lies there, or by a part of another map."""
        pick, axis = self.choices, self.choices.whole(0, 1)
        count = self.size(x)[axis]
        start = pick.whole(0, count - 2)
        end = pick.whole(start + 1, count)
        alike = [other for other in self.maps if self.size(other) == self.size(x)]
        other = pick.one(alike) if alike and pick.whole(0, 1) else x
        first = pick.whole(0, count - (end - start)) if pick.whole(0, 2) == 0 else start
        part = self.mixed(self.cut(other, axis, first, first + end - start), self.channels(x))
        self.note(f"write over {'hw'[axis]}[{start}:{end}]")
        return self.call(aten.slice_scatter.default, x, part, 2 + axis, start, end)

    def fitted(self, x: fx.Node, size: tuple[int, int]) -> fx.Node:
        """A map padded, cropped or resized to a size."""
        if self.size(x) == size:
            return x
        if self.choices.whole(0, 3) == 0:
            return self.resized(x, size)
        numbers = []
        for axis in (1, 0):
            difference = size[axis] - self.size(x)[axis]
            before = self.choices.one((0, difference // 2, difference))
            numbers += [before, difference - before]
        return self.padded(x, numbers, "constant")

    def skip(self, x: fx.Node) -> fx.Node:
        """An earlier map, fitted and added, multiplied or joined along the channels."""
        other = self.choices.one(self.maps)
        return self.together(x, self.fitted(other, self.size(x)))

    def together(self, x: fx.Node, other: fx.Node) -> fx.Node:
        """Two maps of one size as one."""
        way = self.choices.one(("add", "multiply", "channels"))
        self.note(f"meet by {way}")
        if way == "channels":
            joined = self.call(aten.cat.default, [x, other], 1)
            return self.mixed(joined, 3) if self.channels(joined) > 5 else joined
        other = other if self.channels(other) == self.channels(x) else self.mixed(other, self.channels(x))
        return self.call(aten.add.Tensor if way == "add" else aten.mul.Tensor, x, other)

    def group_norm(self, x: fx.Node) -> fx.Node:
        """Group normalisation in one group."""
        self.note("group norm")
        return self.call(aten.group_norm.default, x, 1, self.weight(self.channels(x)), self.weight(self.channels(x)))

    def channel_norm(self, x: fx.Node) -> fx.Node:
        """Normalisation of each position over its channels, written out."""
        self.note("channel norm")
        centered = self.call(aten.sub.Tensor, x, self.call(aten.mean.dim, x, [1], True))
        square = self.call(aten.mean.dim, self.call(aten.mul.Tensor, centered, centered), [1], True)
        deviation = self.call(aten.rsqrt.default, self.call(aten.add.Tensor, square, 1e-2))
        return self.call(aten.mul.Tensor, centered, deviation)

    def attention(self, x: fx.Node) -> fx.Node:
        """Self-attention of all positions, added to the map."""
        self.note("attention")
        batch, channels, height, width = x.meta["val"].shape
        tokens = self.call(aten.transpose.int, self.call(aten.flatten.using_ints, x, 2, 3), 1, 2)
        query, key, value = (self.call(aten.linear.default, tokens, self.weight(channels, channels)) for _ in range(3))
        attended = self.call(aten.scaled_dot_product_attention.default, query, key, value)
        back = self.call(aten.transpose.int, attended, 1, 2)
        return self.call(aten.add.Tensor, x, self.call(aten.reshape.default, back, [batch, channels, height, width]))

    def levels(self, x: fx.Node, depth: int = 2) -> fx.Node:
        """An encoder and a decoder, whose sizes are made to fit."""
        if depth == 0 or min(self.size(x)) < 2 * LEAST + 2:
            return self.convolution(x, (1,))
        skip, way = self.convolution(x, (1,)), self.choices.whole(0, 2)
        self.note("{")
        if way == 0:
            weight, bias = self.weight(3, self.channels(skip), 3, 3), self.weight(3)
            lower = self.call(aten.conv2d.default, skip, weight, bias, [2, 2], [1, 1])
        elif way == 1:
            lower = self.call(aten.avg_pool2d.default, skip, [2, 2], [2, 2])
        else:
            numbers = [0, 1, 0, 1]
            weight, bias = self.weight(3, self.channels(skip), 3, 3), self.weight(3)
            lower = self.call(aten.conv2d.default, self.padded(skip, numbers, "constant"), weight, bias, [2, 2])
        lower = self.levels(self.pointwise(lower), depth - 1)
        height, width = self.size(lower)
        up = self.choices.whole(0, 2)
        if up == 0:
            lower = self.resized(lower, self.size(skip))
        elif up == 1 and 2 * max(height, width) <= MOST:
            lower = self.resized(lower, (2 * height, 2 * width))
        elif 2 * max(height, width) <= MOST:
            weight, bias = self.weight(self.channels(lower), 3, 2, 2), self.weight(3)
            lower = self.call(aten.conv_transpose2d.input, lower, weight, bias, [2, 2])
        self.note(f"}} up {('resized', 'doubled', 'transposed')[up]}")
        if self.choices.whole(0, 1):
            return self.together(skip, self.fitted(lower, self.size(skip)))
        return self.together(lower, self.fitted(skip, self.size(lower)))


STEPS: dict[str, Callable[[Writer, fx.Node], fx.Node]] = {
    "convolution": Writer.convolution,
    "pointwise": Writer.pointwise,
    "transposed": Writer.transposed,
    "pad": Writer.pad,
    "pad to multiple": Writer.pad_to_multiple,
    "crop": Writer.crop,
    "flip": Writer.flip,
    "roll": Writer.roll,
    "transposition": Writer.transposition,
    "resize": Writer.resize,
    "adaptive": Writer.adaptive,
    "pool": Writer.pool,
    "shuffle": Writer.shuffle,
    "join": Writer.join,
    "write": Writer.write,
    "skip": Writer.skip,
    "levels": Writer.levels,
}

#: Steps that read the whole map, or all channels of a position.
JOINED: dict[str, Callable[[Writer, fx.Node], fx.Node]] = {
    "group norm": Writer.group_norm,
    "channel norm": Writer.channel_norm,
    "attention": Writer.attention,
}
