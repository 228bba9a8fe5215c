"""Which part of the mask each position of a value stands for: the canvas of an axis, and what operators do to it.

This is the masked reference's own geometry. It imports nothing from the package; docs/testing.md ("Positions that
move") says the same in words, with every point that could be read in two ways.

A **canvas** belongs to one axis of one value. It is a list of pieces, each with a length in positions and an interval
of the mask's axis, from 0 to 1 as exact fractions, reversed when its end lies before its begin. The lengths add up to
the number of positions, and position ``i`` owns what lies between ``i`` and ``i + 1``: its *share*. A position covers
the mask cells that the intervals of its share meet. The map as a whole is one piece from 0 to 1.

A piece without an interval is a *hole*: it covers nothing. Holes come from joins along space alone, where another sheet
covers what they leave out.

A **sheet** is a row and a column canvas; a value has one sheet or several, and covers what any of them does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from math import ceil, floor

import torch
from torch import Tensor

ZERO, ONE = Fraction(0), Fraction(1)


@dataclass(frozen=True)
class Piece:
    """``length`` positions that lie evenly on the mask's axis from ``begin`` to ``end``; nowhere if those are None.

    ``padding`` marks positions that an operator added and whose place was only lent to them.
    """

    length: Fraction
    begin: Fraction | None
    end: Fraction | None
    padding: bool = False

    def part(self, start: Fraction, stop: Fraction) -> Piece:
        """What lies between two points of the piece, in positions from its start."""
        if self.begin is None or self.end is None:
            return replace(self, length=stop - start)
        rate = (self.end - self.begin) / self.length
        return replace(self, length=stop - start, begin=self.begin + rate * start, end=self.begin + rate * stop)

    def is_continued_by(self, other: Piece) -> bool:
        """Whether both are one piece."""
        if self.padding != other.padding:
            return False
        if self.begin is None or self.end is None or other.begin is None or other.end is None:
            return self.begin is None and other.begin is None
        same_rate = (self.end - self.begin) * other.length == (other.end - other.begin) * self.length
        return same_rate and self.end == other.begin


@dataclass(frozen=True)
class Canvas:
    """Pieces whose lengths add up to the number of positions; made by ``canvas``, which joins what is one piece."""

    pieces: tuple[Piece, ...]

    @property
    def length(self) -> Fraction:
        """The lengths of all pieces together; a whole number of positions between operators."""
        return sum((piece.length for piece in self.pieces), ZERO)

    @property
    def size(self) -> int:
        """Number of positions."""
        return int(self.length)

    @property
    def is_whole(self) -> bool:
        """Whether this is the map as a whole."""
        return len(self.pieces) == 1 and (self.pieces[0].begin, self.pieces[0].end) == (ZERO, ONE)

    def resized(self, size: int) -> Canvas:
        """The same canvas with another number of positions."""
        scale = size / self.length
        return Canvas(tuple(replace(piece, length=piece.length * scale) for piece in self.pieces))

    def reversed(self) -> Canvas:
        """Last position first."""
        return canvas(replace(piece, begin=piece.end, end=piece.begin) for piece in reversed(self.pieces))

    def parts(self, start: Fraction | int, stop: Fraction | int) -> tuple[Piece, ...]:
        """The pieces between two points, in positions."""
        found, at = [], ZERO
        for piece in self.pieces:
            first, last = max(at, Fraction(start)), min(at + piece.length, Fraction(stop))
            if first < last:
                found.append(piece.part(first - at, last - at))
            at += piece.length
        return tuple(found)

    def edge(self, position: int, length: Fraction) -> Iterator[Piece]:
        """``length`` positions that hold the share of one position, marked as padding.

        Whole positions hold the whole share each; a fraction holds it too, squeezed.
        """
        share = self.parts(position, position + 1)
        while length > 0:
            step = min(ONE, length)
            yield from (replace(piece, length=piece.length * step, padding=True) for piece in share)
            length -= step

    def extended(self, left: Fraction | int, right: Fraction | int) -> Canvas:
        """With positions added on both sides, which hold the share of the edge position, or cut where negative."""
        left, right = Fraction(left), Fraction(right)
        before = tuple(self.edge(0, left))
        if left.denominator != 1 and left > 0:  # the squeezed one is the outermost
            count = len(self.parts(0, 1))
            before = before[-count:] + before[:-count]
        longer = Canvas((*before, *self.pieces, *self.edge(self.size - 1, right)))
        return canvas(longer.parts(max(-left, ZERO), longer.length - max(-right, ZERO)))

    def taken(self, positions: Iterable[int]) -> Canvas:
        """The shares of these positions one after the other, each as it is."""
        return canvas(piece for position in positions for piece in self.parts(position, position + 1))

    def windowed(self, kernel: int, dilation: int, stride: int, padding: int, size: int) -> Canvas:
        """What ``size`` windows make of it; ``padding`` is the one on the left."""
        offset, rest = overhang(kernel, dilation, stride, padding, self.size, size)
        return self.extended(-offset, -rest).resized(size)

    def transposed(self, kernel: int, dilation: int, stride: int, padding: int, size: int) -> Canvas:
        """What a transposed convolution makes of it, as the adjoint of windows from ``size`` positions to these."""
        offset, rest = overhang(kernel, dilation, stride, padding, size, self.size)
        return self.resized(self.size * stride).extended(offset, rest).resized(size)

    @lru_cache(maxsize=4096)  # noqa: B019  (canvases are small and live as long as the tests)
    def covers(self, cells: int) -> Tensor:
        """``[positions, cells]`` booleans: which cells of the mask's axis each position covers."""
        covered = torch.zeros((self.size, cells), dtype=torch.bool)
        for position in range(self.size):
            for piece in self.parts(position, position + 1):
                if piece.begin is not None and piece.end is not None:
                    low, high = sorted((piece.begin, piece.end))
                    covered[position, floor(low * cells) : ceil(high * cells)] = True
        return covered


