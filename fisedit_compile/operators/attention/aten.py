"""Attention, in the way that is the fastest; of rows over a recorded map whose active positions are replaced.

On a processor there are two ways: PyTorch's, and code that is compiled for the machine (``native.py``).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional

from fisedit_compile.operators.attention import native
from fisedit_compile.operators.attention.spec import MEASURED, MOST_KEYS, MOST_QUERIES, AttentionCase
from fisedit_compile.operators.choosing import taken
from fisedit_compile.operators.library import operator
from fisedit_compile.operators.records import costs
from fisedit_compile.operators.rows.aten import keep_valid, select_rows, write_rows


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``, in the way that was measured to be the fastest."""

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    if attn_mask is not None or dropout_p or is_causal or not native.supports(query, key, value, scale):
        return plain(query, key, value)
    if query.shape[1] != key.shape[1] and not enable_gqa:
        return plain(query, key, value)
    example = query[:1, :, :MOST_QUERIES], key[:1, :, :MOST_KEYS], value[:1, :, :MOST_KEYS]
    ways = {"plain": lambda: plain(*example), "compiled": lambda: native.attention(*example, scale)}
    way = costs.fastest(MEASURED, AttentionCase.of(query, key, value), ways)
    taken.note(f"{MEASURED}: {way}")
    return plain(query, key, value) if way == "plain" else native.attention(query, key, value, scale)


def _attention_shape(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    recorded_key: Tensor,
    recorded_value: Tensor,
    index: Tensor,
    valid: Tensor | None,
    scale: float | None,
) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))


@operator(
    "(Tensor query, Tensor key, Tensor value, Tensor recorded_key, Tensor recorded_value, Tensor index, Tensor? valid, "
    "float? scale) -> Tensor",
    _attention_shape,
)
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
    """Scaled dot-product attention: active queries over all positions, keys and values mixed from old and new.

    The rows are written into the recorded maps and undone before returning, which spares a copy of both maps. Not
    for concurrent use of one recording.

    Args:
        query: ``[B, N, heads, D]``.
        key, value: ``[B, N, heads, D]`` and ``[B, N, heads, Dv]``; fewer heads than queries are shared by them.
        recorded_key, recorded_value: ``[B, S, heads, D]`` and ``[B, S, heads, Dv]``, any strides; bit-identical
            afterwards, whatever happens. They may be the same tensor. In another dtype they are converted instead.
        index: int64 ``[1 or B, N]``.
        valid: bool ``[1 or B, N]``, or None when every row is.
        scale: of the scores; None for ``1 / sqrt(D)``.

    Returns:
        ``[B, N, heads, Dv]``, contiguous.
    """
    undo: list[tuple[Tensor, Tensor]] = []
    try:
        keys = _mix(recorded_key, key, index, valid, undo)
        values = _mix(recorded_value, value, index, valid, undo)
        grouped = query.shape[2] != key.shape[2]
        attended = attend(
            query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), scale=scale, enable_gqa=grouped
        )
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
