"""Stencils over rows by PyTorch (``spec.py`` says what a table is)."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fisedit_compile.operators.choosing import call
from fisedit_compile.operators.convolution.spec import (
    CONV_CHOICE,
    CONV_DENSE,
    CONV_ROWS,
    GATHER_TAPS,
    PACK_CONV_WEIGHT,
    PIXEL_SELECT,
    ConvChoice,
    ConvDense,
    ConvRows,
    GatherTaps,
    PackConvWeight,
    PixelSelect,
)
from fisedit_compile.operators.library import CostModel, Implementation
from fisedit_compile.operators.products.spec import LINEAR_ROWS, LinearRows
from fisedit_compile.operators.rows.aten import scatter, select_rows

#: Share of active positions from which on a convolution of the whole map is tried: it is cheaper for each position, but
#: pays for all of them.
DENSE_FROM = 0.4
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


def gather_taps(given: GatherTaps) -> Tensor:
    """What a stencil reads."""
    rows, recorded, halo, table, fill = given
    taps = select_rows(tap_source(rows, recorded, halo, fill), table.flatten(1))
    return taps.view(taps.shape[0], *table.shape[1:], *rows.shape[2:])


def multiply(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The operator ``linear_rows``."""
    result: Tensor = call(LINEAR_ROWS, LinearRows(rows, weight, bias))
    return result


def conv_rows(given: ConvRows) -> Tensor:
    """Convolution by a product of gathered taps."""
    rows, recorded, halo, table, weight, bias, groups = given
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
        return multiply(select_rows(source, flat).view(batch, count, taps * channels), weight, bias)
    step = max(1, CHUNK_BYTES // (taps * channels * source.element_size()))
    parts = []
    for sample in range(batch):
        positions = flat[sample if flat.shape[0] > 1 else 0]
        for first in range(0, count, step):
            last = min(first + step, count)
            buffer = _buffer(source, (last - first) * taps * channels)
            chosen = positions[first * taps : last * taps]
            torch.index_select(source[sample], 0, chosen, out=buffer.view(-1, channels))
            parts.append(multiply(buffer.view(last - first, -1), weight, bias))
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


def pack_conv_weight(given: PackConvWeight) -> Tensor:
    """A weight in the order of taps."""
    weight, transposed, groups = given
    if transposed:
        inputs, outputs = weight.shape[0] // groups, weight.shape[1]
        split = weight.reshape(groups, inputs, outputs, *weight.shape[2:])
        packed = split.permute(0, 2, 3, 4, 1).clone(memory_format=torch.contiguous_format)
        return packed.view(groups * outputs, -1)
    packed = weight.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
    return packed.view(weight.shape[0], -1)


def pixel_select(given: PixelSelect) -> Tensor:
    """Channels of a pixel shuffle."""
    taps, subposition, factor, factor_x = given
    batch, count = taps.shape[:2]
    split = taps.reshape(batch, count, -1, factor * (factor_x or factor))
    chosen = subposition[:, :, None, None].expand(batch, count, split.shape[2], 1)
    return split.gather(3, chosen).squeeze(3)


def conv_dense(given: ConvDense) -> Tensor:
    """Active rows of a convolution of the whole map."""
    size = (given.height, given.width)
    mixed = scatter(given.recorded, given.rows, given.index, given.valid).unflatten(1, size).permute(0, 3, 1, 2)
    channels_last = mixed.contiguous(memory_format=torch.channels_last)
    result = functional.conv2d(channels_last, given.weight, given.bias, padding=1)
    return select_rows(result.permute(0, 2, 3, 1).flatten(1, 2), given.index)


def _many(given: ConvChoice) -> bool:
    return given.table.shape[1] >= DENSE_FROM * given.height * given.width


def _supports_dense(given: ConvChoice) -> str | None:
    """On a processor, where it would be measured, only where it has a chance."""
    return f"fewer than {DENSE_FROM:.0%} of the positions are active" if given.tile_plan and not _many(given) else None


def _expected(given: ConvChoice, names: Sequence[str]) -> str | None:
    """Off the processor."""
    if given.tile_plan:
        return None
    return "dense" if _many(given) else "rows"


def _by_rows(given: ConvChoice) -> Tensor:
    result: Tensor = call(CONV_ROWS, given.by_rows())
    return result


def _densely(given: ConvChoice) -> Tensor:
    result: Tensor = call(CONV_DENSE, given.densely())
    return result


IMPLEMENTATIONS = (
    Implementation(GATHER_TAPS, "aten", gather_taps),
    Implementation(CONV_ROWS, "aten", conv_rows),
    Implementation(PACK_CONV_WEIGHT, "aten", pack_conv_weight),
    Implementation(PIXEL_SELECT, "aten", pixel_select),
    Implementation(CONV_DENSE, "aten", conv_dense),
    Implementation(CONV_CHOICE, "rows", _by_rows),
    Implementation(CONV_CHOICE, "dense", _densely, _supports_dense, rank=3),
)
MODELS = (CostModel(CONV_CHOICE, _expected),)
