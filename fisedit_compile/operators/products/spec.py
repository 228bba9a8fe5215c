"""What products are measured by."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fisedit_compile.operators.records import dtype_name, typical_count

#: Products of whole maps are measured with so many rows at most: more take longer in the same proportion.
MOST_ROWS = 1024
#: Under which names times are kept: of few rows when a weight is packed, and of whole maps, whose choices are counted.
PACKED, MEASURED = "product", "product of a map"


class ProductCase(NamedTuple):
    """What the time of a product depends on.

    Attributes:
        rows: a typical count.
        inputs, outputs: of the weight.
        dtype: of both factors.
    """

    rows: int
    inputs: int
    outputs: int
    dtype: str

    @staticmethod
    def of(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> ProductCase:
        """The case of so many rows."""
        return ProductCase(typical_count(rows), inputs, outputs, dtype_name(dtype))

    def __str__(self) -> str:
        return f"about {self.rows} rows, {self.inputs}->{self.outputs} {self.dtype}"
