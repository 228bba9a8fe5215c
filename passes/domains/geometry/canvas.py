"""One axis of a canvas: which part of the mask's axis the positions of a value cover, whatever its size.

Equal sizes do not mean equal places: a map that was flipped, cropped and padded back has the size of the picture, but
its first row is another one. What resizes keeps the canvas, what moves positions acts on it. All numbers are exact
fractions, so that masks do not grow by rounding on the way down and up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

HALF = Fraction(1, 2)


@dataclass(frozen=True, order=True)
class Piece:
    """A stretch of positions in a row.

    Attributes:
        length: in positions.
        begin, end: what it covers of the mask's axis, from 0 to 1; reversed when ``end < begin``.
        padding: whether an operator added it, so that it shows the edge next to it.
        empty: whether it covers nothing, as the stretch of the other values where some are joined.
    """

    length: Fraction
    begin: Fraction
    end: Fraction
    padding: bool = False
    empty: bool = False

    @property
    def slope(self) -> Fraction:
        """How much of the mask's axis a position covers, negative where reversed."""
        return (self.end - self.begin) / self.length

    def cut(self, start: Fraction, stop: Fraction) -> Piece:
        """The part between two places, in positions from its own start."""
        return replace(
            self,
            length=stop - start,
            begin=self.begin + start * self.slope,
            end=self.begin + stop * self.slope,
        )

    def continued_by(self, other: Piece) -> bool:
        """Whether another piece behind this one makes one piece of both."""
        if self.empty or other.empty:
            return self.empty and other.empty
        same = self.padding == other.padding and self.end == other.begin
        return same and self.slope == other.slope


