"""The row operators by Triton kernels: gathering, scattering, taps, and writing into recorded maps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.operators.convolution.spec import GATHER_TAPS, GatherTaps
from fisedit_compile.operators.rows.spec import GATHER_ROWS, SCATTER_ROWS, GatherRows, ScatterRows
from fisedit_compile.operators.triton.devices import on_device
from fisedit_compile.operators.triton.launches import Launch
from fisedit_compile.operators.triton.reads import reads_cache
from fisedit_compile.operators.triton.working import implementation

#: Types whose rows are moved; others are left to ATen.
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
#: Elements of a program's tile, and the most channels in it.
TILE, WIDEST = 2048, 512


def tile_of(channels: int) -> tuple[int, int]:
    """Rows and channels of a program that moves rows of so many channels."""
    width = min(WIDEST, 1 << max(0, channels - 1).bit_length())
    return max(1, TILE // width), width


def _grid(count: int, channels: int, batch: int) -> tuple[tuple[int, int, int], dict[str, Any]]:
    rows, width = tile_of(channels)
    grid = (math.ceil(count / rows), math.ceil(channels / width), batch)
    return grid, {"BLOCK_R": rows, "BLOCK_C": width}


def shared_stride(tensor: Tensor) -> int:
    """Elements from sample to sample; 0 where one sample stands for all."""
    return tensor.stride(0) if tensor.shape[0] > 1 else 0


def flat_channels(tensor: Tensor) -> Tensor | None:
    """A map or rows ``[B, N, *C]`` as ``[B, N, C]`` over the same memory, channels side by side; None if that needs a
    copy."""
    if tensor.ndim == 3:
        flat = tensor
    elif tensor.ndim == 2:
        flat = tensor.unsqueeze(2)
    else:
        stride = 1
        for size, own in zip(reversed(tensor.shape[2:]), reversed(tensor.stride()[2:]), strict=True):
            if size > 1 and own != stride:
                return None
            stride *= size
        flat = tensor.as_strided((*tensor.shape[:2], stride), (*tensor.stride()[:2], 1), tensor.storage_offset())
    return flat if flat.stride(2) == 1 or flat.shape[2] == 1 else None


def _plain(*tensors: Tensor) -> bool:
    """Whether kernels read the tensors: known types, something in them, no lazily conjugated or negated view."""
    return all(tensor.dtype in DTYPES and tensor.numel() > 0 for tensor in tensors)


def supports_gather(given: GatherRows) -> str | None:
    """Why the kernel does not gather these rows; None when it does."""
    if not _plain(given.map) or given.map.ndim != 3:
        return "not a map of one channel dimension, or a dtype without kernels"
    return None if given.index.numel() > 0 and given.index.stride(1) == 1 else "the index is empty or has gaps"


def gather_launch(map: Tensor, index: Tensor, output: Tensor) -> Launch:
    """The kernel behind :func:`gather_rows`."""
    from fisedit_compile.operators.rows.triton_kernels import gather_kernel

    grid, constants = _grid(index.shape[1], map.shape[2], map.shape[0])
    arguments = {
        "source": map,
        "index": index,
        "output": output,
        "count": index.shape[1],
        "channels": map.shape[2],
        "source_sample": map.stride(0),
        "source_position": map.stride(1),
        "source_channel": map.stride(2),
        "index_sample": shared_stride(index),
    }
    return Launch(gather_kernel, grid, arguments, constants)


def gather_rows(map: Tensor, index: Tensor) -> Tensor:
    """The operator ``gather_rows`` by a Triton kernel."""
    output = map.new_empty((map.shape[0], index.shape[1], map.shape[2]))
    gather_launch(map, index, output).run()
    return output


def supports_taps(given: GatherTaps) -> str | None:
    """Why the kernel does not gather these taps; None when it does."""
    rows, recorded, table = given.rows, given.recorded, given.table
    if not _plain(rows, recorded):
        return "rows or map are empty, or of a dtype without kernels"
    if table.numel() == 0 or not table.is_contiguous():
        return "the table is empty or has gaps"
    if flat_channels(rows) is None or flat_channels(recorded) is None:
        return "channels do not lie side by side"
    return None


def taps_launch(rows: Tensor, recorded: Tensor, reads: Tensor, fill: float, output: Tensor) -> Launch:
    """The kernel behind :func:`gather_taps`; rows and recorded ``[B, *, C]`` with their channels side by side."""
    from fisedit_compile.operators.rows.triton_kernels import gather_taps_kernel

    count = reads.shape[1] * reads.shape[2]
    grid, constants = _grid(count, rows.shape[2], rows.shape[0])
    arguments = {
        "rows": rows,
        "recorded": recorded,
        "reads": reads,
        "output": output,
        "fill": float(fill),
        "count": count,
        "source_count": rows.shape[1],
        "channels": rows.shape[2],
        "rows_sample": rows.stride(0),
        "rows_row": rows.stride(1),
        "recorded_sample": recorded.stride(0),
        "recorded_row": recorded.stride(1),
        "reads_sample": shared_stride(reads),
    }
    return Launch(gather_taps_kernel, grid, arguments, constants)


def gather_taps(rows: Tensor, recorded: Tensor, halo: Tensor, table: Tensor, fill: float) -> Tensor:
    """The operator ``gather_taps`` by a Triton kernel; rows, halo and fill are never put together first."""
    flat, flat_recorded = flat_channels(rows), flat_channels(recorded)
    if flat is None or flat_recorded is None:
        raise ValueError("gather_taps needs channels side by side")
    output = rows.new_empty((rows.shape[0], table.shape[1], table.shape[2], *rows.shape[2:]))
    reads = reads_cache.get(halo, table, rows.shape[1])
    taps_launch(flat, flat_recorded, reads, fill, output).run()
    return output


def _may_overlap(tensor: Tensor) -> bool:
    """Whether several elements may share memory; rows written there would meet each other."""
    reach = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach = stride * (size - 1) + reach
    return False


def supports_write(target: Tensor, rows: Tensor, index: Tensor, valid: Tensor | None) -> str | None:
    """Why :func:`write_launch` does not take a map ``[B, S, *C]``, rows ``[B, N, *C]`` of its dtype, and an operator's
    index and valid; None when it does."""
    if not _plain(target, rows) or target.dtype != rows.dtype:
        return "map or rows are empty, of a dtype without kernels, or of two dtypes"
    if index.stride(1) != 1 or (valid is not None and valid.stride(1) != 1):
        return "the index has gaps"
    if flat_channels(target) is None or flat_channels(rows) is None:
        return "channels do not lie side by side"
    return "elements of the map share memory" if _may_overlap(target) else None


def write_launch(pairs: list[tuple[Tensor, Tensor, Tensor | None]], index: Tensor, valid: Tensor | None) -> Launch:
    """One launch that writes rows into one map, or into two.

    Args:
        pairs: one or two of map ``[B, S, C]``, rows ``[B, N, C]``, and a contiguous ``[B, N, C]`` that gets the values
            of the valid rows before, or None.
        index, valid: as of the operators.
    """
    from fisedit_compile.operators.rows.triton_kernels import write_kernel

    arguments: dict[str, Any] = {}
    for name, (target, rows, old) in zip(("first", "second"), (pairs[0], pairs[-1]), strict=True):
        arguments[f"{name}_target"], arguments[f"{name}_rows"] = target, rows
        arguments[f"{name}_old"] = target if old is None else old
        arguments[f"{name}_channels"] = target.shape[2]
        arguments[f"{name}_target_sample"], arguments[f"{name}_target_position"] = target.stride()[:2]
        arguments[f"{name}_rows_sample"], arguments[f"{name}_rows_row"] = rows.stride()[:2]
    arguments |= {
        "index": index,
        "valid": index if valid is None else valid,
        "count": index.shape[1],
        "index_sample": shared_stride(index),
        "valid_sample": 0 if valid is None else shared_stride(valid),
    }
    channels = max(target.shape[2] for target, _, _ in pairs)
    grid, constants = _grid(index.shape[1], channels, pairs[0][0].shape[0])
    constants |= {"PAIR": len(pairs) > 1, "MASKED": valid is not None, "SAVE": pairs[0][2] is not None}
    return Launch(write_kernel, grid, arguments, constants)


def flat_or_fail(tensor: Tensor) -> Tensor:
    """:func:`flat_channels` of a tensor that was checked to have them.

    Raises:
        ValueError: it has not.
    """
    flat = flat_channels(tensor)
    if flat is None:
        raise ValueError(f"channels of a tensor with strides {tensor.stride()} do not lie side by side")
    return flat


def supports_scatter(given: ScatterRows) -> str | None:
    """Why the kernel does not write these rows; None when it does."""
    map, rows, index, valid = given
    if rows.numel() == 0 or map.dtype not in DTYPES or rows.dtype not in DTYPES:
        return "there are no rows, or a dtype is without kernels"
    if _may_overlap(map):
        return "elements of the map share memory"
    # A copy keeps the map's strides unless elements share memory or lie apart.
    copy = map if map.dtype == rows.dtype else torch.empty_like(map, dtype=rows.dtype, device="meta")
    return supports_write(copy, rows, index, valid)


def scatter_rows(map: Tensor, rows: Tensor, index: Tensor, valid: Tensor | None) -> Tensor:
    """The operator ``scatter_rows`` by a copy and a Triton kernel."""
    result = map.to(rows.dtype, copy=True)
    with on_device(result):
        write_launch([(flat_or_fail(result), flat_or_fail(rows), None)], index, valid).run()
    return result


IMPLEMENTATIONS = (
    implementation(GATHER_ROWS, lambda given: gather_rows(*given), supports_gather),
    implementation(GATHER_TAPS, lambda given: gather_taps(*given), supports_taps),
    implementation(SCATTER_ROWS, lambda given: scatter_rows(*given), supports_scatter),
)
