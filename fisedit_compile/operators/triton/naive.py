"""What each kernel computes, in plain PyTorch and float32: slow, short, and the truth for every test of a kernel.

Nothing here is shared with the kernels or with the operators' own implementations.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gather_taps(rows: Tensor, recorded: Tensor, halo: Tensor, table: Tensor, fill: float) -> Tensor:
    """Taps ``[B, N, K, C]`` of rows ``[B, Ns, C]``, recorded ``[B, S, C]``, halo ``[1 or B, M]``, table
    ``[1 or B, N, K]``."""
    batch, _, channels = rows.shape
    count, taps = table.shape[1:]
    result = rows.new_full((batch, count, taps, channels), fill)
    for sample in range(batch):
        own_table, own_halo = table[sample % table.shape[0]], halo[sample % halo.shape[0]]
        for number in range(count):
            for tap in range(taps):
                slot = int(own_table[number, tap])
                if slot < rows.shape[1]:
                    result[sample, number, tap] = rows[sample, slot]
                elif slot < rows.shape[1] + halo.shape[1]:
                    position = int(own_halo[slot - rows.shape[1]])
                    result[sample, number, tap] = recorded[sample, position].to(rows.dtype)
    return result


def conv_rows(
    rows: Tensor, recorded: Tensor, halo: Tensor, table: Tensor, weight: Tensor, bias: Tensor | None, groups: int
) -> Tensor:
    """Convolution at the target rows, float32 ``[B, N, Cout]``; arguments as of the operator."""
    taps = gather_taps(rows, recorded, halo, table, 0.0).float()  # [B, N, K, Cin]
    width, outputs = rows.shape[2] // groups, weight.shape[0] // groups
    parts = []
    for group in range(groups):
        own = taps[..., group * width : (group + 1) * width].flatten(2)  # [B, N, K * Cin / groups]
        parts.append(own @ weight[group * outputs : (group + 1) * outputs].float().t())
    result = torch.cat(parts, 2)
    return result if bias is None else result + bias.float()


def norm_partials(rows: Tensor, center: Tensor) -> Tensor:
    """Sums of ``x - center`` and its square: rows ``[B, N, C]``, center ``[B, G]`` -> float32 ``[B, N, 2, G]``."""
    batch, count, _ = rows.shape
    centered = rows.float().view(batch, count, center.shape[1], -1) - center[:, None, :, None]
    return torch.stack((centered.sum(3), centered.square().sum(3)), 2)


def norm_totals(
    totals: Tensor, recorded_partials: Tensor, new_partials: Tensor, index: Tensor, valid: Tensor | None
) -> Tensor:
    """Totals ``[B, 2, G]`` with the old sums of valid rows replaced by the new ones."""
    result = totals.clone()
    for sample in range(totals.shape[0]):
        for number in range(index.shape[1]):
            if valid is None or bool(valid[sample % valid.shape[0], number]):
                old = recorded_partials[sample, int(index[sample % index.shape[0], number])]
                result[sample] += new_partials[sample, number] - old
    return result


def norm_apply(
    rows: Tensor,
    center: Tensor,
    totals: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    count: int,
    activation: str = "none",
) -> Tensor:
    """Normalised rows, float32 ``[B, N, C]``; ``activation`` is ``none`` or ``silu``."""
    batch, rows_count, channels = rows.shape
    offset, square = totals[:, 0] / count, totals[:, 1] / count  # [B, G]
    deviation = (square - offset.square()).clamp(min=0.0) + eps
    grouped = rows.float().view(batch, rows_count, center.shape[1], -1)
    normal = (grouped - (center + offset)[:, None, :, None]) / deviation.sqrt()[:, None, :, None]
    result = normal.view(batch, rows_count, channels)
    result = result if weight is None else result * weight.float()
    result = result if bias is None else result + bias.float()
    return torch.nn.functional.silu(result) if activation == "silu" else result


def gather_rows(map: Tensor, index: Tensor) -> Tensor:
    """Rows ``[B, N, *C]`` of a map ``[B, S, *C]`` at index ``[1 or B, N]``."""
    return torch.stack([map[sample][index[sample % index.shape[0]]] for sample in range(map.shape[0])])


def scatter_rows(map: Tensor, rows: Tensor, index: Tensor, valid: Tensor | None) -> Tensor:
    """The map in the rows' dtype with valid rows written."""
    result = map.to(rows.dtype, copy=True)
    for sample in range(map.shape[0]):
        for number in range(index.shape[1]):
            if valid is None or bool(valid[sample % valid.shape[0], number]):
                result[sample, int(index[sample % index.shape[0], number])] = rows[sample, number]
    return result


def attention_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    recorded_key: Tensor,
    recorded_value: Tensor,
    index: Tensor,
    valid: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Attention of row queries, float32 ``[B, N, heads, Dv]``; arguments as of the operator."""
    keys = scatter_rows(recorded_key, key, index, valid).float()
    values = scatter_rows(recorded_value, value, index, valid).float()
    shared = query.shape[2] // key.shape[2]
    keys, values = keys.repeat_interleave(shared, 2), values.repeat_interleave(shared, 2)
    scores = torch.einsum("bnhd,bshd->bhns", query.float(), keys)
    scores = scores * (query.shape[3] ** -0.5 if scale is None else scale)
    return torch.einsum("bhns,bshd->bnhd", scores.softmax(3), values)
