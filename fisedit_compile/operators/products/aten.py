"""Matrix products whose weight was brought, once, to the order in which the processor's library multiplies fastest.

A packed weight is an opaque oneDNN tensor: it has the shape, dtype and device of the weight, but no strides. Or it is
one for the code that is compiled for the machine (``native.py``), which has more dimensions. It is made in
the prologue of a program and read by the edit graph only. Where oneDNN has no product for a dtype, or is not there at
all, ``packs`` says so and nothing is packed.

Which products are the fastest depends: PyTorch's own ones go through another library on some processors, which may be
better there with many rows, calling oneDNN costs more than a product of a few small numbers, and compiled code is made
for few rows. So all are measured, once for each size on a machine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from fisedit_compile.operators.choosing import taken
from fisedit_compile.operators.library import operator
from fisedit_compile.operators.products import native as products
from fisedit_compile.operators.products.spec import MEASURED, MOST_ROWS, PACKED, ProductCase
from fisedit_compile.operators.records import costs

# For how many rows the order is chosen. Orders for 64 rows and more are alike; that for one row is slow for many.
TYPICAL_ROWS = 64


@lru_cache(maxsize=16)
def packs(device: str, dtype: torch.dtype) -> bool:
    """Whether weights of this dtype can be packed on this type of device."""
    if device != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def _pack_matrix_shape(weight: Tensor, rows: int | None = None) -> Tensor:
    return weight.new_empty(weight.shape)


# The schema says that the result may be the weight itself.
@operator("(Tensor(a) weight, int? rows=None) -> Tensor(a)", _pack_matrix_shape)
def pack_matrix(weight: Tensor, rows: int | None = None) -> Tensor:
    """Bring the weight of a linear layer to the order that multiplies fastest.

    Args:
        weight: ``[Cout, Cin]`` with ``packs(weight.device.type, weight.dtype)``.
        rows: how many rows a product is likely to have. Packed, plain and compiled products of about so many are
            measured on this machine, unless they were before; None: it is packed in any case.

    Returns:
        A tensor for :func:`linear_rows` only: an opaque one of the same shape; where compiled products were measured to
        be the fastest, one of more dimensions; or where plain ones were, the weight's own memory if that is contiguous,
        else a contiguous copy.
    """
    weight = weight.detach().contiguous()
    if weight.numel() == 0:
        return weight

    @cache
    def packed() -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_ROWS)

    @cache
    def ordered() -> Tensor:
        return products.order(weight)

    if rows is None:
        return packed()
    example = torch.ones(rows, weight.shape[1], dtype=weight.dtype)
    orders: dict[str, Callable[[], Tensor]] = {"packed": packed, "plain": lambda: weight}
    if products.supports(weight):
        orders["compiled"] = ordered

    def multiply(order: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: linear_rows(example, order(), None)

    ways = {way: multiply(order) for way, order in orders.items()}
    case = ProductCase.of(rows, weight.shape[1], weight.shape[0], weight.dtype)
    return orders[costs.fastest(PACKED, case, ways)]()


def outputs_of(weight: Tensor) -> int:
    """Outputs of a linear layer whose weight may come from :func:`pack_matrix`."""
    return weight.shape[0] * weight.shape[2] if products.is_ordered(weight) else weight.shape[0]


def _linear_rows_shape(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return rows.new_empty((*rows.shape[:-1], weight.shape[0]))


@operator("(Tensor rows, Tensor weight, Tensor? bias) -> Tensor", _linear_rows_shape)
def linear_rows(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer.

    Args:
        rows: ``[..., Cin]``, dtype of ``weight``.
        weight: ``[Cout, Cin]``, as it is or from :func:`pack_matrix`.
        bias: ``[Cout]`` or None.

    Returns:
        ``[..., Cout]``, contiguous.
    """
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    if products.is_ordered(weight):
        return products.product(rows, weight, bias)
    return functional.linear(rows, weight, bias).contiguous()


def _linear_map_shape(map: Tensor, weight: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return map.new_empty((*map.shape[:-1], weight.shape[0]))


@operator("(Tensor map, Tensor weight, Tensor packed, Tensor? bias) -> Tensor", _linear_map_shape)
def linear_map(map: Tensor, weight: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer of a whole map, by the product that was measured to be the fastest: with many rows it may be
    another than for those of edits, for which the weight was packed.

    Args:
        map: ``[..., Cin]``, dtype of ``weight``.
        weight: ``[Cout, Cin]``.
        packed: the same weight, from :func:`pack_matrix`.
        bias: ``[Cout]`` or None.

    Returns:
        ``[..., Cout]``, contiguous.
    """
    kind = "packed" if packed.is_mkldnn else "compiled" if products.is_ordered(packed) else "plain"
    rows = map.numel() // max(map.shape[-1], 1)
    if kind != "plain" and rows > 0:

        @cache
        def example() -> Tensor:
            return torch.ones((min(rows, MOST_ROWS), map.shape[-1]), dtype=map.dtype)

        ways = {
            "plain": lambda: linear_rows(example(), weight, None),
            kind: lambda: linear_rows(example(), packed, None),
        }
        case = ProductCase.of(min(rows, MOST_ROWS), weight.shape[1], weight.shape[0], map.dtype)
        kind = costs.fastest(MEASURED, case, ways)
    taken.note(f"{MEASURED}: {kind}")
    return linear_rows(map, weight if kind == "plain" else packed, bias)
