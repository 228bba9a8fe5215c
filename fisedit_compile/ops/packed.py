"""Matrix products whose weight was brought, once, to the order in which the processor's library multiplies fastest.

A packed weight is an opaque oneDNN tensor: it has the shape, dtype and device of the weight, but no strides. It is made
in the prologue of a program and read by the edit graph only. Where oneDNN has no product for a dtype, or is not there
at all, ``packs`` says so and nothing is packed.

Packed products are not the fastest everywhere: PyTorch's own ones go through another library on some processors, which
may be better there with many rows, and calling oneDNN costs more than a product of a few small numbers. So both are
measured, once for each size on a machine.
"""

from __future__ import annotations

from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from fisedit_compile.ops.choices import costs, describe_count, describe_dtype
from fisedit_compile.ops.library import operator

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


def describe_product(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> str:
    """What the time of a product depends on, in words."""
    return f"{describe_count(rows)} rows, {inputs}->{outputs} {describe_dtype(dtype)}"


def _pack_matrix_shape(weight: Tensor, rows: int | None = None) -> Tensor:
    return weight.new_empty(weight.shape)


# The schema says that the result may be the weight itself.
@operator("(Tensor(a) weight, int? rows=None) -> Tensor(a)", _pack_matrix_shape)
def pack_matrix(weight: Tensor, rows: int | None = None) -> Tensor:
    """Bring the weight of a linear layer to the order that multiplies fastest.

    Args:
        weight: ``[Cout, Cin]`` with ``packs(weight.device.type, weight.dtype)``.
        rows: how many rows a product is likely to have. Packed and plain products of about so many are measured on this
            machine, unless they were before; None: it is packed in any case.

    Returns:
        A tensor of the same shape for :func:`linear_rows` only: an opaque one, or, where plain products were measured
        to be faster, the weight's own memory if that is contiguous, else a contiguous copy.
    """
    weight = weight.detach().contiguous()

    @cache
    def packed() -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_ROWS)

    if rows is None:
        return packed()
    example = torch.ones(rows, weight.shape[1], dtype=weight.dtype)
    ways = {
        "packed": lambda: linear_rows(example, packed(), None),
        "plain": lambda: linear_rows(example, weight, None),
    }
    case = describe_product(rows, weight.shape[1], weight.shape[0], weight.dtype)
    return packed() if costs.fastest("product", case, ways) == "packed" else weight


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
    return functional.linear(rows, weight, bias).contiguous()