def canvas(pieces: Iterable[Piece]) -> Canvas:
    """A canvas of pieces, those that continue each other joined."""
    joined: list[Piece] = []
    for piece in pieces:
        if joined and joined[-1].is_continued_by(piece):
            last = joined.pop()
            piece = replace(last, length=last.length + piece.length, end=piece.end)
        joined.append(piece)
    return Canvas(tuple(joined))


def whole(size: int) -> Canvas:
    """The map as a whole."""
    return Canvas((Piece(Fraction(size), ZERO, ONE),))


def hole(size: int) -> Canvas:
    """Positions that cover nothing."""
    return Canvas((Piece(Fraction(size), None, None),))


def overhang(
    kernel: int, dilation: int, stride: int, padding: int, source: int, target: int
) -> tuple[Fraction, Fraction]:
    """How many of ``source`` positions ``target`` windows leave out on the left and on the right; negative: add."""
    center = Fraction(dilation * (kernel - 1) + 1 - stride, 2) - padding
    offset = max(abs(center) - Fraction(stride - 1, 2), ZERO) * (1 if center > 0 else -1)
    rest = source - offset - stride * target
    return offset, ZERO if -(stride - 1) <= rest < 0 else rest


def segments(first: Canvas, second: Canvas) -> Iterator[tuple[Piece, Piece]]:
    """Two canvases of the same size cut at the ends of the pieces of both."""
    ends: set[Fraction] = set()
    for one in (first, second):
        at = ZERO
        for piece in one.pieces:
            at += piece.length
            ends.add(at)
    start = ZERO
    for stop in sorted(ends):
        yield first.parts(start, stop)[0], second.parts(start, stop)[0]
        start = stop


def lies_alike(first: Piece, second: Piece) -> bool:
    """Whether two pieces of one length lie at the same place."""
    return (first.begin, first.end) == (second.begin, second.end)


