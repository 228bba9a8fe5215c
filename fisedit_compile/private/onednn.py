"""Products of oneDNN with weights in its own order, which PyTorch has as operators with private names."""

from __future__ import annotations

import torch
from torch import Tensor


def multiplies_packed(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there and multiplies with packed weights of this dtype."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def pack_weight(weight: Tensor, rows: int) -> Tensor:
    """A weight ``[Cout, Cin]``, contiguous, in the order that oneDNN multiplies fastest with so many rows.

    Returns:
        An opaque tensor of the same shape, dtype and device.
    """
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return packed


def multiply_packed(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Rows ``[..., Cin]`` times a weight of :func:`pack_weight`, plus a bias: ``[..., Cout]``, contiguous."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return result
