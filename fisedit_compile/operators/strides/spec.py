"""Operators that look at strides, over elements that lie in order.

Graphs do not say how values lie in memory: a map may come from rows, and copies are dropped. What PyTorch computes from
strides, as sliding windows by ``as_strided`` do, is made to depend on values only: the input is brought to the order
that it had when the network was traced, which is that of its dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fisedit_compile.operators.library import Operator


class AsStrided(NamedTuple):
    """Elements at regular distances, which may overlap.

    Attributes:
        values: any shape; taken as one line in the order of its dimensions.
        size: of the result.
        stride: distance of neighbours along each dimension of the result, in elements of the line. The first element is
            the line's first.

    The result is ``size``, contiguous.
    """

    values: Tensor
    size: Sequence[int]
    stride: Sequence[int]


def _as_strided_shape(given: AsStrided) -> Tensor:
    return given.values.new_empty(given.size)


AS_STRIDED = Operator("as_strided", AsStrided, _as_strided_shape)


class ComplexOfPairs(NamedTuple):
    """Complex numbers from real and imaginary parts.

    Attributes:
        values: ``[..., 2]``, floating.

    The result is ``[...]``, contiguous.
    """

    values: Tensor


def _pairs_shape(given: ComplexOfPairs) -> Tensor:
    return torch.view_as_complex(given.values.new_empty(given.values.shape))


COMPLEX_OF_PAIRS = Operator("complex_of_pairs", ComplexOfPairs, _pairs_shape)


class Reinterpreted(NamedTuple):
    """The same bits as numbers of another type.

    Attributes:
        values: ``[..., n]``.
        dtype: of the result.

    The result is ``[..., m]``, contiguous, with as many bytes.
    """

    values: Tensor
    dtype: torch.dtype


def _reinterpreted_shape(given: Reinterpreted) -> Tensor:
    values, dtype = given
    size = values.shape[-1] * values.element_size() // torch.empty(0, dtype=dtype).element_size()
    return values.new_empty((*values.shape[:-1], size), dtype=dtype)


REINTERPRETED = Operator("reinterpreted", Reinterpreted, _reinterpreted_shape)
