"""Convolution of 3x3 kernels over tiles of 2x2 positions by Winograd's minimal filtering, F(2x2, 3x3).

A tile's four outputs need 16 products a pair of channels, where four rows need 36. The input patch of a tile, 4x4
positions, is transformed, multiplied position by position with the transformed kernel, and transformed back (Lavin and
Gray, arXiv 1509.09308, section 4.1). A mask whose tiles are mostly full thus costs less than its share of the dense
arithmetic; one of scattered positions costs more, which is why it is measured which way is the fastest. The
transforms round as well, too much for half precision: float32 and wider only. Errors in float32 were measured to be
below those of PyTorch's direct convolution (benchmarks/RESULTS.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fisedit_compile.operators.choosing import call
from fisedit_compile.operators.convolution.aten import multiply, tap_source
from fisedit_compile.operators.convolution.spec import (
    CONV_CHOICE,
    CONV_TILES,
    PACK_TILE_WEIGHTS,
    PATCH,
    ConvChoice,
    ConvTiles,
    PackTileWeights,
)
from fisedit_compile.operators.library import Implementation
from fisedit_compile.operators.products.aten import packs
from fisedit_compile.operators.products.spec import PACK_MATRIX, PackMatrix, outputs_of

# Patches of this many bytes are transformed and multiplied at a time, so that they stay in the cache.
CHUNK_BYTES = 8 << 20
#: The transforms in one dimension, of four positions of a patch and of four products.
INPUT = ((1.0, 0.0, -1.0, 0.0), (0.0, 1.0, 1.0, 0.0), (0.0, -1.0, 1.0, 0.0), (0.0, 1.0, 0.0, -1.0))
OUTPUT = ((1.0, 1.0, 1.0, 0.0), (0.0, 1.0, -1.0, -1.0))
KERNEL = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))


@lru_cache(maxsize=8)
def _transforms(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of patches, ``[16, 16]``, and of products, ``[4, 16]``."""
    with torch.inference_mode(False):
        both = [torch.tensor(matrix, device=device, dtype=dtype) for matrix in (INPUT, OUTPUT)]
        return torch.kron(both[0], both[0]), torch.kron(both[1], both[1])


def pack_tile_weights(given: PackTileWeights) -> list[Tensor]:
    """The 16 matrices of a weight."""
    weight, rows = given
    kernel = torch.tensor(KERNEL, device=weight.device, dtype=torch.float64)
    transform = torch.kron(kernel, kernel)  # [16, 9]
    # By parts, as in float64 a large weight and its transform would take ten times its memory.
    parts = [
        (transform @ part.reshape(-1, 9).t().double()).to(weight.dtype).unflatten(1, part.shape[:2])
        for part in weight.split(max(1, (1 << 20) // weight[0].numel()))
    ]
    matrices = [torch.cat(position) for position in zip(*parts, strict=True)]
    if packs(weight.device.type, weight.dtype):
        return [call(PACK_MATRIX, PackMatrix(matrix, rows)) for matrix in matrices]
    return matrices


@dataclass(frozen=True)
class Chunks:
    """The patches of a convolution in chunks.

    Attributes:
        source: ``[B, L, Cin]``, what the table points into.
        step: tiles of a chunk but the last; the tiles of all samples are counted together.
        starts: the first tile of each chunk.
        total: tiles of all samples.
    """

    source: Tensor
    step: int
    starts: range
    total: int


def chunks_of(given: ConvTiles) -> Chunks:
    """How the patches are divided, so that they stay in the cache."""
    source = tap_source(given.rows, given.recorded, given.halo, 0.0)
    channels, outputs = source.shape[2], outputs_of(given.weights[0])
    total = source.shape[0] * given.table.shape[1]
    step = max(1, CHUNK_BYTES // (PATCH * PATCH * max(channels, outputs) * given.rows.element_size()))
    # All chunks as long as the first, as far as that goes.
    step = -(-total // -(-total // step))
    return Chunks(source, step, range(0, total, step), total)


def conv_tiles(given: ConvTiles) -> Tensor:
    """Convolution by tiles with transforms that are products."""
    rows, place, subposition, weights, bias = given.rows, given.place, given.subposition, given.weights, given.bias
    chunks = chunks_of(given)
    source, step, total = chunks.source, chunks.step, chunks.total
    batch, length, channels = source.shape
    tiles, outputs = given.table.shape[1], outputs_of(weights[0])
    patch_transform, output_transform = _transforms(rows.device, rows.dtype)
    sample = torch.arange(batch, device=rows.device)
    found = given.table.expand(batch, -1, -1) + sample[:, None, None] * length
    taps = found.permute(2, 0, 1).flatten(1)  # [16, B * T]
    results = []
    for first in chunks.starts:
        chosen = taps[:, first : first + step]
        patches = source.flatten(0, 1).index_select(0, chosen.flatten()).view(PATCH * PATCH, -1)
        transformed = torch.mm(patch_transform, patches).view(PATCH * PATCH, -1, channels)
        products = torch.stack([multiply(*pair) for pair in zip(transformed, weights, strict=True)])
        results.append(torch.mm(output_transform, products.view(PATCH * PATCH, -1)).view(-1, outputs))
    # A chunk of n tiles is [4 * n, Cout]: first the upper left outputs of all its tiles, and so on.
    tile = place[..., 0].clamp(max=tiles - 1).expand(batch, -1) + sample[:, None] * tiles  # [B, N]
    start = tile // step * step
    found = 4 * start + subposition * (total - start).clamp(max=step) + tile - start
    picked = torch.cat(results).index_select(0, found.flatten())
    return (picked if bias is None else picked.add_(bias)).view(batch, -1, outputs)


def _has_weights(given: ConvChoice) -> str | None:
    return None if given.tile_weights else "there is no transformed weight"


def by_tiles(given: ConvChoice) -> Tensor:
    """A convolution that may be computed in several ways, by tiles."""
    result: Tensor = call(CONV_TILES, given.by_tiles())
    return result


IMPLEMENTATIONS = (
    Implementation(PACK_TILE_WEIGHTS, "aten", pack_tile_weights),
    Implementation(CONV_TILES, "aten", conv_tiles),
    Implementation(CONV_CHOICE, "tiles", by_tiles, _has_weights, rank=1),
)
