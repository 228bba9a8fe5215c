"""Operators that look at strides, by PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fisedit_compile.operators.library import Implementation
from fisedit_compile.operators.strides.spec import (
    AS_STRIDED,
    COMPLEX_OF_PAIRS,
    REINTERPRETED,
    AsStrided,
    ComplexOfPairs,
    Reinterpreted,
)


def as_strided(given: AsStrided) -> Tensor:
    """Elements at regular distances."""
    strided = torch.as_strided(given.values.contiguous(), given.size, given.stride, 0)
    return strided.clone(memory_format=torch.contiguous_format)


def complex_of_pairs(given: ComplexOfPairs) -> Tensor:
    """Complex numbers."""
    return torch.view_as_complex(given.values.contiguous()).clone()


def reinterpreted(given: Reinterpreted) -> Tensor:
    """The same bits."""
    return given.values.contiguous().view(given.dtype).clone()


IMPLEMENTATIONS = (
    Implementation(AS_STRIDED, "aten", as_strided),
    Implementation(COMPLEX_OF_PAIRS, "aten", complex_of_pairs),
    Implementation(REINTERPRETED, "aten", reinterpreted),
)
