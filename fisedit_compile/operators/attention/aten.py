"""Attention by PyTorch; that of rows writes them into the recorded maps and takes them back."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional

from fisedit_compile.operators.attention.spec import ATTENTION, ATTENTION_ROWS, Attention, AttentionRows
from fisedit_compile.operators.choosing import call
from fisedit_compile.operators.library import Implementation
from fisedit_compile.operators.rows.aten import keep_valid, select_rows, write_rows


def attention(given: Attention) -> Tensor:
    """Attention of whole maps."""
    query, key, value, mask, dropout, causal, scale, grouped = given
    return functional.scaled_dot_product_attention(
        query, key, value, mask, dropout, causal, scale=scale, enable_gqa=grouped
    )


def attention_rows(given: AttentionRows) -> Tensor:
    """Attention of rows over maps in which they are."""
    query, index, valid = given.query, given.index, given.valid
    undo: list[tuple[Tensor, Tensor]] = []
    try:
        keys = _mix(given.recorded_key, given.key, index, valid, undo)
        values = _mix(given.recorded_value, given.value, index, valid, undo)
        heads = query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
        grouped = query.shape[2] != given.key.shape[2]
        attended: Tensor = call(ATTENTION, Attention(*heads, scale=given.scale, enable_gqa=grouped))
        return attended.transpose(1, 2).contiguous()
    finally:
        # In reverse: when both are one tensor, the second old rows are the first new ones.
        for recorded, old in reversed(undo):
            with _writing(recorded):
                write_rows(recorded, index, old)


def _mix(
    recorded: Tensor, rows: Tensor, index: Tensor, valid: Tensor | None, undo: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """The recorded map with the valid rows written; in place and noted in ``undo``, or as a copy."""
    if recorded.dtype != rows.dtype or _expanded(recorded):
        mixed = torch.empty(recorded.shape, dtype=rows.dtype, device=recorded.device).copy_(recorded)
        old = None if valid is None else select_rows(mixed, index)
        write_rows(mixed, index, rows if old is None else keep_valid(rows, old, valid))
        return mixed
    old = select_rows(recorded, index)
    new = keep_valid(rows, old, valid)
    undo.append((recorded, old))
    with _writing(recorded):
        write_rows(recorded, index, new)
    return recorded


def _expanded(tensor: Tensor) -> bool:
    """Whether several elements share memory; writing to one position would then change others."""
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _writing(tensor: Tensor) -> AbstractContextManager:
    """A tensor made in inference mode takes in-place changes only there."""
    return torch.inference_mode() if tensor.is_inference() else nullcontext()


IMPLEMENTATIONS = (
    Implementation(ATTENTION, "plain", attention),
    Implementation(ATTENTION_ROWS, "aten", attention_rows),
)
