"""Convolutions of whole maps, as recorded calls and dense steps compute them; those with 3x3 kernels by tiles.

A direct convolution needs nine products for each position and pair of channels, tiles of 2x2 positions four (see
``tiles``). The transformed weights are those of edits. Where all positions are wanted, patches are read and outputs
written in strips of the map, without index tables. As with rows, the faster way is measured, not known: few channels
gain nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fisedit_compile.operators.choosing import call
from fisedit_compile.operators.convolution.aten import multiply
from fisedit_compile.operators.convolution.spec import (
    CONV_MAP,
    CONV_MAP_TILES,
    CONVOLVE,
    PATCH,
    SIDE,
    ConvMap,
    ConvMapTiles,
)
from fisedit_compile.operators.library import Implementation
from fisedit_compile.operators.products.spec import outputs_of
from fisedit_compile.operators.rows.aten import in_order

#: Patches of this many bytes are transformed and multiplied at a time, so that they stay in the cache ...
STRIP_BYTES = 8 << 20
#: ... but of so many tiles at least, as each product reads a whole weight.
STRIP_TILES = 256


def convolve(map: Tensor, weight: Tensor, *arguments: Any, **named: Any) -> Tensor:
    """``torch.conv2d``, of a map brought to the weight's order in memory.

    Traced graphs hold no copies, so a map may be a permuted view where the network made it contiguous. PyTorch would
    then bring the weight, which is often larger, to the map's order at every call, and all that follows.
    """
    if map.device.type == "cpu" and weight.is_contiguous() and not map.is_contiguous():
        map = in_order(map.flatten(2)).view(map.shape) if map.ndim == 4 else map.contiguous()
    return torch.conv2d(map, weight, *arguments, **named)


def _transform_patches(strip: Tensor, count: int, width: int) -> Tensor:
    """Input transform of Winograd's F(2x2, 3x3), first along the height, then along the width.

    Args:
        strip: ``[2 * count + 2, 2 * width + 2, C]``, the padded rows of the map that ``count`` rows of tiles read.
        count: rows of tiles.
        width: tiles in a row.

    Returns:
        ``[16, count * width, C]``, contiguous.
    """
    channels = strip.shape[2]
    down = [strip[row : row + SIDE * count : SIDE] for row in range(PATCH)]
    half = strip.new_empty((PATCH, count, strip.shape[1], channels))
    _transform(down, list(half))
    across = [half[:, :, column : column + SIDE * width : SIDE] for column in range(PATCH)]
    patches = strip.new_empty((PATCH, PATCH, count, width, channels))
    _transform(across, list(patches.unbind(1)))
    return patches.view(PATCH * PATCH, count * width, channels)


def _transform(taps: list[Tensor], out: list[Tensor]) -> None:
    """One dimension of the input transform."""
    torch.sub(taps[0], taps[2], out=out[0])
    torch.add(taps[1], taps[2], out=out[1])
    torch.sub(taps[2], taps[1], out=out[2])
    torch.sub(taps[1], taps[3], out=out[3])


def _transform_back(products: list[Tensor], out: Tensor, bias: Tensor | None) -> None:
    """Output transform.

    Args:
        products: 16 of ``[count * width, C]``, which are overwritten.
        out: ``[count, 2, width, 2, C]``, is written.
        bias: ``[C]`` or None.
    """
    shape = (out.shape[0], out.shape[2], out.shape[4])
    taps = [product.view(shape) for product in products]
    rows = [
        [torch.add(taps[at], taps[PATCH + at]).add_(taps[2 * PATCH + at]) for at in range(PATCH)],
        [taps[PATCH + at].sub_(taps[2 * PATCH + at]).sub_(taps[3 * PATCH + at]) for at in range(PATCH)],
    ]
    for row, (first, second, third, fourth) in enumerate(rows):
        left, right = torch.add(first, second), second.sub_(third)
        if bias is not None:
            left.add_(bias)
            right.add_(bias)
        torch.add(left, third, out=out[:, row, :, 0])
        torch.sub(right, fourth, out=out[:, row, :, 1])


def conv_map_tiles(given: ConvMapTiles) -> Tensor:
    """Convolution of a map by tiles."""
    map, rows, weights, bias, channels_last = given
    batch, channels, height, width = map.shape
    outputs = outputs_of(weights[0])
    if rows is None:
        rows = in_order(map.flatten(2).transpose(1, 2))
    padded = functional.pad(rows.view(batch, height, width, channels), (0, 0, 1, 1, 1, 1))
    result = rows.new_empty((batch, height, width, outputs))
    down, across = height // SIDE, width // SIDE
    strip_bytes = PATCH * PATCH * across * max(channels, outputs) * rows.element_size()
    step = min(down, max(STRIP_BYTES // strip_bytes, -(-STRIP_TILES // across)))
    for sample in range(batch):
        for first in range(0, down, step):
            count = min(step, down - first)
            strip = padded[sample, SIDE * first : SIDE * (first + count) + 2]
            patches = _transform_patches(strip, count, across)
            products = [multiply(*pair) for pair in zip(patches, weights, strict=True)]
            out = result[sample, SIDE * first : SIDE * (first + count)].view(count, SIDE, across, SIDE, outputs)
            _transform_back(products, out, bias)
    if channels_last:
        return result.permute(0, 3, 1, 2)
    return in_order(result.flatten(1, 2).transpose(1, 2)).view(batch, outputs, height, width)


def direct(given: ConvMap) -> Tensor:
    """Convolution of a map by PyTorch."""
    memory_format = torch.channels_last if given.channels_last else torch.contiguous_format
    return convolve(given.map, given.weight, given.bias, padding=1).contiguous(memory_format=memory_format)


def by_tiles(given: ConvMap) -> Tensor:
    """Convolution of a map by tiles, where it may be either."""
    tiles = ConvMapTiles(given.map, given.rows, given.tile_weights, given.bias, given.channels_last)
    result: Tensor = call(CONV_MAP_TILES, tiles)
    return result


IMPLEMENTATIONS = (
    Implementation(CONVOLVE, "aten", lambda given: convolve(*given)),
    Implementation(CONV_MAP_TILES, "aten", conv_map_tiles),
    Implementation(CONV_MAP, "direct", direct),
    Implementation(CONV_MAP, "tiles", by_tiles, rank=1),
)
