"""Matrix products whose weight was brought, once, to the order in which the processor's library multiplies fastest.

A packed weight is an opaque oneDNN tensor: it has the shape, dtype and device of the weight, but no strides. It is made
in the prologue of a program and read by the edit graph only. Where oneDNN has no product for a dtype, or is not there
at all, ``packs`` says so and nothing is packed.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

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


def _pack_matrix_shape(weight: Tensor) -> Tensor:
    return weight.new_empty(weight.shape)


@operator("(Tensor weight) -> Tensor", _pack_matrix_shape)
def pack_matrix(weight: Tensor) -> Tensor:
    """Pack the weight of a linear layer.

    Args:
        weight: ``[Cout, Cin]`` with ``packs(weight.device.type, weight.dtype)``.

    Returns:
        An opaque tensor of the same shape, for :func:`linear_rows` only.
    """
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), TYPICAL_ROWS)


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
