"""Attention of rows: keys and values are written into the recorded maps by one launch and put back by another.

Attention itself stays with PyTorch, whose kernels for it are hard to beat.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fisedit_compile.operators.rows.triton import flat_or_fail, supports_write, write_launch


def supports_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    recorded_key: Tensor,
    recorded_value: Tensor,
    index: Tensor,
    valid: Tensor | None,
    scale: float | None,
) -> bool:
    """Whether the kernels update these keys and values; the arguments are those of the operator.

    They do not when both maps overlap in memory: the launch would write one place twice in no order.
    """
    return (
        supports_write(recorded_key, key, index, valid)
        and supports_write(recorded_value, value, index, valid)
        and _apart(recorded_key, recorded_value)
        and not torch.is_autocast_enabled(query.device.type)
    )


def _apart(first: Tensor, second: Tensor) -> bool:
    """Whether the memory from the first to the last element of one does not meet that of the other."""
    (start, end), (other_start, other_end) = _reach(first), _reach(second)
    return end <= other_start or other_end <= start


def _reach(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first element, and behind the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


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
    """The operator ``attention_rows`` with keys and values updated by Triton kernels."""
    maps = [flat_or_fail(recorded_key), flat_or_fail(recorded_value)]
    rows = [flat_or_fail(key), flat_or_fail(value)]
    old = [rows[number].new_empty(rows[number].shape) for number in range(2)]
    write = write_launch(list(zip(maps, rows, old, strict=True)), index, valid)
    undo = write_launch([(maps[number], old[number], None) for number in range(2)], index, valid)
    write.run()
    try:
        attended = functional.scaled_dot_product_attention(
            query.transpose(1, 2),
            recorded_key.transpose(1, 2),
            recorded_value.transpose(1, 2),
            scale=scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return attended.transpose(1, 2).contiguous()
    finally:
        undo.run()
