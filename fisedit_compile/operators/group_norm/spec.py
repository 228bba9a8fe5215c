"""Group norm over a mixed map, from the recorded statistics and the rows that changed.

Recorded are, per position and group, the sums over the group's channels of ``x - center`` and ``(x - center)**2``,
where ``center`` is the recorded mean: small numbers, so that subtracting the old and adding the new ones stays exact
even when the mean is far from zero. Statistics are float32 whatever the map's dtype.

An edit updates them by ``norm_partials`` of the new rows and ``norm_totals``; ``passes/sparsify/norm.py`` puts both
into graphs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fisedit_compile.operators.library import Operator


class NormRecord(NamedTuple):
    """Statistics of a map that a later edit updates.

    Attributes:
        map: ``[B, S, C]``, any floating dtype and strides.
        groups: divides C; a group is C / groups neighbouring channels.

    The results are ``center`` ``[B, groups]``, the mean of each group; ``partials`` ``[B, S, 2, groups]``, per position
    the sums of ``x - center`` and its square; ``totals`` ``[B, 2, groups]``, their sums over all positions. All are
    float32.
    """

    map: Tensor
    groups: int


def _record_shape(given: NormRecord) -> tuple[Tensor, Tensor, Tensor]:
    map, groups = given
    batch, size = map.shape[:2]
    center = map.new_empty((batch, groups), dtype=torch.float32)
    partials = map.new_empty((batch, size, 2, groups), dtype=torch.float32)
    return center, partials, map.new_empty((batch, 2, groups), dtype=torch.float32)


NORM_RECORD = Operator(
    "norm_record",
    NormRecord,
    _record_shape,
    # Annotations give results no names.
    schema="(Tensor map, SymInt groups) -> (Tensor center, Tensor partials, Tensor totals)",
)


class NormPartials(NamedTuple):
    """Sums of new rows for each position.

    Attributes:
        rows: ``[B, N, C]``.
        center: float32 ``[B, groups]``.

    The result is float32 ``[B, N, 2, groups]``.
    """

    rows: Tensor
    center: Tensor


def _partials_shape(given: NormPartials) -> Tensor:
    rows, center = given
    return rows.new_empty((rows.shape[0], rows.shape[1], 2, center.shape[1]), dtype=torch.float32)


NORM_PARTIALS = Operator("norm_partials", NormPartials, _partials_shape)


class NormTotals(NamedTuple):
    """Totals of the mixed map: the recorded ones without the old and with the new sums of the valid rows.

    Attributes:
        totals: float32 ``[B, 2, groups]``.
        recorded_partials: float32 ``[B, S, 2, groups]``.
        new_partials: float32 ``[B, N, 2, groups]``.
        index: int64 ``[1 or B, N]``.
        valid: bool ``[1 or B, N]``, or None when every row is.

    The result is float32 ``[B, 2, groups]``.
    """

    totals: Tensor
    recorded_partials: Tensor
    new_partials: Tensor
    index: Tensor  # type: ignore[assignment]
    valid: Tensor | None


def _totals_shape(given: NormTotals) -> Tensor:
    return given.totals.new_empty(given.totals.shape)


NORM_TOTALS = Operator("norm_totals", NormTotals, _totals_shape)


class NormApply(NamedTuple):
    """Normalise rows with given statistics.

    Attributes:
        rows: ``[B, N, C]``.
        center: float32 ``[B, groups]``.
        totals: float32 ``[B, 2, groups]``, sums over all positions and the group's channels of ``x - center`` and its
            square.
        weight, bias: ``[C]`` or None.
        eps: added to the variance.
        count: elements of a group, positions times channels of the group.

    The result is ``[B, N, C]``, contiguous, dtype of ``rows``.
    """

    rows: Tensor
    center: Tensor
    totals: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    count: int  # type: ignore[assignment]


def _apply_shape(given: NormApply) -> Tensor:
    return given.rows.new_empty(given.rows.shape)


NORM_APPLY = Operator("norm_apply", NormApply, _apply_shape)
