"""What moves positions and computes nothing: which positions crops, flips, rolls, joins and transpositions read."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from fisedit_compile.passes.common.arguments import read_arguments
from fisedit_compile.passes.common.ir import shape_of
from fisedit_compile.passes.common.layouts import HEIGHT, WIDTH, Dimension, Spatial
from fisedit_compile.passes.common.meta import VALUE
from fisedit_compile.passes.common.targets import aten
from fisedit_compile.runtime.spec import Domain, Stencil

AXES = (HEIGHT, WIDTH)


@dataclass(frozen=True)
class Crop:
    """Every ``step``-th position from ``start`` on, ``length`` of them, along height or width."""

    axis: Dimension
    start: int
    step: int
    length: int

    def target(self, source: Domain) -> Domain:
        """The resulting size."""
        if self.axis == HEIGHT:
            return Domain(self.length, source.width)
        return Domain(source.height, self.length)

    def stencil(self, source: Domain, target: Domain) -> Stencil:
        """Windows of one position."""
        tall = self.axis == HEIGHT
        return Stencil.of(
            "window",
            source,
            target,
            kernel_height=1,
            kernel_width=1,
            stride_y=self.step if tall else 1,
            stride_x=1 if tall else self.step,
            padding_y=-self.start if tall else 0,
            padding_x=0 if tall else -self.start,
            dilation_y=1,
            dilation_x=1,
        )


def read_crops(node: fx.Node, spatial: Spatial) -> list[Crop] | None:
    """The results of a cut along height or width; None when it cuts along another dimension."""
    given = read_arguments(node)
    dim = int(given["dim"]) % len(spatial.dims)
    axis, size = spatial.dims[dim], shape_of(node.args[0])[dim]  # type: ignore[arg-type]
    if axis not in AXES:
        return None
    if node.target is aten.slice.Tensor:
        start, _, step = slice(given["start"], given["end"], given["step"]).indices(size)
        return [Crop(axis, start, step, shape_of(node)[dim])]
    if node.target is aten.narrow.default:
        start = int(given["start"])
        return [Crop(axis, start + size if start < 0 else start, 1, int(given["length"]))]
    lengths = [int(value.shape[dim]) for value in node.meta[VALUE]]
    starts = itertools.accumulate(lengths, initial=0)
    return [Crop(axis, start, 1, length) for start, length in zip(starts, lengths, strict=False)]


def read_turn(node: fx.Node, spatial: Spatial) -> tuple[tuple[int, ...], tuple[int, ...]] | str:
    """Which row each row of a flip or roll is, and which column each column; or why that cannot be told."""
    given = read_arguments(node)
    rank, domain = len(spatial.dims), spatial.domain
    tables = {HEIGHT: list(range(domain.height)), WIDTH: list(range(domain.width))}
    dims = [int(dim) % rank for dim in given["dims"]]
    shifts = given.get("shifts")
    if not dims or (shifts is not None and len(shifts) != len(dims)):
        return "it rolls all dimensions as one"
    for number, dim in enumerate(dims):
        name = spatial.dims[dim]
        if name not in AXES:
            if name in spatial.dims and dim in spatial.channel_dims:
                continue
            return "it turns samples, or rows and columns as one"
        table = tables[name]
        if shifts is None:
            tables[name] = table[::-1]
        else:
            by = int(shifts[number]) % len(table)
            tables[name] = table[-by:] + table[:-by] if by else table
    return tuple(tables[HEIGHT]), tuple(tables[WIDTH])


def joined_axis(node: fx.Node, spatial: Spatial) -> Dimension | None:
    """Height or width if values are joined along it, else None."""
    if node.target is aten.stack.default:
        return None
    name = spatial.dims[int(read_arguments(node)["dim"]) % len(spatial.dims)]
    return name if name in AXES else None


def transposed(dims: Sequence[Dimension]) -> bool:
    """Whether columns come in front of rows."""
    return HEIGHT in dims and WIDTH in dims and dims.index(WIDTH) < dims.index(HEIGHT)
