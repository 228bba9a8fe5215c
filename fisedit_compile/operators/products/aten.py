"""Products by PyTorch, with weights as they are, and by oneDNN, with weights that were brought to its order.

Where oneDNN has no product for a dtype, or is not there at all, :func:`packs` says so and nothing is packed.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from fisedit_compile.operators.choosing import call
from fisedit_compile.operators.library import Implementation
from fisedit_compile.operators.products.spec import (
    LINEAR_MAP,
    LINEAR_ROWS,
    PACK_MATRIX,
    LinearMap,
    LinearRows,
    PackMatrix,
    is_ordered,
)
from fisedit_compile.private.onednn import multiplies_packed, multiply_packed, pack_weight

# For how many rows the order is chosen. Orders for 64 rows and more are alike; that for one row is slow for many.
TYPICAL_ROWS = 64


@lru_cache(maxsize=16)
def packs(device: str, dtype: torch.dtype) -> bool:
    """Whether weights of this dtype can be packed on this type of device."""
    return device == "cpu" and multiplies_packed(dtype)


def _plain_weight(given: LinearRows) -> str | None:
    return "the weight is packed" if given.weight.is_mkldnn or is_ordered(given.weight) else None


def _packed_weight(given: LinearRows) -> str | None:
    return None if given.weight.is_mkldnn else "the weight is not in oneDNN's order"


def plain_product(given: LinearRows) -> Tensor:
    """A product with a weight as it is."""
    return functional.linear(given.rows, given.weight, given.bias).contiguous()


def packed_product(given: LinearRows) -> Tensor:
    """A product with a packed weight."""
    return multiply_packed(given.rows, given.weight, given.bias)


def _packable(given: PackMatrix) -> str | None:
    weight = given.weight
    return None if packs(weight.device.type, weight.dtype) else f"oneDNN multiplies no {weight.dtype} here"


def pack(given: PackMatrix) -> Tensor:
    """The weight in oneDNN's order."""
    return pack_weight(given.weight.detach().contiguous(), TYPICAL_ROWS)


def leave(given: PackMatrix) -> Tensor:
    """The weight as it is, contiguous."""
    return given.weight.detach().contiguous()


def _packed_map(given: LinearMap) -> str | None:
    return None if given.packed.is_mkldnn else "the weight is not in oneDNN's order"


def plain_map(given: LinearMap) -> Tensor:
    """A product of a map with the weight as it is."""
    result: Tensor = call(LINEAR_ROWS, LinearRows(given.map, given.weight, given.bias))
    return result


def packed_map(given: LinearMap) -> Tensor:
    """A product of a map with the packed weight."""
    result: Tensor = call(LINEAR_ROWS, LinearRows(given.map, given.packed, given.bias))
    return result


IMPLEMENTATIONS = (
    Implementation(LINEAR_ROWS, "plain", plain_product, _plain_weight),
    Implementation(LINEAR_ROWS, "packed", packed_product, _packed_weight, rank=2),
    Implementation(PACK_MATRIX, "packed", pack, _packable),
    Implementation(PACK_MATRIX, "plain", leave, rank=1),
    Implementation(LINEAR_MAP, "plain", plain_map),
    Implementation(LINEAR_MAP, "packed", packed_map, _packed_map, rank=1),
)
