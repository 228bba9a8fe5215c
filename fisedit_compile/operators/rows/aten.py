"""Rows: the active positions of a feature map, ``[B, N, *C]``; reading them from a map and writing them back.

A map is ``[B, S, *C]`` with ``S`` positions, of any strides. An index is int64 ``[1 or B, N]``; batch 1 means the same
positions in every sample. ``valid``, bool of the index's shape or None, is False for padding rows: they are computed
like all others and never written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fisedit_compile.operators.library import operator


def _flattens(tensor: Tensor) -> bool:
    """Whether the first two dimensions are one dimension in memory."""
    return tensor.shape[0] == 1 or tensor.stride(0) == tensor.shape[1] * tensor.stride(1)


def _flat_index(index: Tensor, size: int) -> Tensor:
    """Index [B, N] into maps of ``size`` positions as an index [B * N] into all samples' positions."""
    return (index + torch.arange(0, index.shape[0] * size, size, device=index.device)[:, None]).flatten()


def _channels_inside(tensor: Tensor) -> bool:
    return tensor.ndim == 2 or tensor.stride(-1) == 1 or tensor.shape[-1] == 1


def select_rows(source: Tensor, index: Tensor) -> Tensor:
    """Read rows: [B, S, *C], [1 or B, N] -> [B, N, *C], contiguous, in the source's dtype."""
    # index_select is the fastest way, but only where it copies whole rows: along the first dimension of any tensor
    # with the channels inside, along the second of a contiguous one. Else advanced indexing is several times faster.
    if index.shape[0] == 1 and source.is_contiguous():
        return source.index_select(1, index[0])
    if _channels_inside(source) and _flattens(source):
        flat = _flat_index(index.expand(source.shape[0], -1), source.shape[1])
        return source.flatten(0, 1).index_select(0, flat).view(-1, index.shape[1], *source.shape[2:])
    if index.shape[0] == 1:
        return source[:, index[0]].contiguous()
    return source[torch.arange(index.shape[0], device=index.device)[:, None], index].contiguous()


def write_rows(target: Tensor, index: Tensor, rows: Tensor) -> None:
    """Write rows [B, N, *C] into ``target`` [B, S, *C] of the same dtype, in place."""
    if index.shape[0] == 1 and _channels_inside(target):
        target.index_copy_(1, index[0], rows)
    elif index.shape[0] == 1:
        target[:, index[0]] = rows
    elif _flattens(target):
        target.flatten(0, 1).index_copy_(0, _flat_index(index, target.shape[1]), rows.flatten(0, 1))
    else:
        target[torch.arange(index.shape[0], device=index.device)[:, None], index] = rows


def keep_valid(rows: Tensor, old: Tensor, valid: Tensor | None) -> Tensor:
    """``rows`` where valid, else ``old``; both [B, N, *C], valid [1 or B, N]."""
    if valid is None:
        return rows
    return torch.where(valid.view(*valid.shape, *[1] * (rows.ndim - 2)), rows, old)


def _gather_shape(map: Tensor, index: Tensor) -> Tensor:
    return map.new_empty((map.shape[0], index.shape[1], *map.shape[2:]))


@operator("(Tensor map, Tensor index) -> Tensor", _gather_shape)
def gather_rows(map: Tensor, index: Tensor) -> Tensor:
    """Rows of a map at the positions of an index.

    Args:
        map: ``[B, S, *C]``, any dtype and strides.
        index: int64 ``[1 or B, N]``.

    Returns:
        ``[B, N, *C]``, contiguous, dtype of ``map``.
    """
    return select_rows(map, index)


def _scatter_shape(map: Tensor, rows: Tensor, index: Tensor, valid: Tensor | None) -> Tensor:
    return torch.empty_like(map, dtype=rows.dtype)


@operator("(Tensor map, Tensor rows, Tensor index, Tensor? valid) -> Tensor", _scatter_shape)
def scatter_rows(map: Tensor, rows: Tensor, index: Tensor, valid: Tensor | None) -> Tensor:
    """A copy of a map with the valid rows written.

    Args:
        map: ``[B, S, *C]``, any dtype and strides.
        rows: ``[B, N, *C]``.
        index: int64 ``[1 or B, N]``, positions distinct within a sample.
        valid: bool ``[1 or B, N]``, or None when every row is.

    Returns:
        ``[B, S, *C]``, dtype of ``rows``, strides of ``map`` (contiguous when ``map`` has gaps or overlaps).
    """
    result = map.to(rows.dtype, copy=True)
    write_rows(result, index, rows if valid is None else keep_valid(rows, select_rows(result, index), valid))
    return result


def _contiguous_shape(rows: Tensor) -> Tensor:
    return rows.new_empty(rows.shape)


@operator("(Tensor rows) -> Tensor", _contiguous_shape)
def contiguous_rows(rows: Tensor) -> Tensor:
    """A copy of all rows of a map, one after the other in memory.

    Args:
        rows: ``[B, S, *C]``, any dtype and strides.

    Returns:
        The same, contiguous.
    """
    if rows.ndim != 3 or rows.device.type != "cpu" or rows.stride(1) != 1:
        return rows.clone(memory_format=torch.contiguous_format)
    # Positions are neighbours in memory. PyTorch transposes matrices block by block, tensors of three dimensions not.
    result = rows.new_empty(rows.shape)
    for sample, transposed in zip(rows, result, strict=True):
        transposed.copy_(sample)
    return result
