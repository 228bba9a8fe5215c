"""The norm operators by Triton kernels, and two fusions of them: statistics in one pass, and the norm with SiLU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fisedit_compile.operators.group_norm.spec import NORM_APPLY, NORM_PARTIALS, NormApply, NormPartials
from fisedit_compile.operators.rows.triton import DTYPES, shared_stride, tile_of
from fisedit_compile.operators.triton.launches import Launch
from fisedit_compile.operators.triton.working import implementation

#: Elements of a program's tile, and blocks of rows whose changes are added at a time.
TILE, ADDED = 2048, 16
#: Wider groups are left to ATen: a program holds whole groups.
WIDEST_GROUP = 2048


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _rows_fit(rows: Tensor) -> bool:
    return rows.dtype in DTYPES and rows.stride(2) == 1 and rows.numel() > 0


def _blocks(groups: int, width: int) -> tuple[int, int, int]:
    """Rows, groups and channels of a group in a program's tile."""
    inner = _power_of_two(width)
    across = min(_power_of_two(groups), max(1, TILE // inner))
    return max(1, min(16, TILE // (inner * across))), across, inner


def supports_partials(given: NormPartials) -> str | None:
    """Why the kernel does not sum these rows; None when it does."""
    rows, center = given
    if not _rows_fit(rows) or not center.is_contiguous():
        return "there are no rows, a dtype is without kernels, or channels do not lie side by side"
    wide = _power_of_two(rows.shape[2] // center.shape[1]) > WIDEST_GROUP
    return f"a group has more than {WIDEST_GROUP} channels" if wide else None


def supports_update(
    rows: Tensor, center: Tensor, totals: Tensor, recorded: Tensor, index: Tensor, valid: Tensor | None
) -> bool:
    """Whether :func:`norm_update` takes these tensors."""
    return (
        supports_partials(NormPartials(rows, center)) is None
        and totals.is_contiguous()
        and recorded.stride(3) == 1
        and recorded.dtype == totals.dtype == torch.float32
        and index.stride(1) == 1
        and (valid is None or valid.stride(1) == 1)
    )


def statistics_launches(
    rows: Tensor,
    center: Tensor,
    partials: Tensor | None,
    update: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor] | None,
) -> list[Launch]:
    """The kernels of the statistics, in order.

    Args:
        rows: ``[B, N, C]``.
        center: float32 ``[B, G]``.
        partials: float32 ``[B, N, 2, G]`` that gets the sums of each row, or None.
        update: totals ``[B, 2, G]``, recorded partials ``[B, S, 2, G]``, index, valid, room for the changes of each
            block of rows ``[B, blocks, 2, G]``, and new totals ``[B, 2, G]``; or None.
    """
    from fisedit_compile.operators.group_norm.triton_kernels import partials_kernel, totals_kernel

    batch, count, channels = rows.shape
    groups = center.shape[1]
    width = channels // groups
    block_rows, block_groups, block_width = _blocks(groups, width)
    blocks = math.ceil(count / block_rows)
    totals, recorded, index, valid, changes, output = update or (center, center, center, None, center, center)
    arguments = {
        "rows": rows,
        "center": center,
        "recorded": recorded,
        "index": index,
        "valid": index if valid is None else valid,
        "partials": center if partials is None else partials,
        "changes": changes,
        "count": count,
        "groups": groups,
        "width": width,
        "rows_sample": rows.stride(0),
        "rows_row": rows.stride(1),
        "recorded_sample": recorded.stride(0) if update else 0,
        "recorded_position": recorded.stride(1) if update else 0,
        "recorded_power": recorded.stride(2) if update else 0,
        "index_sample": shared_stride(index) if update else 0,
        "valid_sample": 0 if valid is None else shared_stride(valid),
    }
    constants = {
        "STORE": partials is not None,
        "UPDATE": update is not None,
        "MASKED": valid is not None,
        "BLOCK_R": block_rows,
        "BLOCK_G": block_groups,
        "BLOCK_W": block_width,
    }
    grid = (blocks, math.ceil(groups / block_groups), batch)
    launches = [Launch(partials_kernel, grid, arguments, constants)]
    if update is not None:
        arguments = {"totals": totals, "changes": changes, "output": output, "blocks": blocks, "size": 2 * groups}
        constants = {"BLOCK_B": ADDED, "BLOCK_S": _power_of_two(2 * groups)}
        launches.append(Launch(totals_kernel, (batch, 1, 1), arguments, constants))
    return launches


def norm_partials(rows: Tensor, center: Tensor) -> Tensor:
    """The operator ``norm_partials`` by a Triton kernel."""
    batch, count, _ = rows.shape
    partials = rows.new_empty((batch, count, 2, center.shape[1]), dtype=torch.float32)
    for launch in statistics_launches(rows, center, partials, None):
        launch.run()
    return partials


def norm_update(
    rows: Tensor,
    center: Tensor,
    totals: Tensor,
    recorded: Tensor,
    index: Tensor,
    valid: Tensor | None,
    keep_partials: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``norm_totals`` of ``norm_partials`` in one pass over the rows.

    Args:
        rows: ``[B, N, C]``.
        center: float32 ``[B, G]``.
        totals: float32 ``[B, 2, G]``.
        recorded: float32 ``[B, S, 2, G]``.
        index: int64 ``[1 or B, N]``.
        valid: bool ``[1 or B, N]`` or None.
        keep_partials: whether the sums of each row are wanted too.

    Returns:
        The new totals ``[B, 2, G]``, and the sums of each row ``[B, N, 2, G]`` or None.
    """
    batch, count, channels = rows.shape
    groups = center.shape[1]
    blocks = math.ceil(count / _blocks(groups, channels // groups)[0])
    partials = rows.new_empty((batch, count, 2, groups), dtype=torch.float32) if keep_partials else None
    changes = rows.new_empty((batch, blocks, 2, groups), dtype=torch.float32)
    output = torch.empty_like(totals)
    for launch in statistics_launches(rows, center, partials, (totals, recorded, index, valid, changes, output)):
        launch.run()
    return output, partials


def supports_apply(given: NormApply) -> str | None:
    """Why the kernel does not normalise these rows; None when it does."""
    if not _rows_fit(given.rows):
        return "there are no rows, a dtype is without kernels, or channels do not lie side by side"
    if not given.center.is_contiguous() or not given.totals.is_contiguous():
        return "statistics have gaps"
    parameters = [tensor for tensor in (given.weight, given.bias) if tensor is not None]
    plain = all(tensor.dtype in DTYPES and tensor.is_contiguous() for tensor in parameters)
    return None if plain else "weight or bias have gaps, or a dtype without kernels"


def apply_launch(
    rows: Tensor,
    center: Tensor,
    totals: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    count: int,
    silu: bool,
    output: Tensor,
) -> Launch:
    """The kernel behind :func:`norm_apply`; ``output`` is contiguous ``[B, N, C]``."""
    from fisedit_compile.operators.group_norm.triton_kernels import apply_kernel

    batch, rows_count, channels = rows.shape
    block_rows, block_channels = tile_of(channels)
    arguments = {
        "rows": rows,
        "center": center,
        "totals": totals,
        "weight": center if weight is None else weight,
        "bias": center if bias is None else bias,
        "output": output,
        "count": rows_count,
        "channels": channels,
        "width": channels // center.shape[1],
        "eps": float(eps),
        "elements": float(count),
        "rows_sample": rows.stride(0),
        "rows_row": rows.stride(1),
    }
    constants = {
        "SCALED": weight is not None,
        "SHIFTED": bias is not None,
        "SILU": silu,
        "BLOCK_R": block_rows,
        "BLOCK_C": block_channels,
    }
    grid = (math.ceil(rows_count / block_rows), math.ceil(channels / block_channels), batch)
    return Launch(apply_kernel, grid, arguments, constants)


def norm_apply(
    rows: Tensor,
    center: Tensor,
    totals: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    count: int,
    silu: bool = False,
) -> Tensor:
    """The operator ``norm_apply`` by a Triton kernel, with SiLU behind it when ``silu``."""
    output = rows.new_empty(rows.shape)
    apply_launch(rows, center, totals, weight, bias, eps, count, silu, output).run()
    return output


IMPLEMENTATIONS = (
    implementation(NORM_PARTIALS, lambda given: norm_partials(*given), supports_partials),
    implementation(NORM_APPLY, lambda given: norm_apply(*given), supports_apply),
)
