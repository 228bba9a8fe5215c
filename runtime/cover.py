"""Which mask cells the positions of a domain cover, where these are not their shares of the whole map.

A position is active when any mask cell that it covers is active. Where operators cut, move or join positions, a
domain's size no longer tells which cells those are: a position of a flipped map covers the cells of the other side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Term(NamedTuple):
    """Mask cells by row and by column of a domain: each position's are those of its row that are also its column's.

    Attributes:
        rows: bool ``[height, mask height]``; turned: ``[height, mask width]``.
        columns: bool ``[width, mask width]``; turned: ``[width, mask height]``.
        turned: whether rows and columns of the domain are columns and rows of the mask.
    """

    rows: Tensor
    columns: Tensor
    turned: bool = False

    @property
    def empty(self) -> bool:
        """Whether there are no cells at all."""
        return not bool(self.rows.any() and self.columns.any())

    def contains(self, other: Term) -> bool:
        """Whether every cell of every position of another term is in this one."""
        return (
            self.turned == other.turned
            and bool((other.rows <= self.rows).all())
            and bool((other.columns <= self.columns).all())
        )

    def meets(self, other: Term) -> Tensor:
        """At which positions two terms have a cell in common, bool ``[height, width]``."""
        if self.turned == other.turned:
            return (self.rows & other.rows).any(1)[:, None] & (self.columns & other.columns).any(1)
        rows, columns = self.rows.float() @ other.columns.float().T, other.rows.float() @ self.columns.float().T
        return (rows > 0) & (columns > 0)

    def at(self, positions: Tensor) -> Tensor:
        """At which positions there are cells, of those given: bool ``[height, width]``."""
        return positions & self.rows.any(1)[:, None] & self.columns.any(1)


@dataclass(frozen=True, order=True)
class Cover:
    """The mask cells of each position: the union, over the terms, of its row's cells times its column's cells.

    Attributes:
        digest: the same for the same terms, in every process; empty for the whole map. It alone is compared.
        terms: none for the whole map.
    """

    digest: str = ""
    terms: tuple[Term, ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def of(cls, terms: Sequence[Term]) -> Cover:
        """The cover with the given terms; those that others contain are left out."""
        kept = without_contained(terms)
        described = sorted((_bytes(term), number) for number, term in enumerate(kept))
        digest = hashlib.sha256(b"".join(text for text, _ in described)).hexdigest()[:16]
        return cls(digest, tuple(kept[number] for _, number in described))

    @property
    def whole(self) -> bool:
        """Whether positions cover their shares of the whole map."""
        return not self.digest

    def active(self, mask: Tensor) -> Tensor:
        """Active positions.

        Args:
            mask: bool ``[batch, mask height, mask width]``.

        Returns:
            bool ``[batch, height, width]``.
        """
        counted = mask.to(torch.float32)
        found = [
            # Counts stay below 2**24: exact.
            term.rows.to(counted) @ (counted.mT if term.turned else counted) @ term.columns.to(counted).T > 0
            for term in self.terms
        ]
        return torch.stack(found).any(0)

    def of_tiles(self, side: int) -> Cover:
        """The cover of tiles of ``side`` times ``side`` positions: at least the cells of all their positions."""
        if self.whole:
            return self
        return Cover.of([Term(_tiled(term.rows, side), _tiled(term.columns, side), term.turned) for term in self.terms])


def without_contained(terms: Sequence[Term]) -> list[Term]:
    """The terms less those that are empty or contained in another one."""
    kept: list[Term] = []
    for term in terms:
        if term.empty or any(other.contains(term) for other in kept):
            continue
        kept = [*(other for other in kept if not term.contains(other)), term]
    return kept


def _tiled(axis: Tensor, side: int) -> Tensor:
    return axis.view(axis.shape[0] // side, side, axis.shape[1]).any(1)


def _bytes(term: Term) -> bytes:
    shapes = f"{term.turned} {tuple(term.rows.shape)} {tuple(term.columns.shape)} "
    return shapes.encode() + term.rows.numpy().tobytes() + term.columns.numpy().tobytes()


#: The cover of a map of which nothing was cut, moved or joined.
WHOLE = Cover()
