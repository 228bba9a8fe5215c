"""Operators that look at strides, over elements that lie in order.

Graphs do not say how values lie in memory: a map may come from rows, and copies are dropped. What PyTorch computes from
strides, as sliding windows by ``as_strided`` do, is made to depend on values only: the input is brought to the order
that it had when the network was traced, which is that of its dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fisedit_compile.operators.library import operator


def _as_strided_shape(values: Tensor, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    return values.new_empty(size)


@operator("(Tensor values, int[] size, int[] stride) -> Tensor", _as_strided_shape)
def as_strided(values: Tensor, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Elements at regular distances, which may overlap.

    Args:
        values: any shape; taken as one line in the order of its dimensions.
        size: of the result.
        stride: distance of neighbours along each dimension of the result, in elements of the line. The first element is
            the line's first.

    Returns:
        ``size``, contiguous.
    """
    strided = torch.as_strided(values.contiguous(), size, stride, 0)
    return strided.clone(memory_format=torch.contiguous_format)


def _pairs_shape(values: Tensor) -> Tensor:
    return torch.view_as_complex(values.new_empty(values.shape))


@operator("(Tensor values) -> Tensor", _pairs_shape)
def complex_of_pairs(values: Tensor) -> Tensor:
    """Complex numbers from real and imaginary parts.

    Args:
        values: ``[..., 2]``, floating.

    Returns:
        ``[...]``, contiguous.
    """
    return torch.view_as_complex(values.contiguous()).clone()


def _reinterpreted_shape(values: Tensor, dtype: torch.dtype) -> Tensor:
    size = values.shape[-1] * values.element_size() // torch.empty(0, dtype=dtype).element_size()
    return values.new_empty((*values.shape[:-1], size), dtype=dtype)


@operator("(Tensor values, ScalarType dtype) -> Tensor", _reinterpreted_shape)
def reinterpreted(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The same bits as numbers of another type.

    Args:
        values: ``[..., n]``.
        dtype: of the result.

    Returns:
        ``[..., m]``, contiguous, with as many bytes.
    """
    return values.contiguous().view(dtype).clone()
