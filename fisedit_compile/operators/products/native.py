"""Products of few rows by compiled code, with weights in an order of its own (``native.cpp`` says how)."""

from __future__ import annotations

import ctypes
import logging
import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from fisedit_compile.operators.library import Implementation
from fisedit_compile.operators.native.compiling import DTYPES, NotCompiledError, load_library, undisturbed
from fisedit_compile.operators.products.spec import (
    LINEAR_MAP,
    LINEAR_ROWS,
    PACK_MATRIX,
    LinearMap,
    LinearRows,
    PackMatrix,
    is_ordered,
)

logger = logging.getLogger(__name__)


def _multiply(library: ctypes.CDLL, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    panels, steps, panel = weight.shape[:3]
    result = rows.new_empty((*rows.shape[:-1], panels * panel))
    if result.numel() == 0:
        return result
    rows = rows.reshape(-1, rows.shape[-1]).contiguous()
    bias = None if bias is None else bias.contiguous()
    failed = library.product(
        ctypes.c_void_p(rows.data_ptr()),
        ctypes.c_int64(rows.shape[0]),
        ctypes.c_int64(steps),
        ctypes.c_void_p(weight.data_ptr()),
        ctypes.c_int64(steps),
        ctypes.c_int64(panels),
        ctypes.c_void_p(None if bias is None else bias.data_ptr()),
        ctypes.c_void_p(result.data_ptr()),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("a product found no memory for its sums")
    return result


def _ordered(weight: Tensor, panel: int) -> Tensor:
    outputs, inputs = weight.shape
    if weight.dtype == torch.bfloat16:
        return weight.view(outputs // panel, panel, inputs // 2, 2).permute(0, 2, 1, 3).contiguous()
    return weight.view(outputs // panel, panel, inputs).transpose(1, 2).contiguous()


@lru_cache(maxsize=8)
@undisturbed()
def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled code for a dtype, once it was compared with exact results; None where there is none."""
    definitions, tolerance = DTYPES[dtype]
    try:
        library = load_library("products", *definitions)
    except NotCompiledError as error:
        logger.info("products are computed by PyTorch alone: %s", error)
        return None
    panel = library.panel()
    if panel == 0:
        logger.info("this processor multiplies no %s", dtype)
        return None
    # Rows of all tiles, and inputs that fill no block.
    generator = torch.Generator().manual_seed(0)
    for count, inputs in ((1, 6), (13, 700), (101, 260)):
        rows, weight = (
            torch.randn(size, inputs, generator=generator, dtype=torch.float32) for size in (count, 3 * panel)
        )
        bias = torch.randn(3 * panel, generator=generator, dtype=torch.float32)
        given = [tensor.to(dtype) for tensor in (rows / inputs**0.5, weight, bias)]
        exact = functional.linear(*(tensor.double() for tensor in given))
        result = _multiply(library, given[0], _ordered(given[1], panel), given[2])
        if not torch.allclose(result.double(), exact, rtol=tolerance, atol=tolerance):
            logger.warning("compiled products of %s are wrong on this machine; PyTorch computes them", dtype)
            return None
    return library


def supports(weight: Tensor) -> bool:
    """Whether compiled code multiplies with this weight, ``[Cout, Cin]``."""
    if weight.device.type != "cpu" or weight.dtype not in DTYPES or weight.dim() != 2 or weight.numel() == 0:
        return False
    if weight.dtype == torch.bfloat16 and weight.shape[1] % 2:
        return False
    library = _library(weight.dtype)
    return library is not None and weight.shape[0] % library.panel() == 0


def order(weight: Tensor) -> Tensor:
    """Bring a weight to the order in which :func:`product` reads it.

    Args:
        weight: ``[Cout, Cin]``, contiguous, supported.

    Returns:
        ``[panels, Cin, panel]``, or in bfloat16 ``[panels, Cin / 2, panel, 2]``.
    """
    library = _library(weight.dtype)
    assert library is not None
    return _ordered(weight, library.panel())


def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer.

    Args:
        rows: ``[..., Cin]``, dtype of the weight.
        weight: from :func:`order`.
        bias: ``[Cout]``, of the same dtype, or None.

    Returns:
        ``[..., Cout]``, contiguous.

    Raises:
        ValueError: rows, weight and bias do not fit each other.
        MemoryError: there is no memory for the sums.
    """
    library = _library(weight.dtype)
    assert library is not None
    panels, steps, panel, *numbers = weight.shape
    inputs, outputs = steps * math.prod(numbers), panels * panel
    fitting = rows.dtype == weight.dtype and rows.shape[-1] == inputs
    if not fitting or (bias is not None and (bias.shape != (outputs,) or bias.dtype != weight.dtype)):
        described = [f"{tuple(given.shape)} {given.dtype}" for given in (rows, bias) if given is not None]
        raise ValueError(
            f"expected rows [..., {inputs}] and a bias [{outputs}] of {weight.dtype}, got {' and '.join(described)}"
        )
    return _multiply(library, rows, weight, bias)


def _orders(given: PackMatrix) -> str | None:
    return None if supports(given.weight) else "compiled code does not multiply with this weight"


def _ordered_weight(given: LinearRows) -> str | None:
    return None if is_ordered(given.weight) else "the weight is not in the order of compiled code"


def _ordered_map(given: LinearMap) -> str | None:
    return None if is_ordered(given.packed) else "the weight is not in the order of compiled code"


def _product_of_map(given: LinearMap) -> Tensor:
    return product(given.map, given.packed, given.bias)


IMPLEMENTATIONS = (
    Implementation(LINEAR_ROWS, "compiled", lambda given: product(*given), _ordered_weight, rank=1),
    Implementation(PACK_MATRIX, "compiled", lambda given: order(given.weight.detach().contiguous()), _orders, rank=2),
    Implementation(LINEAR_MAP, "compiled", _product_of_map, _ordered_map, rank=1),
)