@dataclass(frozen=True)
class Sheet:
    """A row and a column canvas; ``turned`` if the rows lie on the mask's columns and the columns on its rows."""

    rows: Canvas
    columns: Canvas
    turned: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether this is the map as a whole."""
        return not self.turned and self.rows.is_whole and self.columns.is_whole

    def resized(self, height: int, width: int) -> Sheet:
        """The same canvases with other numbers of positions."""
        return replace(self, rows=self.rows.resized(height), columns=self.columns.resized(width))

    def swapped(self) -> Sheet:
        """Height and width exchanged."""
        return Sheet(self.columns, self.rows, not self.turned)

    def pairs(self, other: Sheet) -> list[tuple[Piece, Piece]]:
        """The segments of both axes."""
        return [*segments(self.rows, other.rows), *segments(self.columns, other.columns)]

    def is_part_of(self, other: Sheet) -> bool:
        """Whether this is the other wherever this one is neither padding nor a hole."""
        if self.turned != other.turned:
            return False
        return all(lies_alike(a, b) or a.padding or a.begin is None for a, b in self.pairs(other))

    def lies_like(self, other: Sheet) -> bool:
        """Whether both are the same but for what is marked as padding."""
        return self.turned == other.turned and all(lies_alike(a, b) for a, b in self.pairs(other))

    def ends_near(self, height: int, width: int) -> bool:
        """Whether each end lies within one position of the map's, of ``height`` and ``width`` positions."""

        def near(pieces: Sequence[Piece], size: int) -> bool:
            begin, end = pieces[0].begin, pieces[-1].end
            return begin is not None and end is not None and begin <= Fraction(1, size) and end >= 1 - Fraction(1, size)

        return not self.turned and near(self.rows.pieces, height) and near(self.columns.pieces, width)


def unmarked(first: Canvas, second: Canvas) -> Canvas:
    """Of two canvases that lie alike, the one with padding where both have it."""
    return canvas(replace(a, padding=a.padding and b.padding) for a, b in segments(first, second))


def filled(first: Canvas, second: Canvas) -> Canvas | None:
    """Two canvases as one where each has holes for the other; None if both have an interval somewhere."""
    pairs = list(segments(first, second))
    if all(a.begin is None or b.begin is None for a, b in pairs):
        return canvas(b if a.begin is None else a for a, b in pairs)
    return None


def meet(sheets: Iterable[Sheet]) -> tuple[Sheet, ...]:
    """The sheets of a value that was made from values with these, all of one size.

    Those that lie alike are one. One that differs from another inside its own padding only is left out, unless the same
    holds the other way round: then both stay.
    """
    found: list[Sheet] = []
    for sheet in sheets:
        for number, known in enumerate(found):
            if sheet.lies_like(known):
                rows, columns = unmarked(known.rows, sheet.rows), unmarked(known.columns, sheet.columns)
                found[number] = replace(known, rows=rows, columns=columns)
                break
        else:
            found.append(sheet)
    for sheet in list(found):
        others = [other for other in found if other is not sheet]
        if any(sheet.is_part_of(other) and not other.is_part_of(sheet) for other in others):
            found = others
    return tuple(found)


def join(parts: Sequence[Sequence[Sheet]], along_rows: bool) -> tuple[Sheet, ...]:
    """The sheets of values that are joined along an axis; ``parts`` holds those of each value."""
    sizes = [(sheets[0].rows if along_rows else sheets[0].columns).size for sheets in parts]
    found: list[Sheet] = []
    for number, sheets in enumerate(parts):
        before, after = sum(sizes[:number]), sum(sizes[number + 1 :])
        for sheet in sheets:
            axis = (sheet.rows if along_rows else sheet.columns).pieces
            longer = canvas((*(hole(before).pieces if before else ()), *axis, *(hole(after).pieces if after else ())))
            added = replace(sheet, rows=longer) if along_rows else replace(sheet, columns=longer)
            for at, known in enumerate(found):
                merged = _merged(known, added, along_rows)
                if merged is not None:
                    found[at] = merged
                    break
            else:
                found.append(added)
    return meet(found)


def _merged(first: Sheet, second: Sheet, along_rows: bool) -> Sheet | None:
    if first.turned != second.turned:
        return None
    if along_rows:
        rows = filled(first.rows, second.rows) if first.columns == second.columns else None
        return None if rows is None else replace(first, rows=rows)
    columns = filled(first.columns, second.columns) if first.rows == second.rows else None
    return None if columns is None else replace(first, columns=columns)
