"""Running a Dynamo graph with calls replaced that PyTorch cannot make functional."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

#: Names of the first arguments of calls that drop elements, and what those are where they are not given.
DROPOUTS: dict[Callable[..., Any], dict[str, Any]] = {
    functional.dropout: {"input": None, "p": 0.5, "training": True},
    torch.dropout: {"input": None, "p": None, "train": None},
}


class Functionalisable(fx.Interpreter):
    """Runs a graph; ``fill_diagonal_`` of a matrix writes into the view of its diagonal, and what drops no elements
    returns its input, as it does outside of graphs.

    PyTorch's trace forbids that anything changes the result of a dropout in place, idle or not; activations do.

    For the other, PyTorch makes the operator of ``as_strided``, after which writes cannot be traced where the matrix is
    itself a view. Masks of attention are made so (perturbed attention guidance of Stable Diffusion 3).
    """

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A function of the graph."""
        if target in DROPOUTS:
            given = {**DROPOUTS[target], **dict(zip(DROPOUTS[target], args, strict=False)), **kwargs}
            value, probability, training = (given[name] for name in DROPOUTS[target])
            if probability == 0 or training is False:
                return value
        return super().call_function(target, args, kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A method of the graph."""
        if target == "fill_diagonal_" and len(args) == 2 and not kwargs:
            matrix, value = args
            if isinstance(matrix, Tensor) and matrix.dim() == 2:
                matrix.diagonal().fill_(value)
                return matrix
        return super().call_method(target, args, kwargs)
