"""Stencils over rows: convolution, and the taps that pooling, resizing, padding and pixel shuffling read.

A table, int64 ``[1 or B, N, K]``, says where tap k of target row n is: below ``N_source`` in the rows of the source,
then in the halo (positions of the recorded source), and last the fill slot for taps outside the map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisedit_compile.operators.library import Measuring, Operator
from fisedit_compile.operators.records import dtype_name, typical_count

#: Under which names times are kept and choices counted: of rows, and of whole maps.
MEASURED, MEASURED_MAPS = "convolution", "convolution of a map"


#: Height and width of the map on which ways to convolve whole maps are measured; all take a time proportional to the
#: positions.
EXAMPLE = 32


class ConvolutionCase(NamedTuple):
    """What the time of a 3x3 convolution at active rows depends on.

    Attributes:
        batch, height, width: of the map.
        inputs, outputs: channels.
        dtype: of the rows.
        rows: a typical count of active rows.
        eighths: how full tiles are, in eighths.
    """

    batch: int
    height: int
    width: int
    inputs: int
    outputs: int
    dtype: str
    rows: int
    eighths: int

    @staticmethod
    def of(
        batch: int, height: int, width: int, inputs: int, outputs: int, rows: int, tiles: int, dtype: torch.dtype
    ) -> ConvolutionCase:
        """The case of so many rows in so many tiles; equal for cases whose times are alike."""
        eighths = round(8 * rows / max(4 * tiles, 1))
        return ConvolutionCase(batch, height, width, inputs, outputs, dtype_name(dtype), typical_count(rows), eighths)

    @property
    def shape(self) -> tuple[int, int, int, int, int, str]:
        """What does not depend on the mask: batch, height, width, inputs, outputs and dtype."""
        return self[:6]

    def __str__(self) -> str:
        shape = f"{self.batch}x{self.height}x{self.width} {self.inputs}->{self.outputs} {self.dtype}"
        return f"{shape}, about {self.rows} rows, tiles {self.eighths / 8:.0%} full"


class MapCase(NamedTuple):
    """What decides how a whole map is convolved the fastest.

    Attributes:
        inputs, outputs: channels.
        dtype: of the map.
        channels_last: order of map and result in memory.
    """

    inputs: int
    outputs: int
    dtype: str
    channels_last: bool

    @staticmethod
    def of(inputs: int, outputs: int, channels_last: bool, dtype: torch.dtype) -> MapCase:
        """The case of a map in this order."""
        return MapCase(inputs, outputs, dtype_name(dtype), channels_last)

    def __str__(self) -> str:
        return f"{self.inputs}->{self.outputs} {self.dtype}{', channels last' if self.channels_last else ''}"


class GatherTaps(NamedTuple):
    """The values a stencil reads, for each target row and tap.

    Attributes:
        rows: ``[B, N_source, *C]``.
        recorded: recorded source map ``[B, S, *C]``, any strides and floating dtype.
        halo: int64 ``[1 or B, M]``, positions of ``recorded``.
        table: int64 ``[1 or B, N, K]``.
        fill: value of taps outside the map.

    The result is ``[B, N, K, *C]``, contiguous, dtype of ``rows``.
    """

    rows: Tensor
    recorded: Tensor
    halo: Tensor
    table: Tensor
    fill: float


def _taps_shape(given: GatherTaps) -> Tensor:
    rows, table = given.rows, given.table
    return rows.new_empty((rows.shape[0], table.shape[1], table.shape[2], *rows.shape[2:]))


GATHER_TAPS = Operator("gather_taps", GatherTaps, _taps_shape)


class ConvRows(NamedTuple):
    """Convolution (ordinary or transposed) at the target rows.

    Attributes:
        rows: ``[B, N_source, Cin]``.
        recorded: recorded source map ``[B, S, Cin]``, any strides and floating dtype.
        halo: int64 ``[1 or B, M]``.
        table: int64 ``[1 or B, N, K]``.
        weight: ``[Cout, K * Cin / groups]`` of the operator ``pack_conv_weight``, dtype of ``rows``; with one group it
            may be packed by the operator ``pack_matrix``.
        bias: ``[Cout]`` or None.
        groups: as of the convolution.

    The result is ``[B, N, Cout]``, contiguous; dtype of ``rows``, or under autocast the dtype it computes in.
    """

    rows: Tensor
    recorded: Tensor
    halo: Tensor
    table: Tensor
    weight: Tensor
    bias: Tensor | None
    groups: int


def _rows_shape(given: ConvRows) -> Tensor:
    return given.rows.new_empty((given.rows.shape[0], given.table.shape[1], given.weight.shape[0]))


CONV_ROWS = Operator("conv_rows", ConvRows, _rows_shape)


class PackConvWeight(NamedTuple):
    """Bring a convolution's weight to the order in which rows gather taps.

    Attributes:
        weight: ``[Cout, Cin / groups, kernel height, kernel width]``; ``[Cin, Cout / groups, ...]`` when transposed.
        transposed: whether it belongs to a transposed convolution.
        groups: as of the convolution.

    The result is ``[Cout, K * Cin / groups]``: for each output channel all taps in row-major order, input channels
    innermost.
    """

    weight: Tensor
    transposed: bool
    groups: int


def _pack_shape(given: PackConvWeight) -> Tensor:
    weight, transposed, groups = given
    outputs = weight.shape[1] * groups if transposed else weight.shape[0]
    return weight.new_empty((outputs, weight.numel() // outputs))


PACK_CONV_WEIGHT = Operator("pack_conv_weight", PackConvWeight, _pack_shape)


class PixelSelect(NamedTuple):
    """The channels of a pixel shuffle that belong to each target row.

    Attributes:
        taps: ``[B, N, 1, C * factor * factor_x]``, the source row of each target row.
        subposition: int64 ``[1 or B, N]``, ``(y % factor) * factor_x + x % factor_x``.
        factor: by which the height grows.
        factor_x: by which the width grows; None for as much.

    The result is ``[B, N, C]``, contiguous.
    """

    taps: Tensor
    subposition: Tensor
    factor: int
    factor_x: int | None = None


def _pixel_select_shape(given: PixelSelect) -> Tensor:
    taps, parts = given.taps, given.factor * (given.factor_x or given.factor)
    return taps.new_empty((taps.shape[0], taps.shape[1], taps.shape[3] // parts))


PIXEL_SELECT = Operator("pixel_select", PixelSelect, _pixel_select_shape)


class PackTileWeights(NamedTuple):
    """Transform the weight of a convolution for tiles.

    Attributes:
        weight: ``[Cout, Cin, 3, 3]``.
        rows: how many tiles a product is likely to have, as for the operator ``pack_matrix``.

    The result are 16 matrices ``[Cout, Cin]``, one for each position of a patch, for convolutions by tiles only; packed
    where that is possible.
    """

    weight: Tensor
    rows: int | None = None


#: Rows and columns of the patch that a tile reads, and of its outputs.
PATCH, SIDE = 4, 2


def _pack_tiles_shape(given: PackTileWeights) -> list[Tensor]:
    return [given.weight.new_empty(given.weight.shape[:2]) for _ in range(PATCH * PATCH)]


PACK_TILE_WEIGHTS = Operator("pack_tile_weights", PackTileWeights, _pack_tiles_shape)


class ConvTiles(NamedTuple):
    """Convolution with a 3x3 kernel, stride 1 and padding 1 at the rows of a map of even height and width, by tiles.

    Attributes:
        rows: ``[B, N, Cin]``, float32 or float64.
        recorded: recorded source map ``[B, S, Cin]``, any strides and floating dtype.
        halo: int64 ``[1 or B, M]``, inactive positions that the patches read.
        table: int64 ``[1 or B, T, 16]``, where each tile finds the positions of its patch.
        place: int64 ``[1 or B, N, 1]``, the tile of each row; of padding rows, anything.
        subposition: int64 ``[1 or B, N]``, which of its tile's four outputs a row is.
        weights: of the operator ``pack_tile_weights``.
        bias: ``[Cout]`` or None.

    The result is ``[B, N, Cout]``, contiguous, dtype of ``rows``. Padding rows are finite.
    """

    rows: Tensor
    recorded: Tensor
    halo: Tensor
    table: Tensor
    place: Tensor
    subposition: Tensor
    weights: list[Tensor]
    bias: Tensor | None


def _tiles_shape(given: ConvTiles) -> Tensor:
    return given.rows.new_empty((given.rows.shape[0], given.place.shape[1], given.weights[0].shape[0]))


CONV_TILES = Operator("conv_tiles", ConvTiles, _tiles_shape)


class ConvDense(NamedTuple):
    """Convolution with a 3x3 kernel, stride 1 and padding 1 on the whole map, and its active rows.

    Attributes:
        rows: ``[B, N, Cin]``.
        recorded: recorded source map ``[B, height * width, Cin]``, any strides and floating dtype.
        index: int64 ``[1 or B, N]``.
        valid: bool ``[1 or B, N]``, or None when every row is.
        weight: ``[Cout, Cin, 3, 3]``, dtype of ``rows``.
        bias: ``[Cout]`` or None.
        height, width: of the map.

    The result is ``[B, N, Cout]``, contiguous, dtype of ``rows``.
    """

    rows: Tensor
    recorded: Tensor
    index: Tensor  # type: ignore[assignment]
    valid: Tensor | None
    weight: Tensor
    bias: Tensor | None
    height: int
    width: int


def _dense_shape(given: ConvDense) -> Tensor:
    return given.rows.new_empty((given.rows.shape[0], given.rows.shape[1], given.weight.shape[0]))


CONV_DENSE = Operator("conv_dense", ConvDense, _dense_shape)


class ConvChoice(NamedTuple):
    """Convolution with a 3x3 kernel, stride 1 and padding 1: row by row, by tiles, or on the whole map.

    Which is the fastest depends on the machine, the channels, how many positions are active and how they lie (FISEdit
    calls choosing among such ways *adaptive pixel-wise sparse convolution*).

    Attributes:
        rows, recorded, halo, table, weight, bias: of :class:`ConvRows`.
        tile_plan: ``halo``, ``table``, ``place`` and ``subposition`` of :class:`ConvTiles`; empty on other devices than
            a processor.
        tile_weights: ``weights`` of :class:`ConvTiles`; empty when tiles are no way.
        index, valid: of the rows.
        dense_weight, height, width: ``weight``, ``height`` and ``width`` of :class:`ConvDense`.

    The result is ``[B, N, Cout]``, contiguous.
    """

    rows: Tensor
    recorded: Tensor
    halo: Tensor
    table: Tensor
    weight: Tensor
    bias: Tensor | None
    tile_plan: list[Tensor]
    tile_weights: list[Tensor]
    index: Tensor  # type: ignore[assignment]
    valid: Tensor | None
    dense_weight: Tensor
    height: int
    width: int

    def by_rows(self) -> ConvRows:
        """The same convolution row by row."""
        return ConvRows(*self[:6], groups=1)

    def by_tiles(self) -> ConvTiles:
        """The same convolution by tiles."""
        halo, table, place, subposition = self.tile_plan
        plan = (halo, table, place, subposition)
        return ConvTiles(self.rows, self.recorded, *plan, weights=self.tile_weights, bias=self.bias)

    def densely(self) -> ConvDense:
        """The same convolution on the whole map."""
        rows, recorded, index, valid = self.rows, self.recorded, self.index, self.valid
        return ConvDense(rows, recorded, index, valid, self.dense_weight, self.bias, self.height, self.width)


def _choice_shape(given: ConvChoice) -> Tensor:
    return given.rows.new_empty((given.rows.shape[0], given.table.shape[1], given.weight.shape[0]))


def _choice_case(given: ConvChoice) -> ConvolutionCase | None:
    """Off the processor nothing is measured."""
    if not given.tile_plan:
        return None
    outputs, inputs = given.dense_weight.shape[:2]
    count, tiles, rows = given.table.shape[1], given.tile_plan[1].shape[1], given.rows
    return ConvolutionCase.of(rows.shape[0], given.height, given.width, inputs, outputs, count, tiles, rows.dtype)


def _choice_timed(given: ConvChoice, run: Callable[[ConvChoice], Any]) -> Callable[[], object]:
    return lambda: run(given)


CONV_CHOICE = Operator(
    "conv_choice",
    ConvChoice,
    _choice_shape,
    measuring=Measuring(MEASURED, _choice_case, _choice_timed),
    counted=MEASURED,
)


def _map_shape(map: Tensor, outputs: int, channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    size = (map.shape[0], outputs, *map.shape[2:])
    return torch.empty(size, dtype=map.dtype, device=map.device, memory_format=memory_format)


class ConvMapTiles(NamedTuple):
    """Convolution of a map with a 3x3 kernel, stride 1 and padding 1, by tiles.

    Attributes:
        map: ``[B, Cin, H, W]`` of even height and width, any strides, float32 or float64.
        rows: its rows ``[B, H * W, Cin]``, where somebody has them already.
        weights: of the operator ``pack_tile_weights``.
        bias: ``[Cout]`` or None.
        channels_last: order of the result in memory.

    The result is ``[B, Cout, H, W]``.
    """

    map: Tensor
    rows: Tensor | None
    weights: list[Tensor]
    bias: Tensor | None
    channels_last: bool


def _map_tiles_shape(given: ConvMapTiles) -> Tensor:
    return _map_shape(given.map, given.weights[0].shape[0], given.channels_last)


CONV_MAP_TILES = Operator("conv_map_tiles", ConvMapTiles, _map_tiles_shape)


class ConvMap(NamedTuple):
    """Convolution of a map with a 3x3 kernel, stride 1 and padding 1, directly or by tiles.

    Attributes:
        map, rows, bias, channels_last: of :class:`ConvMapTiles`.
        weight: ``[Cout, Cin, 3, 3]``.
        tile_weights: ``weights`` of :class:`ConvMapTiles`.

    The result is ``[B, Cout, H, W]``.
    """

    map: Tensor
    rows: Tensor | None
    weight: Tensor
    bias: Tensor | None
    tile_weights: list[Tensor]
    channels_last: bool


def _conv_map_shape(given: ConvMap) -> Tensor:
    return _map_shape(given.map, given.weight.shape[0], given.channels_last)


def _map_case(given: ConvMap) -> MapCase:
    outputs, inputs = given.weight.shape[:2]
    return MapCase.of(inputs, outputs, given.channels_last, given.map.dtype)


def _map_timed(given: ConvMap, run: Callable[[ConvMap], Any]) -> Callable[[], object]:
    """On a map of one size, so that what is measured serves for maps of all sizes."""
    square = torch.ones((1, given.weight.shape[1], EXAMPLE, EXAMPLE), dtype=given.map.dtype)
    memory_format = torch.channels_last if given.channels_last else torch.contiguous_format
    example = given._replace(map=square.contiguous(memory_format=memory_format), rows=None)
    return lambda: run(example)


CONV_MAP = Operator(
    "conv_map",
    ConvMap,
    _conv_map_shape,
    measuring=Measuring(MEASURED_MAPS, _map_case, _map_timed),
    counted=MEASURED_MAPS,
)


class Convolve(NamedTuple):
    """``torch.conv2d``.

    Attributes:
        input: ``[B, Cin, H, W]`` or without B, any strides.
        weight, bias, stride, padding, dilation, groups: as of ``torch.conv2d``.
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None = None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1


CONVOLVE = Operator("convolve", Convolve, stands_for=torch.ops.aten.conv2d.default)
