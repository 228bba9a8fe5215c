"""Products with the weights of linear layers, as they are or brought to the order that multiplies fastest.

A packed weight is an opaque oneDNN tensor: it has the shape, dtype and device of the weight, but no strides. Or it is
one for the code that is compiled for the machine (``native.py``), which has more dimensions. It is made in the prologue
of a program and read by the edit graph only.

Which products are the fastest depends: PyTorch's own ones go through another library on some processors, which may be
better there with many rows, calling oneDNN costs more than a product of a few small numbers, and compiled code is made
for few rows. So all are measured, once for each size on a machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisedit_compile.operators.choosing import call
from fisedit_compile.operators.library import Measuring, Operator
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


def is_ordered(weight: Tensor) -> bool:
    """Whether a weight is in the order of compiled code: those of linear layers have two dimensions."""
    return weight.dim() > 2


def outputs_of(weight: Tensor) -> int:
    """Outputs of a linear layer whose weight may be packed."""
    return weight.shape[0] * weight.shape[2] if is_ordered(weight) else weight.shape[0]


class LinearRows(NamedTuple):
    """A linear layer.

    Attributes:
        rows: ``[..., Cin]``, dtype of ``weight``.
        weight: ``[Cout, Cin]``, as it is or of the operator ``pack_matrix``.
        bias: ``[Cout]`` or None.

    The result is ``[..., Cout]``, contiguous.
    """

    rows: Tensor
    weight: Tensor
    bias: Tensor | None


def _linear_rows_shape(given: LinearRows) -> Tensor:
    return given.rows.new_empty((*given.rows.shape[:-1], given.weight.shape[0]))


LINEAR_ROWS = Operator("linear_rows", LinearRows, _linear_rows_shape)


class PackMatrix(NamedTuple):
    """Bring the weight of a linear layer to the order that multiplies fastest.

    Attributes:
        weight: ``[Cout, Cin]``.
        rows: how many rows a product is likely to have. Products of about so many rows with each order are measured on
            this machine, unless they were before; None: it is packed in any case, in oneDNN's order.

    The result is for the operators ``linear_rows`` and ``linear_map`` only: an opaque tensor of the same shape; one of
    more dimensions for compiled products; or the weight's own memory if that is contiguous, else a contiguous copy.
    """

    weight: Tensor
    rows: int | None = None


def _pack_matrix_shape(given: PackMatrix) -> Tensor:
    return given.weight.new_empty(given.weight.shape)


def _asked_order(given: PackMatrix) -> str | None:
    if given.weight.numel() == 0:
        return "plain"
    return "packed" if given.rows is None else None


def _packed_case(given: PackMatrix) -> ProductCase | None:
    outputs, inputs = given.weight.shape
    return None if given.rows is None else ProductCase.of(given.rows, inputs, outputs, given.weight.dtype)


def _packed_timed(given: PackMatrix, run: Callable[[PackMatrix], Any]) -> Callable[[], object]:
    """Products with the packed weight: packing it takes its time only once."""
    order: Tensor = run(given)
    example = torch.ones(given.rows or 1, given.weight.shape[1], dtype=given.weight.dtype)
    return lambda: call(LINEAR_ROWS, LinearRows(example, order, None))


PACK_MATRIX = Operator(
    "pack_matrix",
    PackMatrix,
    _pack_matrix_shape,
    # The result may be the weight itself.
    schema="(Tensor(a) weight, SymInt? rows=None) -> Tensor(a)",
    measuring=Measuring(PACKED, _packed_case, _packed_timed),
    asked=_asked_order,
)


class LinearMap(NamedTuple):
    """A linear layer of a whole map, by the product that was measured to be the fastest: with many rows it may be
    another than for those of edits, for which the weight was packed.

    Attributes:
        map: ``[..., Cin]``, dtype of ``weight``.
        weight: ``[Cout, Cin]``.
        packed: the same weight, of the operator ``pack_matrix``.
        bias: ``[Cout]`` or None.

    The result is ``[..., Cout]``, contiguous.
    """

    map: Tensor
    weight: Tensor
    packed: Tensor
    bias: Tensor | None


def _linear_map_shape(given: LinearMap) -> Tensor:
    return given.map.new_empty((*given.map.shape[:-1], given.weight.shape[0]))


def _map_rows(given: LinearMap) -> int:
    return given.map.numel() // max(given.map.shape[-1], 1)


def _map_case(given: LinearMap) -> ProductCase | None:
    rows = _map_rows(given)
    outputs, inputs = given.weight.shape
    return ProductCase.of(min(rows, MOST_ROWS), inputs, outputs, given.map.dtype) if rows > 0 else None


def _map_timed(given: LinearMap, run: Callable[[LinearMap], Any]) -> Callable[[], object]:
    example = torch.ones((min(_map_rows(given), MOST_ROWS), given.map.shape[-1]), dtype=given.map.dtype)
    return lambda: run(given._replace(map=example, bias=None))


LINEAR_MAP = Operator(
    "linear_map",
    LinearMap,
    _linear_map_shape,
    measuring=Measuring(MEASURED, _map_case, _map_timed),
    counted=MEASURED,
)
