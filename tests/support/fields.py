"""What the masked reference knows of every value: its sheets, what its positions depend on, and how it was read.

``movement.py`` says for each operator how its output reads its inputs (links) and what it does to their canvases; here
this becomes the field of each value, its active set under a mask, and what can be known about right and wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from support.canvas import Sheet, whole


def product(first: Tensor, second: Tensor) -> Tensor:
    """The product of boolean matrices: whether any term is true."""
    return first.float() @ second.float() > 0


@dataclass(frozen=True)
class Link:
    """How a value reads one of its inputs: position ``(y, x)`` reads ``(v, u)`` where ``rows[y, v]`` and
    ``columns[x, u]``; ``swapped`` if the input's axes were exchanged first."""

    source: str
    number: int
    rows: Tensor
    columns: Tensor
    swapped: bool = False


@dataclass(frozen=True)
class Cells:
    """Mask cells of each position of a map: those of its row by those of its column.

    Attributes:
        rows: booleans ``[h, H]``, columns: ``[w, W]``; if ``turned``, ``[h, W]`` and ``[w, H]``.
    """

    rows: Tensor
    columns: Tensor
    turned: bool = False

    def is_within(self, other: Cells) -> bool:
        """Whether each position has no cell that it does not have there."""
        if self.turned != other.turned:
            return False
        return bool((~self.rows | other.rows).all() and (~self.columns | other.columns).all())

    def touch(self, mask: Tensor) -> Tensor:
        """``[B, h, w]``: whether a position has a cell of the mask ``[B, H, W]``."""
        mask = mask.transpose(1, 2) if self.turned else mask
        return (self.rows.float() @ mask.float() @ self.columns.float().T) > 0

    def meet(self, other: Cells) -> Tensor:
        """``[h, w]``: whether a position has a cell in both."""
        if self.turned == other.turned:
            return (self.rows & other.rows).any(1)[:, None] & (self.columns & other.columns).any(1)
        return product(self.rows, other.columns.T) & product(other.rows, self.columns.T)

    @property
    def any(self) -> Tensor:
        """``[h, w]``: whether a position has a cell."""
        return self.rows.any(1)[:, None] & self.columns.any(1)

    def read(self, link: Link) -> Cells:
        """The cells of what is read by a link."""
        if link.swapped:
            return Cells(product(link.rows, self.columns), product(link.columns, self.rows), not self.turned)
        return Cells(product(link.rows, self.rows), product(link.columns, self.columns), self.turned)


def cover(sheet: Sheet, cells: tuple[int, int]) -> Cells:
    """What positions cover by their canvases."""
    height, width = reversed(cells) if sheet.turned else cells
    return Cells(sheet.rows.covers(height), sheet.columns.covers(width), sheet.turned)


def without_repetition(cones: Iterable[Cells]) -> tuple[Cells, ...]:
    """Those that are not within another."""
    kept: list[Cells] = []
    for cone in cones:
        if any(cone.is_within(other) for other in kept):
            continue
        kept = [other for other in kept if not other.is_within(cone)]
        kept.append(cone)
    return tuple(kept)


@dataclass(frozen=True)
class Field:
    """The geometry of a value with ``height`` by ``width`` positions; 1 by 1 if it has none of its own.

    Attributes:
        sheets: what its positions cover.
        cones: what they depend on is the union of these.
        links: how it was made.
        cells: height and width of the mask.
        placed: whether it has positions; if not, its canvases are kept for a value that is made from it.
    """

    height: int
    width: int
    sheets: tuple[Sheet, ...]
    cones: tuple[Cells, ...]
    links: tuple[Link, ...]
    cells: tuple[int, int]
    placed: bool = True
    covers: list[Cells] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.placed:
            self.covers.extend(cover(sheet, self.cells) for sheet in self.sheets)

    @property
    def dependent(self) -> Tensor:
        """``[h, w]``: whether a position depends on any cell."""
        found = torch.zeros((self.height, self.width), dtype=torch.bool)
        for cone in self.cones:
            found |= cone.any
        return found

    @property
    def strayed(self) -> Tensor:
        """``[h, w]``: whether a position depends on cells and covers none of them, so that it covers those as well."""
        met = torch.zeros((self.height, self.width), dtype=torch.bool)
        for covered in self.covers:
            for cone in self.cones:
                met |= covered.meet(cone)
        return self.dependent & ~met

    def covered(self, mask: Tensor) -> Tensor:
        """``[B, h, w]``: whether a position's canvases cover a cell of the mask ``[B, H, W]``."""
        found = torch.zeros((mask.shape[0], self.height, self.width), dtype=torch.bool)
        for covered in self.covers:
            found |= covered.touch(mask)
        return found

    def touched(self, mask: Tensor) -> Tensor:
        """``[B, h, w]``: whether a position depends on a cell of the mask."""
        found = torch.zeros((mask.shape[0], self.height, self.width), dtype=torch.bool)
        for cone in self.cones:
            found |= cone.touch(mask)
        return found

    def active(self, mask: Tensor) -> Tensor:
        """``[B, h, w]``: the positions that an edit computes."""
        return self.covered(mask) | (self.strayed & self.touched(mask))

    def wrong(self, sources: Sequence[Tensor]) -> Tensor:
        """``[B, h, w]``: whether a position reads a wrong one; ``sources`` are those of the links."""
        found = torch.zeros((sources[0].shape[0] if sources else 1, self.height, self.width), dtype=torch.bool)
        for link, source in zip(self.links, sources, strict=True):
            source = source.transpose(1, 2) if link.swapped else source
            found = found | ((link.rows.float() @ source.float() @ link.columns.float().T) > 0)
        return found


def input_field(height: int, width: int, cells: tuple[int, int]) -> Field:
    """The field of a map that comes from outside: it depends on what it covers."""
    sheet = Sheet(whole(height), whole(width))
    return Field(height, width, (sheet,), (cover(sheet, cells),), (), cells)


def cones_of(links: Iterable[Link], fields: Iterable[Field]) -> tuple[Cells, ...]:
    """What a value depends on that reads values of these fields by these links."""
    return without_repetition(
        cone.read(link) for link, source in zip(links, fields, strict=True) for cone in source.cones
    )
