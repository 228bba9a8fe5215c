"""Attention of rows: keys and values are written into the recorded maps by one launch and put back by another.

Attention itself stays with PyTorch, whose kernels for it are hard to beat.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fisedit_compile.operators.attention.spec import ATTENTION_ROWS, AttentionRows
from fisedit_compile.operators.rows.triton import flat_or_fail, supports_write, write_launch
from fisedit_compile.operators.triton.working import implementation


def supports_attention(given: AttentionRows) -> str | None:
    """Why the kernels do not update these keys and values; None when they do."""
    pairs = ((given.recorded_key, given.key), (given.recorded_value, given.value))
    for recorded, rows in pairs:
        reason = supports_write(recorded, rows, given.index, given.valid)
        if reason is not None:
            return reason
    if not _apart(given.recorded_key, given.recorded_value):
        # The launch would write one place twice in no order.
        return "recorded keys and values overlap in memory"
    return "autocast is on" if torch.is_autocast_enabled(given.query.device.type) else None


def _apart(first: Tensor, second: Tensor) -> bool:
    """Whether the memory from the first to the last element of one does not meet that of the other."""
    (start, end), (other_start, other_end) = _reach(first), _reach(second)
    return end <= other_start or other_end <= start


def _reach(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first element, and behind the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def attention_rows(given: AttentionRows) -> Tensor:
    """The operator ``attention_rows`` with keys and values updated by Triton kernels."""
    index, valid = given.index, given.valid
    maps = [flat_or_fail(given.recorded_key), flat_or_fail(given.recorded_value)]
    rows = [flat_or_fail(given.key), flat_or_fail(given.value)]
    old = [rows[number].new_empty(rows[number].shape) for number in range(2)]
    write = write_launch(list(zip(maps, rows, old, strict=True)), index, valid)
    undo = write_launch([(maps[number], old[number], None) for number in range(2)], index, valid)
    write.run()
    try:
        attended = functional.scaled_dot_product_attention(
            given.query.transpose(1, 2),
            given.recorded_key.transpose(1, 2),
            given.recorded_value.transpose(1, 2),
            scale=given.scale,
            enable_gqa=given.query.shape[2] != given.key.shape[2],
        )
        return attended.transpose(1, 2).contiguous()
    finally:
        undo.run()


IMPLEMENTATIONS = (implementation(ATTENTION_ROWS, attention_rows, supports_attention),)
