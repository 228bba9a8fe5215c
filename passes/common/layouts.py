"""How a spatial value lies in memory, seen logically: which dimension is batch, which are space, which are channels.

Rows are stored as ``[B, N, *C]``: batch, active positions, then the channel dimensions in their logical order. A
reshape or permutation that only moves or merges whole dimensions therefore costs nothing on rows, or one reshape of
the channel dimensions.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from fisedit_compile.runtime.cover import WHOLE, Cover
from fisedit_compile.runtime.spec import Domain

Dimension = Literal["batch", "height", "width", "space", "channel"]
BATCH: Dimension = "batch"
HEIGHT: Dimension = "height"
WIDTH: Dimension = "width"
SPACE: Dimension = "space"
CHANNEL: Dimension = "channel"
NCHW = (BATCH, CHANNEL, HEIGHT, WIDTH)
NHWC = (BATCH, HEIGHT, WIDTH, CHANNEL)
TOKENS = (BATCH, SPACE, CHANNEL)


@dataclass(frozen=True)
class Spatial:
    """A value with one entry for each position of ``domain``; ``dims`` names each of its dimensions."""

    domain: Domain
    dims: tuple[Dimension, ...]

    @property
    def batch_dim(self) -> int:
        """Which dimension is the batch."""
        return self.dims.index(BATCH)

    @property
    def space_dims(self) -> tuple[int, ...]:
        """(height, width) or (space,)."""
        if SPACE in self.dims:
            return (self.dims.index(SPACE),)
        return (self.dims.index(HEIGHT), self.dims.index(WIDTH))

    @property
    def space_rank(self) -> int:
        """2 when height and width are dimensions of their own, else 1."""
        return len(self.space_dims)

    @property
    def channel_dims(self) -> tuple[int, ...]:
        """All other dimensions, in order."""
        return tuple(dim for dim, name in enumerate(self.dims) if name == CHANNEL)

    @property
    def order(self) -> tuple[int, ...]:
        """Permutation to (batch, space..., channels...)."""
        return (self.batch_dim, *self.space_dims, *self.channel_dims)

    def row_dim(self, dim: int) -> int:
        """Dimension of the rows that holds the logical channel dimension ``dim``."""
        return 2 + self.channel_dims.index(dim)

    def at(self, cover: Cover = WHOLE) -> Spatial:
        """The same size and dimensions at another place of the mask."""
        return Spatial(Domain(self.domain.height, self.domain.width, cover=cover), self.dims)

    def with_dims(self, dims: tuple[Dimension, ...]) -> Spatial:
        """The same domain with other dimensions."""
        return Spatial(self.domain, dims)


def check_dims(spatial: Spatial) -> Spatial | str:
    """The value, or the reason why its dimensions are not those of a spatial value."""
    dims = spatial.dims
    if dims.count(BATCH) != 1:
        return "the batch dimension is lost"
    flat, square = dims.count(SPACE), (dims.count(HEIGHT), dims.count(WIDTH))
    if not ((flat == 1 and square == (0, 0)) or (flat == 0 and square == (1, 1))):
        return "the positions are no longer whole dimensions"
    return spatial


def _regroup(
    spatial: Spatial, names: list[Dimension], before: list[int], after: list[int]
) -> tuple[Dimension, ...] | str:
    """Names of the dimensions ``after`` that a group of dimensions ``before`` turns into."""
    domain = spatial.domain
    if before == after:
        return tuple(names)
    if all(name == CHANNEL for name in names):
        return (CHANNEL,) * len(after)
    if names == [HEIGHT, WIDTH] and len(after) == 1:
        return (SPACE,)
    if names == [SPACE] and after == [domain.height, domain.width]:
        return (HEIGHT, WIDTH)
    if BATCH in names:
        return "the batch is folded with another dimension"
    return "positions are mixed with channels or split unevenly"


def reshape_layout(spatial: Spatial, before: tuple[int, ...], after: tuple[int, ...]) -> Spatial | str:
    """Layout of a reshaped spatial value, or the reason why it is not spatial any more.

    Both shapes are cut into the shortest groups of equal element count; each group must keep, merge or split whole
    channel dimensions, or merge or split height and width.
    """
    names: list[Dimension] = []
    i = j = 0
    while i < len(before) or j < len(after):
        name = spatial.dims[i] if i < len(before) else None
        split = after[j : j + 2] == (spatial.domain.height, spatial.domain.width)
        if name == SPACE and split and before[i] != after[j]:
            names += [HEIGHT, WIDTH]
            i, j = i + 1, j + 2
            continue
        if name == CHANNEL and before[i] == 1 and (j >= len(after) or after[j] != 1):
            i += 1  # a channel dimension of size one vanishes
            continue
        # A single row may be one that positions are split into.
        single = name == SPACE and spatial.domain.height == 1
        if j < len(after) and after[j] == 1 and (name is None or (before[i] != 1 and not single)):
            names.append(CHANNEL)
            j += 1
            continue
        if name is None or j >= len(after):
            return "a dimension appears or vanishes"
        left, right = [before[i]], [after[j]]
        group = [name]
        i, j = i + 1, j + 1
        left_count, right_count = left[0], right[0]
        while left_count != right_count:
            if left_count < right_count:
                if i >= len(before):
                    return "element counts do not match"
                left.append(before[i])
                group.append(spatial.dims[i])
                left_count *= before[i]
                i += 1
            else:
                if j >= len(after):
                    return "element counts do not match"
                right.append(after[j])
                right_count *= after[j]
                j += 1
        renamed = _regroup(spatial, group, left, right)
        if isinstance(renamed, str):
            return renamed
        names += renamed
    return check_dims(spatial.with_dims(tuple(names)))


def candidate_layouts(shape: tuple[int, ...], batch: int, domains: Collection[Domain]) -> list[Spatial]:
    """All layouts that a shape allows: those with height and width in a row first, then those with positions flattened.

    The batch must be the first dimension; a domain of a single position shows nothing.
    """
    if len(shape) < 3 or shape[0] != batch:
        return []
    pairs: list[Spatial] = []
    flat: list[Spatial] = []
    for domain in sorted(domain for domain in domains if domain.size > 1):
        for dim in range(1, len(shape)):
            if shape[dim : dim + 2] == (domain.height, domain.width):
                pairs.append(named_layout(domain, len(shape), {dim: HEIGHT, dim + 1: WIDTH}))
            if shape[dim] == domain.size:
                flat.append(named_layout(domain, len(shape), {dim: SPACE}))
    return pairs + flat


def named_layout(domain: Domain, rank: int, names: Mapping[int, Dimension]) -> Spatial:
    """The layout with the batch first, the dimensions in ``names`` as given, and channels elsewhere."""
    return Spatial(domain, (BATCH, *(names.get(dim, CHANNEL) for dim in range(1, rank))))
