"""Convolutions that can be computed in several ways: row by row, by tiles, or on the whole map; the fastest is taken.

Which one that is depends on the machine, the channels, how many positions are active and how they lie (FISEdit calls
choosing among such ways *adaptive pixel-wise sparse convolution*). Whole maps are cheaper per position, but pay for all
positions: they are tried from a density of ``DENSE_FROM`` on. Off the processor nothing is measured: from that density
on the whole map is convolved, unless kernels bring a choice of their own (``fisedit_compile.operators.triton``).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fisedit_compile.operators.choosing import taken
from fisedit_compile.operators.convolution import native
from fisedit_compile.operators.convolution.aten import conv_rows
from fisedit_compile.operators.convolution.spec import MEASURED, ConvolutionCase
from fisedit_compile.operators.convolution.tiles import conv_tiles
from fisedit_compile.operators.library import operator
from fisedit_compile.operators.records import costs
from fisedit_compile.operators.rows.aten import scatter_rows, select_rows

DENSE_FROM = 0.4


def _conv_dense_shape(
    rows: Tensor,
    recorded: Tensor,
    index: Tensor,
    valid: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    height: int,
    width: int,
) -> Tensor:
    return rows.new_empty((rows.shape[0], rows.shape[1], weight.shape[0]))


@operator(
    "(Tensor rows, Tensor recorded, Tensor index, Tensor? valid, Tensor weight, Tensor? bias, int height, int width) "
    "-> Tensor",
    _conv_dense_shape,
)
def conv_dense(
    rows: Tensor,
    recorded: Tensor,
    index: Tensor,
    valid: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    height: int,
    width: int,
) -> Tensor:
    """Convolution with a 3x3 kernel, stride 1 and padding 1 on the whole map, and its active rows.

    Args:
        rows: ``[B, N, Cin]``.
        recorded: recorded source map ``[B, height * width, Cin]``, any strides and floating dtype.
        index: int64 ``[1 or B, N]``.
        valid: bool ``[1 or B, N]``, or None when every row is.
        weight: ``[Cout, Cin, 3, 3]``, dtype of ``rows``.
        bias: ``[Cout]`` or None.

    Returns:
        ``[B, N, Cout]``, contiguous, dtype of ``rows``.
    """
    mixed = scatter_rows(recorded, rows, index, valid).unflatten(1, (height, width)).permute(0, 3, 1, 2)
    result = functional.conv2d(mixed.contiguous(memory_format=torch.channels_last), weight, bias, padding=1)
    return select_rows(result.permute(0, 2, 3, 1).flatten(1, 2), index)


def _conv_choice_shape(
    rows: Tensor,
    recorded: Tensor,
    halo: Tensor,
    table: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tile_plan: list[Tensor],
    tile_weights: list[Tensor],
    index: Tensor,
    valid: Tensor | None,
    dense_weight: Tensor,
    height: int,
    width: int,
) -> Tensor:
    return rows.new_empty((rows.shape[0], table.shape[1], weight.shape[0]))


@operator(
    "(Tensor rows, Tensor recorded, Tensor halo, Tensor table, Tensor weight, Tensor? bias, Tensor[] tile_plan, "
    "Tensor[] tile_weights, Tensor index, Tensor? valid, Tensor dense_weight, int height, int width) -> Tensor",
    _conv_choice_shape,
)
def conv_choice(
    rows: Tensor,
    recorded: Tensor,
    halo: Tensor,
    table: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tile_plan: list[Tensor],
    tile_weights: list[Tensor],
    index: Tensor,
    valid: Tensor | None,
    dense_weight: Tensor,
    height: int,
    width: int,
) -> Tensor:
    """Convolution with a 3x3 kernel, stride 1 and padding 1, in the way that was measured to be the fastest.

    Args:
        rows, recorded, halo, table, weight, bias: of :func:`conv_rows`.
        tile_plan: ``halo``, ``table``, ``place`` and ``subposition`` of :func:`conv_tiles`; empty on other devices than
            a processor.
        tile_weights: of :func:`conv_tiles`; none when that is no way.
        index, valid: of the rows.
        dense_weight, height, width: of :func:`conv_dense`.

    Returns:
        ``[B, N, Cout]``, contiguous.
    """
    count = table.shape[1]
    many = count >= DENSE_FROM * height * width
    if not tile_plan:
        taken.note(f"convolution: {'dense' if many else 'rows'}")
        if many:
            return conv_dense(rows, recorded, index, valid, dense_weight, bias, height, width)
        return conv_rows(rows, recorded, halo, table, weight, bias, 1)
    ways = {"rows": lambda: conv_rows(rows, recorded, halo, table, weight, bias, 1)}
    tile_halo, tile_table, place, subposition = tile_plan
    outputs, inputs = dense_weight.shape[:2]
    if tile_weights:
        # Ways of other names, as they take other times.
        compiled = native.supports(rows.dtype, rows.device, inputs, outputs)
        ways["compiled tiles" if compiled else "tiles"] = lambda: conv_tiles(
            rows, recorded, tile_halo, tile_table, place, subposition, tile_weights, bias
        )
    if many:
        ways["dense"] = lambda: conv_dense(rows, recorded, index, valid, dense_weight, bias, height, width)
    if len(ways) == 1:
        return ways["rows"]()
    tiles = tile_table.shape[1]
    case = ConvolutionCase.of(rows.shape[0], height, width, inputs, outputs, count, tiles, rows.dtype)
    way = costs.fastest(MEASURED, case, ways)
    taken.note(f"{MEASURED}: {way}")
    return ways[way]()
