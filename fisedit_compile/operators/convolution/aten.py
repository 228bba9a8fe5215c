"""Stencils over rows: convolution, and the taps that pooling, resizing, padding and pixel shuffling read.

A table, int64 ``[1 or B, N, K]``, says where tap k of target row n is: below ``N_source`` in the rows of the source,
then in the halo (positions of the recorded source), and last the fill slot for taps outside the map.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from fisedit_compile.operators.library import operator
from fisedit_compile.operators.products.aten import linear_rows
from fisedit_compile.operators.rows.aten import select_rows

# Taps of a convolution beyond this many bytes are gathered and multiplied in chunks, through one buffer that is used
# again and again: memory that is allocated, filled once and freed costs more than reading the weights several times.
CHUNK_BYTES = 8 << 20

_local = threading.local()


def _buffer(like: Tensor, elements: int) -> Tensor:
    """A flat buffer of this thread with room for ``elements``, dtype of ``like``; whatever it held is lost."""
    buffers: dict[torch.dtype, Tensor] = _local.__dict__.setdefault("buffers", {})
    found = buffers.get(like.dtype)
    if found is None or found.numel() < elements:
        with torch.inference_mode(False):
            found = buffers[like.dtype] = torch.empty(elements, dtype=like.dtype)
    return found[:elements]


def tap_source(rows: Tensor, recorded: Tensor, halo: Tensor, fill: float) -> Tensor:
    """What a table points into: [B, N_source + M + 1, *C]."""
    outside = rows.new_full((), fill).expand(rows.shape[0], 1, *rows.shape[2:])
    return torch.cat((rows, select_rows(recorded, halo).to(rows.dtype), outside), 1)


def _taps_shape(rows: Tensor, recorded: Tensor, halo: Tensor, table: Tensor, fill: float) -> Tensor:
    return rows.new_empty((rows.shape[0], table.shape[1], table.shape[2], *rows.shape[2:]))


@operator("(Tensor rows, Tensor recorded, Tensor halo, Tensor table, float fill) -> Tensor", _taps_shape)
def gather_taps(rows: Tensor, recorded: Tensor, halo: Tensor, table: Tensor, fill: float) -> Tensor:
    """The values a stencil reads, for each target row and tap.

    Args:
        rows: ``[B, N_source, *C]``.
        recorded: recorded source map ``[B, S, *C]``, any strides and floating dtype.
        halo: int64 ``[1 or B, M]``, positions of ``recorded``.
        table: int64 ``[1 or B, N, K]``.
        fill: value of taps outside the map.

    Returns:
        ``[B, N, K, *C]``, contiguous, dtype of ``rows``.
    """
    taps = select_rows(tap_source(rows, recorded, halo, fill), table.flatten(1))
    return taps.view(taps.shape[0], *table.shape[1:], *rows.shape[2:])


def _conv_shape(
    rows: Tensor, recorded: Tensor, halo: Tensor, table: Tensor, weight: Tensor, bias: Tensor | None, groups: int
) -> Tensor:
    return rows.new_empty((rows.shape[0], table.shape[1], weight.shape[0]))


@operator(
    "(Tensor rows, Tensor recorded, Tensor halo, Tensor table, Tensor weight, Tensor? bias, int groups) -> Tensor",
    _conv_shape,
)
def conv_rows(
    rows: Tensor, recorded: Tensor, halo: Tensor, table: Tensor, weight: Tensor, bias: Tensor | None, groups: int
) -> Tensor:
    """Convolution (ordinary or transposed) at the target rows.

    Args:
        rows: ``[B, N_source, Cin]``.
        recorded: recorded source map ``[B, S, Cin]``, any strides and floating dtype.
        halo: int64 ``[1 or B, M]``.
        table: int64 ``[1 or B, N, K]``.
        weight: ``[Cout, K * Cin / groups]`` of :func:`pack_conv_weight`, dtype of ``rows``; with one group it
            may be packed by :func:`fisedit_compile.operators.products.aten.pack_matrix`.
        bias: ``[Cout]`` or None.
        groups: as of the convolution.

    Returns:
        ``[B, N, Cout]``, contiguous; dtype of ``rows``, or under autocast the dtype it computes in.
    """
    if torch.is_autocast_enabled(rows.device.type):
        # Autocast reaches neither products written to a given output nor batched ones of mixed types.
        dtype = torch.get_autocast_dtype(rows.device.type)
        rows, weight, bias = rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    source = tap_source(rows, recorded, halo, 0.0)
    batch, count, taps = source.shape[0], table.shape[1], table.shape[2]
    channels = source.shape[2]
    flat = table.flatten(1)
    if groups > 1:
        gathered = select_rows(source, flat).view(batch, count, taps, channels)
        return _grouped(gathered, weight, bias, groups)
    if source.device.type != "cpu" or torch.compiler.is_compiling():
        return linear_rows(select_rows(source, flat).view(batch, count, taps * channels), weight, bias)
    step = max(1, CHUNK_BYTES // (taps * channels * source.element_size()))
    parts = []
    for sample in range(batch):
        positions = flat[sample if flat.shape[0] > 1 else 0]
        for first in range(0, count, step):
            last = min(first + step, count)
            buffer = _buffer(source, (last - first) * taps * channels)
            chosen = positions[first * taps : last * taps]
            torch.index_select(source[sample], 0, chosen, out=buffer.view(-1, channels))
            parts.append(linear_rows(buffer.view(last - first, -1), weight, bias))
    return torch.cat(parts).view(batch, count, -1)


def _grouped(taps: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """Grouped convolution of taps [B, N, K, Cin] -> [B, N, Cout]."""
    batch, count, number, channels = taps.shape
    width = channels // groups
    if width == 1 and weight.shape[0] == channels:
        result = (taps * weight.t()).sum(2)
    else:
        split = taps.view(batch * count, number, groups, width).permute(2, 0, 1, 3).reshape(groups, batch * count, -1)
        product = torch.bmm(split, weight.view(groups, -1, number * width).transpose(1, 2))  # [groups, BN, -1]
        result = product.transpose(0, 1).reshape(batch, count, weight.shape[0])
    return result if bias is None else result + bias


def _pack_shape(weight: Tensor, transposed: bool, groups: int) -> Tensor:
    outputs = weight.shape[1] * groups if transposed else weight.shape[0]
    return weight.new_empty((outputs, weight.numel() // outputs))


@operator("(Tensor weight, bool transposed, int groups) -> Tensor", _pack_shape)
def pack_conv_weight(weight: Tensor, transposed: bool, groups: int) -> Tensor:
    """Bring a convolution's weight to the order in which rows gather taps.

    Args:
        weight: ``[Cout, Cin / groups, kernel height, kernel width]``; ``[Cin, Cout / groups, ...]`` when transposed.
        transposed: whether it belongs to a transposed convolution.
        groups: as of the convolution.

    Returns:
        ``[Cout, K * Cin / groups]``: for each output channel all taps in row-major order, input channels innermost.
    """
    if transposed:
        inputs, outputs = weight.shape[0] // groups, weight.shape[1]
        split = weight.reshape(groups, inputs, outputs, *weight.shape[2:])
        packed = split.permute(0, 2, 3, 4, 1).clone(memory_format=torch.contiguous_format)
        return packed.view(groups * outputs, -1)
    packed = weight.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
    return packed.view(weight.shape[0], -1)


def _pixel_select_shape(taps: Tensor, subposition: Tensor, factor: int, factor_x: int | None = None) -> Tensor:
    return taps.new_empty((taps.shape[0], taps.shape[1], taps.shape[3] // (factor * (factor_x or factor))))


@operator("(Tensor taps, Tensor subposition, int factor, int? factor_x=None) -> Tensor", _pixel_select_shape)
def pixel_select(taps: Tensor, subposition: Tensor, factor: int, factor_x: int | None = None) -> Tensor:
    """The channels of a pixel shuffle that belong to each target row.

    Args:
        taps: ``[B, N, 1, C * factor * factor_x]``, the source row of each target row.
        subposition: int64 ``[1 or B, N]``, ``(y % factor) * factor_x + x % factor_x``.
        factor: by which the height grows.
        factor_x: by which the width grows; None for as much.

    Returns:
        ``[B, N, C]``, contiguous.
    """
    batch, count = taps.shape[:2]
    split = taps.reshape(batch, count, -1, factor * (factor_x or factor))
    chosen = subposition[:, :, None, None].expand(batch, count, split.shape[2], 1)
    return split.gather(3, chosen).squeeze(3)
