"""Rows by PyTorch: reading them from maps and writing them back (``spec.py`` says what they are)."""

from __future__ import annotations

import torch
from torch import Tensor

from fisedit_compile.operators.library import Implementation
from fisedit_compile.operators.rows.spec import (
    CONTIGUOUS_ROWS,
    GATHER_ROWS,
    SCATTER_ROWS,
    ContiguousRows,
    GatherRows,
    ScatterRows,
)


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


def gather_rows(given: GatherRows) -> Tensor:
    """Rows of a map."""
    return select_rows(given.map, given.index)


def scatter(map: Tensor, rows: Tensor, index: Tensor, valid: Tensor | None) -> Tensor:
    """A copy of a map with the valid rows written; arguments are those of the operator ``scatter_rows``."""
    result = map.to(rows.dtype, copy=True)
    write_rows(result, index, rows if valid is None else keep_valid(rows, select_rows(result, index), valid))
    return result


def scatter_rows(given: ScatterRows) -> Tensor:
    """A map with rows written."""
    return scatter(*given)


def in_order(rows: Tensor) -> Tensor:
    """A contiguous copy of rows ``[B, S, *C]``."""
    if rows.ndim != 3 or rows.device.type != "cpu" or rows.stride(1) != 1:
        return rows.clone(memory_format=torch.contiguous_format)
    # Positions are neighbours in memory. PyTorch transposes matrices block by block, tensors of three dimensions not.
    result = rows.new_empty(rows.shape)
    for sample, transposed in zip(rows, result, strict=True):
        transposed.copy_(sample)
    return result


def contiguous_rows(given: ContiguousRows) -> Tensor:
    """Rows one after the other."""
    return in_order(given.rows)


IMPLEMENTATIONS = (
    Implementation(GATHER_ROWS, "aten", gather_rows),
    Implementation(SCATTER_ROWS, "aten", scatter_rows),
    Implementation(CONTIGUOUS_ROWS, "aten", contiguous_rows),
)
