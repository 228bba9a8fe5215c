"""Where the result of each operator lies on the mask: the geometry of values, rule by rule.

What changes size keeps the canvas, what moves positions acts on it, windows that do not lie evenly over their map cut
it or add to it, and where values from different places meet, positions are active where either is. What no rule knows
is tried out (probe_movement.py); where that does not tell, every position behind it is active.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from fisedit_compile.passes.common.arguments import read_arguments
from fisedit_compile.passes.common.ir import spatial_of
from fisedit_compile.passes.common.layouts import HEIGHT, NCHW, WIDTH, Dimension, Spatial
from fisedit_compile.passes.common.reading.attentions import is_within
from fisedit_compile.passes.common.reading.convolutions import read_convolution
from fisedit_compile.passes.common.reading.moves import Crop, joined_axis, read_crops, read_turn, transposed
from fisedit_compile.passes.common.reading.patches import patch_stencil
from fisedit_compile.passes.common.reading.permutations import permutation
from fisedit_compile.passes.common.reading.resampling import pool_stencil, read_pad, read_resampling
from fisedit_compile.passes.common.reading.writes import stretch_of, written_tables
from fisedit_compile.passes.common.targets import (
    ATTENTIONS,
    CONVOLUTIONS,
    CROPS,
    GROUP_NORMS,
    JOINS,
    PADS,
    PER_POSITION,
    PERMUTES,
    POOLS,
    RESAMPLINGS,
    RESHAPES,
    RESOLUTION_CHANGES,
    SOFTMAXES,
    TURNS,
    WRITES,
    aten,
    is_elementwise,
)
from fisedit_compile.passes.domains.geometry.canvas import Canvas
from fisedit_compile.passes.domains.geometry.geometry import Geometry, Places, joined
from fisedit_compile.passes.domains.geometry.marked_runs import size_of
from fisedit_compile.passes.domains.geometry.probe_movement import MovementProbe
from fisedit_compile.private.operators import short_name
from fisedit_compile.runtime.cover import Term
from fisedit_compile.runtime.spec import Domain, Stencil
from fisedit_compile.runtime.taps import OUTSIDE, axis_taps

#: Poolings of windows, with or without a rule for rows.
WINDOW_POOLS = {
    aten.avg_pool2d.default,
    aten.max_pool2d.default,
    aten.max_pool2d_with_indices.default,
}
#: What mixes positions and keeps each one's place.
IN_PLACE = SOFTMAXES | GROUP_NORMS | {aten.cumsum.default, aten.log_softmax.int}
#: What works along one dimension, the order of its values and their places included.
ALONG_A_DIMENSION = {
    "argmax", "argmin", "argsort", "cummax", "cummin", "cumprod", "kthvalue", "max", "median", "min", "mode", "msort",
    "nanmedian", "sort", "topk",
}  # fmt: skip
PRODUCTS = {aten.matmul.default, aten.bmm.default}


def reads_of(stencil: Stencil) -> tuple[Tensor, Tensor]:
    """Which source rows each row of a stencil reads, bool ``[target, source]``, and which columns each column."""
    vertical, horizontal = axis_taps(stencil)
    return (
        _reads(vertical.source, stencil.source.height),
        _reads(horizontal.source, stencil.source.width),
    )


def _reads(taps: Tensor, size: int) -> Tensor:
    found = torch.zeros(taps.shape[0], size + 1, dtype=torch.bool)
    return found.scatter_(1, torch.where(taps == OUTSIDE, size, taps), True)[:, :size]


def _table_reads(table: Sequence[int], size: int) -> Tensor:
    return _reads(torch.tensor(table).view(-1, 1), size)


def _windows(stencil: Stencil) -> tuple[Callable[[Canvas], Canvas], Callable[[Canvas], Canvas]]:
    """What windows, ordinary or transposed, make of canvases."""

    def axis(kernel: str, name: str, size: int) -> Callable[[Canvas], Canvas]:
        numbers = [stencil.integer(f"{what}_{name}") for what in ("dilation", "stride", "padding")]
        dilation, stride, padding = numbers
        make = Canvas.transposed_windows if stencil.kind == "transposed" else Canvas.windows
        return lambda canvas: make(canvas, stencil.integer(kernel), dilation, stride, padding, size)

    target = stencil.target
    return axis("kernel_height", "y", target.height), axis("kernel_width", "x", target.width)


class Movement:
    """Finds the geometry of each value of one graph, in the order of the graph.

    Args:
        places: makes geometries.
        derived: all nodes that depend on a spatial input.
    """

    def __init__(self, places: Places, derived: dict[fx.Node, None]) -> None:
        self.places = places
        self._derived = derived
        self._geometries: dict[fx.Node, Geometry] = {}
        self._probe = MovementProbe(derived)
        #: (value, reader) -> the value at the reader's place, as an earlier run left it.
        self.aliases: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
        #: Values whose rows are computed from the same rows of their operands.
        self.on_rows: set[fx.Node] = set()
        #: Values behind operators of which it is not known how they move positions, with the reason.
        self.lost: dict[fx.Node, str] = {}

    def input(self, node: fx.Node) -> None:
        """A spatial input of the graph."""
        spatial = spatial_of(node)
        assert spatial is not None
        self._geometries[node] = self.places.input(spatial.domain)

    def geometry(self, node: fx.Node) -> Geometry:
        """That of a spatial value that was placed before."""
        return self._geometries[node]

    def put(self, node: fx.Node, geometry: Geometry) -> None:
        """Say where a value lies."""
        self._geometries[node] = geometry

    def place(self, node: fx.Node, layout: Spatial, inferred: bool) -> Spatial:
        """Find where a value lies.

        Args:
            node: not placed yet; its operands are.
            layout: its layout as far as sizes tell.
            inferred: whether the rule of a family told it, so that rows are computed from rows.

        Returns:
            The layout with the domain's cover.
        """
        geometry = self._of(node, layout, inferred)
        self._geometries[node] = geometry
        domain = layout.domain
        return Spatial(Domain(domain.height, domain.width, cover=geometry.cover), layout.dims)

    def _of(self, node: fx.Node, layout: Spatial, inferred: bool) -> Geometry:
        moved = self._moved(node, layout, inferred)
        if moved is not None:
            return moved
        domain = layout.domain.whole
        here = [value for value in _maps(node) if size_of(value) == domain]
        if node.target in ATTENTIONS and here and node.args[0] is here[0] and not is_within(node):
            return self.places.with_everything(self.geometry(here[0]), domain)
        stays = inferred or is_elementwise(node.target) or node.target in IN_PLACE or node.target in PER_POSITION
        if stays and here:
            if inferred:
                self.on_rows.add(node)
            # A softmax over channels is inferred, and mixes no positions.
            found = self.met(node, here)
            mixes = node.target in GROUP_NORMS or (node.target in IN_PLACE and not inferred)
            return self.places.with_everything(found, domain) if mixes else found
        if (within := _along_channels(node)) is not None and size_of(within) == domain:
            return self.met(node, [within])
        if node.target in PRODUCTS and (kept := _row_operand(node, layout)) is not None:
            return self.places.with_everything(self.geometry(kept), domain)
        return self._tried(node, layout)

    def met(self, node: fx.Node, operands: Sequence[fx.Node]) -> Geometry:
        """That of what an operator makes of maps of one size, position by position.

        Operands that are no such maps but were made from one depend on everything.
        """
        domain = size_of(operands[0])
        found = self.places.met(domain, [self.geometry(value) for value in operands])
        reads = node.all_input_nodes if node.target is not operator.getitem else ()
        others = any(value in self._derived and value not in operands for value in reads)
        return self.places.with_everything(found, domain) if others else found

    def _moved(self, node: fx.Node, layout: Spatial, inferred: bool) -> Geometry | None:
        """The geometry of what resizes or moves by a rule; None for anything else."""
        x = node.args[0] if node.args else None
        source = spatial_of(x)
        target = node.target
        if target in JOINS:
            return self._joined(node, layout)
        if not isinstance(x, fx.Node) or source is None:
            return None
        if target is operator.getitem:
            return None
        if target in WRITES and inferred:
            stretch = stretch_of(node)
            return None if stretch is None else self._written(node, layout.domain.whole, *stretch)
        if target in CROPS and (crops := read_crops(node, source)) is not None:
            return self.cropped(x, crops[0], layout.domain)
        if target in TURNS and not isinstance(tables := read_turn(node, source), str):
            return self._by_tables(x, layout.domain, tables)
        if target in PERMUTES and len(source.dims) == len(layout.dims):
            order = permutation(node, len(source.dims))
            return self._transposed(x) if transposed([source.dims[dim] for dim in order]) else None
        if inferred and target in RESHAPES and source.domain.whole != layout.domain.whole:
            return self._in_patches(x, layout.domain)
        if target in PADS and source.space_rank == 2 and not isinstance(pad := read_pad(node, source.dims), str):
            return self._padded(node, x, layout.domain, pad)
        if source.dims != NCHW or target not in RESOLUTION_CHANGES:
            return None
        return self._resized(node, x, layout.domain.whole)

    def cropped(self, x: fx.Node, crop: Crop, domain: Domain) -> Geometry:
        """That of a part of a value along height or width."""
        stencil = crop.stencil(size_of(x), domain.whole)
        return self._windowed(x, stencil)

    def _windowed(self, x: fx.Node, stencil: Stencil) -> Geometry:
        vertical, horizontal = _windows(stencil)
        return self.places.windowed(self.geometry(x), stencil.target.whole, reads_of(stencil), vertical, horizontal)

    def _by_tables(self, x: fx.Node, domain: Domain, tables: tuple[Sequence[int], Sequence[int]]) -> Geometry:
        """That of rows and columns that are taken one by one."""
        size = size_of(x)
        reads = (_table_reads(tables[0], size.height), _table_reads(tables[1], size.width))
        return self.places.windowed(
            self.geometry(x),
            domain.whole,
            reads,
            lambda canvas: _taken(canvas, tables[0]),
            lambda canvas: _taken(canvas, tables[1]),
        )

    def _transposed(self, x: fx.Node) -> Geometry:
        size = size_of(x)
        return self.places.transposed(self.geometry(x), Domain(size.width, size.height))

    def _in_patches(self, x: fx.Node, domain: Domain) -> Geometry:
        """That of a map cut into patches, or put together from them."""
        size = size_of(x)
        cut = domain.size < size.size
        fine, coarse = (size, domain) if cut else (domain, size)
        factors = (fine.height // coarse.height, fine.width // coarse.width)
        return self._sized(x, patch_stencil(cut, size, domain.whole, factors))

    def _sized(self, x: fx.Node, stencil: Stencil) -> Geometry:
        """That of a resize whose taps are known."""
        height, width = stencil.target.height, stencil.target.width
        return self.places.windowed(
            self.geometry(x),
            stencil.target.whole,
            reads_of(stencil),
            lambda canvas: canvas.resized(height),
            lambda canvas: canvas.resized(width),
        )

    def _padded(
        self, node: fx.Node, x: fx.Node, domain: Domain, pad: tuple[dict[Dimension, tuple[int, int]], str]
    ) -> Geometry:
        source = spatial_of(x)
        assert source is not None
        stencil = read_resampling(node, source.domain.whole, domain.whole, source.dims)
        assert isinstance(stencil, Stencil)
        named, mode = pad
        if mode != "constant":
            vertical, horizontal = axis_taps(stencil)
            return self._by_tables(x, domain, (vertical.source[:, 0].tolist(), horizontal.source[:, 0].tolist()))
        (top, bottom), (left, right) = named[HEIGHT], named[WIDTH]
        return self.places.windowed(
            self.geometry(x),
            domain.whole,
            reads_of(stencil),
            lambda canvas: canvas.padded(top, bottom),
            lambda canvas: canvas.padded(left, right),
        )

    def _resized(self, node: fx.Node, x: fx.Node, domain: Domain) -> Geometry:
        """That of convolutions, poolings and resizes of ``[B, C, H, W]``, whether or not they have a rule for rows."""
        size = size_of(x)
        if node.target in CONVOLUTIONS:
            convolution = read_convolution(node)
            if isinstance(convolution, str):
                return self.places.unknown(domain)
            return self._windowed(x, convolution.stencil(size, domain))
        if node.target in WINDOW_POOLS:
            return self._windowed(x, pool_stencil(size, domain, read_arguments(node)))
        if node.target in RESAMPLINGS and node.target not in POOLS:
            stencil = read_resampling(node, size, domain)
            if isinstance(stencil, Stencil):
                return self._sized(x, stencil)
        geometry = self.geometry(x)
        reads = self._probe.resize_reads(node, size, domain)
        cone = self.places.everything(domain) if reads is None else self.places.seen(geometry.cone, reads, domain)
        return self.places.resized(geometry, domain, cone)

    def _joined(self, node: fx.Node, layout: Spatial) -> Geometry | None:
        """That of values joined along space; None where they are joined along channels."""
        values = node.args[0]
        assert isinstance(values, (list, tuple))
        known = next((spatial for value in values if (spatial := spatial_of(value)) is not None), None)
        axis = joined_axis(node, known) if known is not None else None
        if known is None or axis is None or len(known.dims) != len(layout.dims):
            return None
        domain = layout.domain.whole
        nodes = [value for value in values if isinstance(value, fx.Node) and spatial_of(value) is not None]
        if len(nodes) < len(values):
            return None
        geometries = [self.geometry(value) for value in nodes]
        if any(geometry.unknown for geometry in geometries):
            return self.places.unknown(domain)
        number = 0 if axis == HEIGHT else 1
        found = joined([geometry.places for geometry in geometries], number)
        cone: list[Term] = []
        at = 0
        for value, geometry in zip(nodes, geometries, strict=True):
            size = size_of(value)
            sizes = (size.height, size.width)
            tables = [list(range(domain.height)), list(range(domain.width))]
            tables[number] = [
                place - at if at <= place < at + sizes[number] else OUTSIDE for place in range(len(tables[number]))
            ]
            reads = (_table_reads(tables[0], size.height), _table_reads(tables[1], size.width))
            cone += self.places.seen(geometry.cone, reads, domain)
            at += sizes[number]
        return self.places.made(domain, found, cone)

    def _written(self, node: fx.Node, domain: Domain, axis: Dimension, start: int, end: int) -> Geometry:
        """That of a map of which a stretch of rows or columns is written over: what is left, and what was written."""
        whole, part = node.args[:2]
        assert isinstance(whole, fx.Node) and isinstance(part, fx.Node)
        geometries = [self.geometry(whole), self.geometry(part)]
        if any(geometry.unknown for geometry in geometries):
            return self.places.unknown(domain)
        number = 0 if axis == HEIGHT else 1
        size = (domain.height, domain.width)[number]
        stretches = [(geometries[0], 0, start), (geometries[1], 0, end - start), (geometries[0], end, size)]
        found = joined(
            [geometry.cut(number, first, last) for geometry, first, last in stretches if first < last], number
        )
        cone: list[Term] = []
        for value, geometry, table in zip((whole, part), geometries, written_tables(size, start, end), strict=True):
            tables: list[Sequence[int]] = [range(domain.height), range(domain.width)]
            tables[number] = table
            own = size_of(value)
            reads = (_table_reads(tables[0], own.height), _table_reads(tables[1], own.width))
            cone += self.places.seen(geometry.cone, reads, domain)
        return self.places.made(domain, found, cone)

    def _tried(self, node: fx.Node, layout: Spatial) -> Geometry:
        """That of what no rule knows."""
        domain = layout.domain.whole
        found = self._probe.movement(node, layout)
        if isinstance(found, str):
            self.lost[node] = found
            return self.places.unknown(domain)
        if found.tables is not None:
            return self._by_tables(found.sources[0], domain, found.tables)
        geometries = [self.geometry(source) for source in found.sources]
        everything = self.places.everything(domain)
        if any(size_of(source) != domain for source in found.sources):
            geometries = [self.places.resized(geometry, domain, everything) for geometry in geometries]
        return self.places.with_everything(self.places.met(domain, geometries), domain)


def _taken(canvas: Canvas, table: Sequence[int]) -> Canvas:
    """What a table leaves of a canvas; one that turns all positions around turns their insides as well."""
    if list(table) == list(range(int(canvas.size)))[::-1]:
        return canvas.reversed()
    return canvas.taken(table)


def _maps(node: fx.Node) -> list[fx.Node]:
    """The operands of a node that are maps."""
    return [value for value in dict.fromkeys(node.all_input_nodes) if spatial_of(value) is not None]


def _along_channels(node: fx.Node) -> fx.Node | None:
    """The map of which an operator, or the one of which this is a result, orders or selects channels."""
    maker = node.args[0] if node.target is operator.getitem else node
    if not isinstance(maker, fx.Node) or short_name(maker.target) not in ALONG_A_DIMENSION:
        return None
    x, spatial = maker.args[0], spatial_of(maker.args[0])
    dim = read_arguments(maker).get("dim")
    if not isinstance(x, fx.Node) or spatial is None or not isinstance(dim, int):
        return None
    return x if dim % len(spatial.dims) in spatial.channel_dims else None


def _row_operand(node: fx.Node, layout: Spatial) -> fx.Node | None:
    """The operand of a matrix product whose positions are those of the product, row by row or column by column."""
    if len(node.args) != 2:
        return None
    for at, operand in enumerate(node.args):
        spatial = spatial_of(operand)
        if spatial is None or spatial.domain.whole != layout.domain.whole or len(spatial.dims) != len(layout.dims):
            continue
        contracted = len(spatial.dims) - 1 if at == 0 else len(spatial.dims) - 2
        if spatial.space_dims == layout.space_dims and contracted not in spatial.space_dims:
            assert isinstance(operand, fx.Node)
            return operand
    return None
