"""What attention is measured by."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

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