def _merged(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    found: list[Piece] = []
    for piece in pieces:
        if not piece.length:
            continue
        if found and found[-1].continued_by(piece):
            found[-1] = replace(found[-1], length=found[-1].length + piece.length, end=piece.end)
        else:
            found.append(piece)
    return tuple(found)


@dataclass(frozen=True, order=True)
class Canvas:
    """Pieces whose lengths add up to the number of positions."""

    pieces: tuple[Piece, ...]

    @classmethod
    def whole(cls, size: int) -> Canvas:
        """That of a value of ``size`` positions of which nothing was moved."""
        return cls((Piece(Fraction(size), Fraction(0), Fraction(1)),))

    @classmethod
    def nothing(cls, size: int) -> Canvas:
        """That of positions which cover nothing."""
        return cls((Piece(Fraction(size), Fraction(0), Fraction(0), empty=True),))

    @classmethod
    def joined(cls, canvases: Sequence[Canvas]) -> Canvas:
        """One behind the other."""
        return cls(_merged([piece for canvas in canvases for piece in canvas.pieces]))

    @property
    def size(self) -> Fraction:
        """Number of positions; a fraction only on the way."""
        return sum((piece.length for piece in self.pieces), Fraction(0))

    def resized(self, size: Fraction | int) -> Canvas:
        """The same canvas divided among another number of positions."""
        scale = size / self.size
        return Canvas(tuple(replace(piece, length=piece.length * scale) for piece in self.pieces))

    def part(self, start: Fraction | int, stop: Fraction | int) -> Canvas:
        """What lies between two places, in positions."""
        found: list[Piece] = []
        at = Fraction(0)
        for piece in self.pieces:
            first, last = max(Fraction(start) - at, Fraction(0)), min(Fraction(stop) - at, piece.length)
            if first < last:
                found.append(piece.cut(first, last))
            at += piece.length
        return Canvas(_merged(found))

    def reversed(self) -> Canvas:
        """Seen from the other side."""
        return Canvas(tuple(replace(piece, begin=piece.end, end=piece.begin) for piece in reversed(self.pieces)))

    def padded(self, left: Fraction | int, right: Fraction | int) -> Canvas:
        """With positions added, which hold the edge position's piece, or taken away where a number is negative.

        A fraction of a position, the outermost one, holds all of that piece.
        """
        left, right = Fraction(left), Fraction(right)
        cut = self.part(max(-left, Fraction(0)), self.size - max(-right, Fraction(0)))
        first, last = cut.part(0, 1), cut.part(cut.size - 1, cut.size)
        return Canvas.joined([*reversed(_repeated(first, left)), cut, *_repeated(last, right)])

    def taken(self, positions: Sequence[int]) -> Canvas:
        """The pieces of the given positions, one behind the other; -1 is a position that nothing of the map is in."""
        return Canvas.joined([self.part(at, at + 1) if at >= 0 else Canvas.nothing(1) for at in positions])

    def windows(self, kernel: int, dilation: int, stride: int, padding: int, size: int) -> Canvas:
        """That of ``size`` windows over the positions."""
        left, right = window_cuts(kernel, dilation, stride, padding, int(self.size), size)
        return self.padded(-left, -right).resized(size)

    def transposed_windows(self, kernel: int, dilation: int, stride: int, padding: int, size: int) -> Canvas:
        """That of ``size`` positions over which windows lie whose results are these positions: the adjoint."""
        left, right = window_cuts(kernel, dilation, stride, padding, size, int(self.size))
        return self.resized(self.size * stride).padded(left, right).resized(size)

    def cells(self, size: int, count: int) -> Tensor:
        """Which of ``count`` cells of the mask's axis each position covers, bool ``[size, count]``."""
        found = torch.zeros(size, count, dtype=torch.bool)
        at = Fraction(0)
        for piece in self.pieces:
            stop = at + piece.length
            for position in range(math.floor(at), math.ceil(stop)) if not piece.empty else ():
                share = piece.cut(max(Fraction(position), at) - at, min(Fraction(position + 1), stop) - at)
                low, high = sorted((share.begin * count, share.end * count))
                found[position, math.floor(low) : math.ceil(high)] = True
            at = stop
        return found

    def spans_map(self, size: int) -> bool:
        """Whether both ends lie within one of ``size`` positions of the map's."""
        first, last = self.pieces[0], self.pieces[-1]
        margin = Fraction(1, size)
        return not (first.empty or last.empty) and first.begin <= margin and last.end >= 1 - margin


def _repeated(position: Canvas, count: Fraction) -> list[Canvas]:
    """Padding: so many positions, each with the pieces of one."""
    marked = Canvas(tuple(replace(piece, padding=True) for piece in position.pieces))
    found = [marked] * max(0, math.floor(count))
    rest = count - math.floor(count)
    if count > 0 and rest:
        found.append(Canvas(tuple(replace(piece, length=piece.length * rest) for piece in marked.pieces)))
    return found


def window_cuts(
    kernel: int, dilation: int, stride: int, padding: int, before: int, after: int
) -> tuple[Fraction, Fraction]:
    """How many of ``before`` positions ``after`` windows leave out on the left and on the right, added where negative.

    A rest on the right that is shorter than a stride, and that windows reach beyond, belongs to the last window.
    """
    shift = HALF * (dilation * (kernel - 1) + 1 - stride) - padding
    beyond = max(Fraction(0), abs(shift) - HALF * (stride - 1))
    left = beyond if shift > 0 else -beyond
    right = before - left - stride * after
    return left, Fraction(0) if -(stride - 1) <= right < 0 else right


def alike(one: Canvas, other: Canvas, beside_padding: bool = False) -> bool:
    """Whether two canvases of one size lie alike.

    With ``beside_padding`` only what is neither padding nor empty in ``one`` counts.
    """
    places = sorted({place for canvas in (one, other) for place in _places(canvas)})
    for start, stop in zip(places, places[1:], strict=False):
        first, second = one.part(start, stop).pieces[0], other.part(start, stop).pieces[0]
        if beside_padding and (first.padding or first.empty):
            continue
        if first.empty != second.empty or (first.begin, first.end) != (second.begin, second.end):
            return False
    return True


def overlaid(one: Canvas, other: Canvas, fill: bool = False) -> Canvas | None:
    """Two canvases of one size as one.

    Where both lie alike, a stretch is padding if it is in both. With ``fill`` each must be empty where the other is
    not; None where they are not.
    """
    found: list[Piece] = []
    places = sorted({place for canvas in (one, other) for place in _places(canvas)})
    for start, stop in zip(places, places[1:], strict=False):
        first, second = one.part(start, stop).pieces[0], other.part(start, stop).pieces[0]
        if not fill:
            found.append(replace(first, padding=first.padding and second.padding))
        elif first.empty or second.empty:
            found.append(second if first.empty else first)
        else:
            return None
    return Canvas(_merged(found))


def _places(canvas: Canvas) -> list[Fraction]:
    """Where pieces begin and end, in positions."""
    at = Fraction(0)
    found = [at]
    for piece in canvas.pieces:
        at += piece.length
        found.append(at)
    return found
