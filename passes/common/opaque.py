"""A graph that has to run as a whole, as what a call in another graph calls."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch


class Opaque:
    """A graph that passes cannot look into, as the target of a call.

    Attributes:
        reason: why it runs as a whole.
        changed: positions of the inputs that it changes in place.
    """

    # FX names nodes, and what is called in the code that it writes, by it.
    __name__ = "opaque"

    def __init__(
        self,
        run: Callable[..., Sequence[Any]],
        reason: str,
        strides: Sequence[tuple[int, ...] | None],
        changed: Collection[int] = (),
    ) -> None:
        """Wrap a graph.

        Args:
            run: the graph; takes the flat inputs and returns the outputs.
            reason: see above.
            strides: of each input as the graph knows it; None for what is no tensor.
            changed: see above.
        """
        self._run = run
        # A copy of what the graph changes would keep the change from the caller.
        self._strides = tuple(None if at in changed else known for at, known in enumerate(strides))
        self.reason = reason
        self.changed = frozenset(changed)

    def __str__(self) -> str:
        return "the whole graph"

    def __call__(self, *arguments: Any) -> Sequence[Any]:
        return self._run(*map(_with_strides, arguments, self._strides))


def _with_strides(value: Any, strides: tuple[int, ...] | None) -> Any:
    """A tensor as it lies in memory when the graph is called by itself: views in the graph rely on that."""
    if strides is None or value.stride() == strides:
        return value
    if any(stride == 0 and size > 1 for stride, size in zip(strides, value.shape, strict=True)):
        # Every view of elements that lie on top of each other is one of elements in order as well.
        return value.contiguous()
    return torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device).copy_(value)
