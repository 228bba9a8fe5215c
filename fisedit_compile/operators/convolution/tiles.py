"""Convolution of 3x3 kernels over tiles of 2x2 positions by Winograd's minimal filtering, F(2x2, 3x3).

A tile's four outputs need 16 products a pair of channels, where four rows need 36. The input patch of a tile, 4x4
positions, is transformed, multiplied position by position with the transformed kernel, and transformed back (Lavin and
Gray, arXiv 1509.09308, section 4.1). A mask whose tiles are mostly full thus costs less than its share of the dense
arithmetic; one of scattered positions costs more, which is why ``paths`` measures before it chooses. The
transforms round as well, too much for half precision: float32 and wider only. Errors in float32 were measured to be
below those of PyTorch's direct convolution (benchmarks/RESULTS.md).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fisedit_compile.operators.convolution import native
from fisedit_compile.operators.convolution.aten import tap_source
from fisedit_compile.operators.library import operator
from fisedit_compile.operators.products.aten import linear_rows, outputs_of, pack_matrix, packs

# Patches of this many bytes are transformed and multiplied at a time, so that they stay in the cache.
CHUNK_BYTES = 8 << 20
#: Rows and columns of the patch that a tile reads, and of its outputs.
PATCH, SIDE = 4, 2
KERNEL = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))


@lru_cache(maxsize=8)
def _transforms(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of patches, ``[16, 16]``, and of products, ``[4, 16]``."""
    with torch.inference_mode(False):
        both = [torch.tensor(matrix, device=device, dtype=dtype) for matrix in (native.INPUT, native.OUTPUT)]
        return torch.kron(both[0], both[0]), torch.kron(both[1], both[1])


def _pack_tiles_shape(weight: Tensor, rows: int | None = None) -> list[Tensor]:
    return [weight.new_empty(weight.shape[:2]) for _ in range(PATCH * PATCH)]


@operator("(Tensor weight, int? rows=None) -> Tensor[]", _pack_tiles_shape)
def pack_tile_weights(weight: Tensor, rows: int | None = None) -> list[Tensor]:
    """Transform the weight of a convolution.

    Args:
        weight: ``[Cout, Cin, 3, 3]``.
        rows: how many tiles a product is likely to have, see ``pack_matrix`` of the products.

    Returns:
        16 matrices ``[Cout, Cin]``, one for each position of a patch, for :func:`conv_tiles` only; packed where that
        is possible.
    """
    kernel = torch.tensor(KERNEL, device=weight.device, dtype=torch.float64)
    transform = torch.kron(kernel, kernel)  # [16, 9]
    # By parts, as in float64 a large weight and its transform would take ten times its memory.
    parts = [
        (transform @ part.reshape(-1, 9).t().double()).to(weight.dtype).unflatten(1, part.shape[:2])
        for part in weight.split(max(1, (1 << 20) // weight[0].numel()))
    ]
    matrices = [torch.cat(position) for position in zip(*parts, strict=True)]
    if packs(weight.device.type, weight.dtype):
        return [pack_matrix(matrix, rows) for matrix in matrices]
    return matrices


def _conv_tiles_shape(
    rows: Tensor,
    recorded: Tensor,
    halo: Tensor,
    table: Tensor,
    place: Tensor,
    subposition: Tensor,
    weights: list[Tensor],
    bias: Tensor | None,
) -> Tensor:
    return rows.new_empty((rows.shape[0], place.shape[1], weights[0].shape[0]))


@operator(
    "(Tensor rows, Tensor recorded, Tensor halo, Tensor table, Tensor place, Tensor subposition, Tensor[] weights, "
    "Tensor? bias) -> Tensor",
    _conv_tiles_shape,
)
def conv_tiles(
    rows: Tensor,
    recorded: Tensor,
    halo: Tensor,
    table: Tensor,
    place: Tensor,
    subposition: Tensor,
    weights: list[Tensor],
    bias: Tensor | None,
) -> Tensor:
    """Convolution with a 3x3 kernel, stride 1 and padding 1 at the rows of a map of even height and width.

    Args:
        rows: ``[B, N, Cin]``, float32 or float64.
        recorded: recorded source map ``[B, S, Cin]``, any strides and floating dtype.
        halo: int64 ``[1 or B, M]``, inactive positions that the patches read.
        table: int64 ``[1 or B, T, 16]``, where each tile finds the positions of its patch.
        place: int64 ``[1 or B, N, 1]``, the tile of each row; of padding rows, anything.
        subposition: int64 ``[1 or B, N]``, which of its tile's four outputs a row is.
        weights: of :func:`pack_tile_weights`.
        bias: ``[Cout]`` or None.

    Returns:
        ``[B, N, Cout]``, contiguous, dtype of ``rows``. Padding rows are finite.
    """
    source = tap_source(rows, recorded, halo, 0.0)
    batch, length, channels = source.shape
    tiles, outputs = table.shape[1], outputs_of(weights[0])
    total = batch * tiles
    step = max(1, CHUNK_BYTES // (PATCH * PATCH * max(channels, outputs) * rows.element_size()))
    # All chunks as long as the first, as far as that goes.
    step = -(-total // -(-total // step))
    if native.supports(rows.dtype, rows.device, channels, outputs):
        multiplied: list[Tensor] = []
        for first in range(0, total, step):
            transformed = native.patches(source, table, first, min(step, total - first))
            multiplied += [linear_rows(*pair, None) for pair in zip(transformed, weights, strict=True)]
        return native.outputs(multiplied, step, place[..., 0], subposition, batch, tiles, bias)
    patch_transform, output_transform = _transforms(rows.device, rows.dtype)
    sample = torch.arange(batch, device=rows.device)
    taps = (table.expand(batch, -1, -1) + sample[:, None, None] * length).permute(2, 0, 1).flatten(1)  # [16, B * T]
    results = []
    for first in range(0, total, step):
        chosen = taps[:, first : first + step]
        patches = source.flatten(0, 1).index_select(0, chosen.flatten()).view(PATCH * PATCH, -1)
        transformed = torch.mm(patch_transform, patches).view(PATCH * PATCH, -1, channels)
        products = torch.stack([linear_rows(*pair, None) for pair in zip(transformed, weights, strict=True)])
        results.append(torch.mm(output_transform, products.view(PATCH * PATCH, -1)).view(-1, outputs))
    # A chunk of n tiles is [4 * n, Cout]: first the upper left outputs of all its tiles, and so on.
    tile = place[..., 0].clamp(max=tiles - 1).expand(batch, -1) + sample[:, None] * tiles  # [B, N]
    start = tile // step * step
    found = 4 * start + subposition * (total - start).clamp(max=step) + tile - start
    picked = torch.cat(results).index_select(0, found.flatten())
    return (picked if bias is None else picked.add_(bias)).view(batch, -1, outputs)
