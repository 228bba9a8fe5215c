"""Attention of whole maps, and of rows over a recorded map whose active positions are replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisedit_compile.operators.library import Measuring, Operator
from fisedit_compile.operators.records import dtype_name, typical_count

#: Under which name times are kept and choices counted.
MEASURED = "attention"
#: Attention is measured with so many queries and keys of one sample at most: more take longer in the same proportion.
MOST_QUERIES, MOST_KEYS = 512, 1024


class AttentionCase(NamedTuple):
    """What the time of attention depends on.

    Attributes:
        heads, shared_heads: of queries, and of keys and values.
        depth, width: channels of a query, and of a value.
        dtype: of all.
        queries, keys: typical counts of one sample.
    """

    heads: int
    shared_heads: int
    depth: int
    width: int
    dtype: str
    queries: int
    keys: int

    @staticmethod
    def of(query: Tensor, key: Tensor, value: Tensor) -> AttentionCase:
        """The case of tensors ``[B, heads, positions, D]``."""
        return AttentionCase(
            query.shape[1],
            key.shape[1],
            query.shape[3],
            value.shape[3],
            dtype_name(query.dtype),
            typical_count(min(query.shape[2], MOST_QUERIES)),
            typical_count(min(key.shape[2], MOST_KEYS)),
        )

    def __str__(self) -> str:
        heads = f"{self.heads} of {self.shared_heads} heads {self.depth}->{self.width} {self.dtype}"
        return f"{heads}, about {self.queries} queries, about {self.keys} keys"


class Attention(NamedTuple):
    """``torch.nn.functional.scaled_dot_product_attention``.

    Attributes:
        query: ``[B, heads, N, D]``.
        key, value: ``[B, heads, S, D]`` and ``[B, heads, S, Dv]``.
        attn_mask: of the scores, or None.
        dropout_p: share of the scores that are dropped.
        is_causal: whether a query sees no key behind it.
        scale: of the scores; None for ``1 / sqrt(D)``.
        enable_gqa: whether keys and values may have fewer heads than queries, which then share them.

    The result is ``[B, heads, N, Dv]``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False


def _case(given: Attention) -> AttentionCase:
    return AttentionCase.of(given.query, given.key, given.value)


def _timed(given: Attention, run: Callable[[Attention], Any]) -> Callable[[], object]:
    """Attention of some queries and keys of one sample."""
    query, key, value = given.query[:1, :, :MOST_QUERIES], given.key[:1, :, :MOST_KEYS], given.value[:1, :, :MOST_KEYS]
    example = given._replace(query=query, key=key, value=value)
    return lambda: run(example)


ATTENTION = Operator(
    "attend",
    Attention,
    stands_for=torch.ops.aten.scaled_dot_product_attention.default,
    measuring=Measuring(MEASURED, _case, _timed),
    counted=MEASURED,
)


class AttentionRows(NamedTuple):
    """Scaled dot-product attention: active queries over all positions, keys and values mixed from old and new.

    Attributes:
        query: ``[B, N, heads, D]``.
        key, value: ``[B, N, heads, D]`` and ``[B, N, heads, Dv]``; fewer heads than queries are shared by them.
        recorded_key, recorded_value: ``[B, S, heads, D]`` and ``[B, S, heads, Dv]``, any strides; bit-identical
            afterwards, whatever happens. They may be the same tensor. In another dtype they are converted instead.
        index: int64 ``[1 or B, N]``.
        valid: bool ``[1 or B, N]``, or None when every row is.
        scale: of the scores; None for ``1 / sqrt(D)``.

    The result is ``[B, N, heads, Dv]``, contiguous. Rows may be written into the recorded maps and taken back before
    returning, which spares a copy of both maps: not for concurrent use of one recording.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    recorded_key: Tensor
    recorded_value: Tensor
    index: Tensor  # type: ignore[assignment]
    valid: Tensor | None
    scale: float | None


def _shape(given: AttentionRows) -> Tensor:
    return given.query.new_empty((*given.query.shape[:3], given.value.shape[3]))


ATTENTION_ROWS = Operator("attention_rows", AttentionRows, _shape)
