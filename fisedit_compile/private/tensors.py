"""What PyTorch keeps of a tensor."""

from __future__ import annotations

from torch import Tensor

NOT_COUNTED = -1
"""The version of an inference tensor: PyTorch does not count its changes."""


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place; :data:`NOT_COUNTED` for an inference tensor."""
    return NOT_COUNTED if tensor.is_inference() else tensor._version
