"""Group norm over a mixed map, from the recorded statistics and the rows that changed.

Recorded are, per position and group, the sums over the group's channels of ``x - center`` and ``(x - center)**2``,
where ``center`` is the recorded mean: small numbers, so that subtracting the old and adding the new ones stays exact
even when the mean is far from zero. Statistics are float32 whatever the map's dtype. On a processor compiled code
(``fisedit_compile.operators.native``) does what would be many operators of PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fisedit_compile.operators.group_norm import native
from fisedit_compile.operators.library import operator
from fisedit_compile.operators.rows.aten import keep_valid, select_rows

# A map is recorded in blocks of this many elements, which stay in the cache between the steps of the sums.
BLOCK_ELEMENTS = 1 << 18


def _spread(statistic: Tensor, channels: int) -> Tensor:
    """One value a group [B, G] as one value a channel [B, 1, C]."""
    batch, groups = statistic.shape
    return statistic[:, :, None].expand(batch, groups, channels // groups).reshape(batch, 1, channels)


def _sums(values: Tensor, center: Tensor) -> Tensor:
    """Values [B, S, C], center [B, G] -> sums of first and second powers over each group [B, S, 2, G], float32."""
    groups = center.shape[1]
    # float32, because the center is.
    centered = (values - _spread(center, values.shape[2])).contiguous().unflatten(2, (groups, -1))
    first = _group_sum(centered)
    return torch.stack((first, _group_sum(centered.square_())), 2)


def _group_sum(centered: Tensor) -> Tensor:
    """[B, S, G, C / G] contiguous -> [B, S, G]."""
    if centered.device.type != "cpu":
        return centered.sum(3)
    # On a CPU, summing a few neighbours by a product with ones takes half the time.
    ones = centered.new_ones(centered.shape[3])
    return torch.mv(centered.view(-1, centered.shape[3]), ones).view(centered.shape[:3])


def _record_shape(map: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, size = map.shape[:2]
    center = map.new_empty((batch, groups), dtype=torch.float32)
    partials = map.new_empty((batch, size, 2, groups), dtype=torch.float32)
    return center, partials, map.new_empty((batch, 2, groups), dtype=torch.float32)


@operator("(Tensor map, int groups) -> (Tensor center, Tensor partials, Tensor totals)", _record_shape)
def norm_record(map: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of a map that a later edit updates.

    Args:
        map: ``[B, S, C]``, any floating dtype and strides.
        groups: divides C; a group is C / groups neighbouring channels.

    Returns:
        ``center`` ``[B, groups]``, the mean of each group; ``partials`` ``[B, S, 2, groups]``, per position the sums
        of ``x - center`` and its square; ``totals`` ``[B, 2, groups]``, their sums over all positions. All float32.
    """
    batch, size, channels = map.shape
    center = map.mean(1, dtype=torch.float32).unflatten(1, (groups, -1)).mean(2)
    if map.device.type == "cpu" and map.stride(1) < map.stride(2):
        return center, *_record_channels_first(map, center)
    step = max(1, BLOCK_ELEMENTS // (batch * channels)) if map.device.type == "cpu" else size
    if step >= size:
        partials = _sums(map, center)
    else:
        partials = torch.cat([_sums(block, center) for block in map.split(step, 1)], 1)
    return center, partials, partials.sum(1)


def _record_channels_first(map: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    """Partials and totals of a map whose positions are neighbours in memory: sums over groups are sums of vectors."""
    batch, size, channels = map.shape
    groups = center.shape[1]
    width = channels // groups
    step = max(1, BLOCK_ELEMENTS // (size * width))
    # Some columns more: with a power of two from row to row, the transposition below would use few cache lines.
    sums = torch.empty((batch, 2, groups, size + 16), dtype=torch.float32, device=map.device)[..., :size]
    for sample in range(batch):
        for first in range(0, groups, step):
            last = min(first + step, groups)
            block = map[sample, :, first * width : last * width].t().unflatten(0, (-1, width))  # [groups, width, S]
            centered = block - center[sample, first:last, None, None]
            torch.sum(centered, 1, out=sums[sample, 0, first:last])
            torch.sum(centered.square_(), 1, out=sums[sample, 1, first:last])
    return sums.permute(0, 3, 1, 2).contiguous(), sums.sum(3)


def _partials_shape(rows: Tensor, center: Tensor) -> Tensor:
    return rows.new_empty((rows.shape[0], rows.shape[1], 2, center.shape[1]), dtype=torch.float32)


@operator("(Tensor rows, Tensor center) -> Tensor", _partials_shape)
def norm_partials(rows: Tensor, center: Tensor) -> Tensor:
    """Per-position sums of new rows: rows ``[B, N, C]``, center ``[B, groups]`` -> float32 ``[B, N, 2, groups]``."""
    if native.supports(rows, (center,)):
        return native.partials(rows, center)
    return _sums(rows, center)


def _totals_shape(
    totals: Tensor, recorded_partials: Tensor, new_partials: Tensor, index: Tensor, valid: Tensor | None
) -> Tensor:
    return totals.new_empty(totals.shape)


@operator(
    "(Tensor totals, Tensor recorded_partials, Tensor new_partials, Tensor index, Tensor? valid) -> Tensor",
    _totals_shape,
)
def norm_totals(
    totals: Tensor, recorded_partials: Tensor, new_partials: Tensor, index: Tensor, valid: Tensor | None
) -> Tensor:
    """Totals of the mixed map: the recorded ones without the old and with the new sums of the valid rows.

    Args:
        totals: float32 ``[B, 2, groups]``.
        recorded_partials: float32 ``[B, S, 2, groups]``.
        new_partials: float32 ``[B, N, 2, groups]``.
        index: int64 ``[1 or B, N]``.
        valid: bool ``[1 or B, N]``, or None when every row is.

    Returns:
        float32 ``[B, 2, groups]``.
    """
    if native.supports_totals(totals, recorded_partials, new_partials):
        return native.updated_totals(totals, recorded_partials, new_partials, index, valid)
    old = select_rows(recorded_partials, index)
    return totals + (keep_valid(new_partials, old, valid) - old).sum(1)


def _apply_shape(
    rows: Tensor,
    center: Tensor,
    totals: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    count: int,
) -> Tensor:
    return rows.new_empty(rows.shape)


@operator(
    "(Tensor rows, Tensor center, Tensor totals, Tensor? weight, Tensor? bias, float eps, int count) -> Tensor",
    _apply_shape,
)
def norm_apply(
    rows: Tensor,
    center: Tensor,
    totals: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    count: int,
) -> Tensor:
    """Normalise rows with given statistics.

    Args:
        rows: ``[B, N, C]``.
        center: float32 ``[B, groups]``.
        totals: float32 ``[B, 2, groups]``, sums over all positions and the group's channels of ``x - center`` and its
            square.
        weight, bias: ``[C]`` or None.
        eps: added to the variance.
        count: elements of a group, positions times channels of the group.

    Returns:
        ``[B, N, C]``, contiguous, dtype of ``rows``.
    """
    if native.supports(rows, (center, totals), (weight, bias)):
        return native.normalise(rows, center, totals, weight, bias, eps, count)
    batch, groups = center.shape
    channels = rows.shape[2]
    offset, square = (totals / count).unbind(1)  # [B, groups]
    variance = torch.addcmul(square, offset, offset, value=-1).clamp_(min=0.0)
    scale = (variance + eps).rsqrt_()[:, :, None].expand(batch, groups, channels // groups)
    mean = (center + offset)[:, :, None]
    if weight is not None:
        scale = scale * weight.view(groups, -1)
    shift = -mean * scale if bias is None else torch.addcmul(bias.float().view(groups, -1), mean, scale, value=-1)
    scale, shift = scale.reshape(batch, 1, channels), shift.reshape(batch, 1, channels)
    return torch.addcmul(shift, rows.float(), scale).to(rows.dtype).contiguous()
