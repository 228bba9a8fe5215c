"""Group norm of rows by PyTorch (``spec.py`` says what its statistics are)."""

from __future__ import annotations

import torch
from torch import Tensor

from fisedit_compile.operators.group_norm.spec import (
    NORM_APPLY,
    NORM_PARTIALS,
    NORM_RECORD,
    NORM_TOTALS,
    NormApply,
    NormPartials,
    NormRecord,
    NormTotals,
)
from fisedit_compile.operators.library import Implementation
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


def norm_record(given: NormRecord) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of a map."""
    map, groups = given
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


def norm_partials(given: NormPartials) -> Tensor:
    """Sums of rows."""
    return _sums(given.rows, given.center)


def norm_totals(given: NormTotals) -> Tensor:
    """New totals."""
    old = select_rows(given.recorded_partials, given.index)
    return given.totals + (keep_valid(given.new_partials, old, given.valid) - old).sum(1)


def norm_apply(given: NormApply) -> Tensor:
    """Normalised rows."""
    rows, center, totals, weight, bias, eps, count = given
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


IMPLEMENTATIONS = (
    Implementation(NORM_RECORD, "aten", norm_record),
    Implementation(NORM_PARTIALS, "aten", norm_partials),
    Implementation(NORM_TOTALS, "aten", norm_totals),
    Implementation(NORM_APPLY, "aten", norm_apply),
)
