"""Running a Dynamo graph with calls replaced that PyTorch cannot make functional."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx


class Functionalisable(fx.Interpreter):
    """Runs a graph; ``fill_diagonal_`` of a matrix writes into the view of its diagonal.

    PyTorch makes the operator of ``as_strided``, after which writes cannot be traced where the matrix is itself a
    view. Masks of attention are made so (perturbed attention guidance of Stable Diffusion 3).
    """

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A method of the graph."""
        if target == "fill_diagonal_" and len(args) == 2 and not kwargs:
            matrix, value = args
            if isinstance(matrix, Tensor) and matrix.dim() == 2:
                matrix.diagonal().fill_(value)
                return matrix
        return super().call_method(target, args, kwargs)
