"""Attention by compiled code: few queries over many keys, on a processor (``native.cpp`` says how)."""

from __future__ import annotations

import ctypes
import logging
import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from fisedit_compile.operators.attention.spec import ATTENTION, Attention
from fisedit_compile.operators.library import Implementation
from fisedit_compile.operators.native.compiling import DTYPES, NotCompiledError, load_library, undisturbed

logger = logging.getLogger(__name__)


def _call(function: Callable[..., int], query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    batch, heads, queries, depth = query.shape
    keys, width = value.shape[2:]
    result = query.new_empty((batch, queries, heads, width)).transpose(1, 2)
    tensors = (query, key, value, result)
    sizes = (batch, heads, heads // key.shape[1], queries, keys, depth, width)
    strides = [tensor.stride(dimension) for tensor in tensors for dimension in (0, 2, 1)]
    failed = function(
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors),
        (ctypes.c_int64 * 7)(*sizes),
        (ctypes.c_int64 * 12)(*strides),
        ctypes.c_float(scale),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("attention found no memory for a block of keys and values")
    return result


@lru_cache(maxsize=8)
@undisturbed()
def _function(dtype: torch.dtype) -> Callable[..., int] | None:
    """The compiled code for a dtype, once it was compared with an exact result; None where there is none."""
    definitions, tolerance = DTYPES[dtype]
    try:
        function: Callable[..., int] = load_library("attention", *definitions).attention
    except NotCompiledError as error:
        logger.info("attention is computed by PyTorch alone: %s", error)
        return None
    # All widths of parts, keys that fill no block, and channels that fill no tile.
    generator = torch.Generator().manual_seed(0)
    for queries, keys in ((1, 3), (40, 100), (101, 130)):
        shapes = ((2, 2, queries, 5), (2, 1, keys, 5), (2, 1, keys, 11))
        query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype) for shape in shapes)
        exact = functional.scaled_dot_product_attention(query.double(), key.double(), value.double(), enable_gqa=True)
        if not torch.allclose(_call(function, query, key, value, 5**-0.5).double(), exact, rtol=0, atol=tolerance):
            logger.warning("compiled attention of %s is wrong on this machine; PyTorch computes it", dtype)
            return None
    return function


def supports(given: Attention) -> str | None:
    """Why compiled code does not compute this attention; None when it does."""
    query, key, value = tensors = given.query, given.key, given.value
    if given.attn_mask is not None or given.dropout_p or given.is_causal:
        return "it has a mask, dropout or an order"
    if query.dtype not in DTYPES or not query.dtype == key.dtype == value.dtype:
        return "there is no code for these dtypes"
    # Of subclasses nothing is known, not even that they have memory.
    if not all(type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu" for tensor in tensors):
        return "a tensor is not a plain one on a processor"
    if not all(tensor.dim() == 4 and tensor.numel() > 0 and tensor.stride(3) == 1 for tensor in tensors):
        return "tensors are empty, or channels do not lie side by side"
    if (
        not query.shape[0] == key.shape[0] == value.shape[0]
        or key.shape[1:3] != value.shape[1:3]
        or query.shape[3] != key.shape[3]
        or query.shape[1] % key.shape[1] != 0
    ):
        return "sizes do not fit each other"
    if query.shape[1] != key.shape[1] and not given.enable_gqa:
        return "shared heads were not asked for"
    if given.scale is not None and not math.isfinite(given.scale):
        return "the scale is not finite"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "gradients are wanted"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    return None if _function(query.dtype) is not None else "nothing is compiled on this machine"


def attention(given: Attention) -> Tensor:
    """Scaled dot-product attention without a mask.

    Returns:
        ``[B, heads, N, Dv]``; in memory heads lie behind positions, as PyTorch's attention on a processor leaves them.

    Raises:
        MemoryError: there is no memory for a block of keys and values.
    """
    function = _function(given.query.dtype)
    assert function is not None
    scale = given.query.shape[3] ** -0.5 if given.scale is None else given.scale
    return _call(function, given.query, given.key, given.value, scale)


IMPLEMENTATIONS = (Implementation(ATTENTION, "compiled", attention, supports, rank=1),)
