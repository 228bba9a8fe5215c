"""Rows: the active positions of a feature map, ``[B, N, *C]``; reading them from a map and writing them back.

A map is ``[B, S, *C]`` with ``S`` positions, of any strides. An index is int64 ``[1 or B, N]``; batch 1 means the same
positions in every sample. ``valid``, bool of the index's shape or None, is False for padding rows: they are computed
like all others and never written.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fisedit_compile.operators.library import Operator


class GatherRows(NamedTuple):
    """Rows of a map at the positions of an index.

    Attributes:
        map: ``[B, S, *C]``, any dtype and strides.
        index: int64 ``[1 or B, N]``.

    The result is ``[B, N, *C]``, contiguous, dtype of ``map``.
    """

    map: Tensor
    index: Tensor  # type: ignore[assignment]


def _gather_shape(given: GatherRows) -> Tensor:
    return given.map.new_empty((given.map.shape[0], given.index.shape[1], *given.map.shape[2:]))


GATHER_ROWS = Operator("gather_rows", GatherRows, _gather_shape)


class ScatterRows(NamedTuple):
    """A copy of a map with the valid rows written.

    Attributes:
        map: ``[B, S, *C]``, any dtype and strides.
        rows: ``[B, N, *C]``.
        index: int64 ``[1 or B, N]``, positions distinct within a sample.
        valid: bool ``[1 or B, N]``, or None when every row is.

    The result is ``[B, S, *C]``, dtype of ``rows``, strides of ``map`` (contiguous when ``map`` has gaps or overlaps).
    """

    map: Tensor
    rows: Tensor
    index: Tensor  # type: ignore[assignment]
    valid: Tensor | None


def _scatter_shape(given: ScatterRows) -> Tensor:
    return torch.empty_like(given.map, dtype=given.rows.dtype)


SCATTER_ROWS = Operator("scatter_rows", ScatterRows, _scatter_shape)


class ContiguousRows(NamedTuple):
    """A copy of all rows of a map, one after the other in memory.

    Attributes:
        rows: ``[B, S, *C]``, any dtype and strides.

    The result is the same, contiguous.
    """

    rows: Tensor


def _contiguous_shape(given: ContiguousRows) -> Tensor:
    return given.rows.new_empty(given.rows.shape)


CONTIGUOUS_ROWS = Operator("contiguous_rows", ContiguousRows, _contiguous_shape)
