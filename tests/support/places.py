"""Where a value keeps its positions: recognised from its shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional


class AmbiguousShapeError(AssertionError):
    """A shape fits two resolutions: the test network must use sizes that differ from each other."""


@dataclass(frozen=True)
class Place:
    """Where a value keeps its space.

    ``dimension`` is the first spatial one; ``folds`` is how many heads are folded into the batch; ``before`` and
    ``after`` are how many tokens that are no positions are joined with flattened ones, and always active.
    """

    height: int
    width: int
    dimension: int
    flattened: bool
    folds: int = 1
    before: int = 0
    after: int = 0

    def view(self, mask: Tensor, rank: int) -> Tensor:
        """The mask ``[B, height, width]`` in a shape that broadcasts against the value."""
        if self.flattened:
            mask = functional.pad(mask.flatten(1), (self.before, self.after), value=True)
        mask = mask.repeat_interleave(self.folds, dim=0)
        before = (1,) * (self.dimension - 1)
        after = (1,) * (rank - self.dimension - (1 if self.flattened else 2))
        return mask.reshape(mask.shape[0], *before, *mask.shape[1:], *after)


def locate(
    shape: Sequence[int],
    batch: int,
    resolutions: Sequence[tuple[int, int]],
    joined: Sequence[tuple[int, int, int, int]] = (),
) -> Place | None:
    """Recognise the spatial dimensions of a value from its shape; None for a value that is not spatial."""
    rank = len(shape)
    if rank < 2:
        return None
    found = [
        Place(height, width, dimension, flattened=False)
        for height, width in resolutions
        for dimension in range(1, rank - 1)
        if shape[0] == batch and tuple(shape[dimension : dimension + 2]) == (height, width)
    ]
    folded = rank == 3 and shape[0] % batch == 0
    if not found and (shape[0] == batch or folded):
        found = [
            Place(height, width, dimension, flattened=True, folds=shape[0] // batch)
            for height, width in resolutions
            for dimension in range(1, rank)
            if height * width > 1 and shape[dimension] == height * width
        ]
    if not found and shape[0] == batch:
        found = [
            Place(height, width, dimension, flattened=True, before=before, after=after)
            for height, width, before, after in joined
            for dimension in range(1, rank)
            if shape[dimension] == before + height * width + after
        ]
    if len({(place.height, place.width, place.before) for place in found}) > 1:
        raise AmbiguousShapeError(f"shape {tuple(shape)} fits {found}")
    return found[0] if found else None  # attention scores are [..., queries, keys]: the queries come first
