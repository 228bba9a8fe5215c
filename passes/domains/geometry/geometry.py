"""Where the positions of a value lie on the mask, and which mask cells they depend on.

A value's positions cover mask cells: by its canvases, of which it has several where values from different places met,
and by closure: a position whose cover meets none of the cells that it depends on (its cone) covers those as well. Then
a position is active whenever everything that it depends on is inside the mask, which is what makes it right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fisedit_compile.passes.domains.geometry.canvas import Canvas, alike, overlaid
from fisedit_compile.runtime.cover import WHOLE, Cover, Term, without_contained
from fisedit_compile.runtime.spec import Domain

#: Which source positions each position of an axis reads: bool ``[size, source size]``.
Reads = Tensor
#: Most terms of a cone; those beyond it are left out. A smaller cone only makes positions cover more than they need.
MOST_TERMS = 16


class Place(NamedTuple):
    """The canvases of a value's rows and columns; turned: its rows are columns of the mask."""

    rows: Canvas
    columns: Canvas
    turned: bool = False

    @classmethod
    def whole(cls, domain: Domain) -> Place:
        """That of a map of which nothing was moved."""
        return cls(Canvas.whole(domain.height), Canvas.whole(domain.width))

    def alike(self, other: Place, beside_padding: bool = False) -> bool:
        """Whether two places are one; with ``beside_padding`` wherever this one is no padding and not empty."""
        return self.turned == other.turned and all(map(alike, self[:2], other[:2], (beside_padding,) * 2))


@dataclass(frozen=True)
class Geometry:
    """Where a value's positions lie.

    Attributes:
        places: where it lies, several where values met; none where movement is unknown: every position is active.
        cone: the mask cells that each position depends on, a union of terms.
        cover: the mask cells that each position covers: by its canvases and by closure.
    """

    places: tuple[Place, ...]
    cone: tuple[Term, ...]
    cover: Cover

    @property
    def unknown(self) -> bool:
        """Whether it is not known how positions moved."""
        return not self.places

    def cut(self, axis: int, start: int, stop: int) -> tuple[Place, ...]:
        """The places of a stretch of its rows (axis 0) or columns."""
        if axis == 0:
            return tuple(place._replace(rows=place.rows.part(start, stop)) for place in self.places)
        return tuple(place._replace(columns=place.columns.part(start, stop)) for place in self.places)


class Places:
    """Makes the geometries of one graph.

    Args:
        mask: the domain of the mask.
    """

    def __init__(self, mask: Domain) -> None:
        self.mask = mask
        self._cells: dict[tuple[Canvas, int, int], Tensor] = {}
        self._everything: dict[Domain, tuple[Term, ...]] = {}

    def input(self, domain: Domain) -> Geometry:
        """That of an input of the graph: it depends on the cells that it covers."""
        place = Place.whole(domain)
        return Geometry((place,), (self._term(place, domain),), WHOLE)

    def made(self, domain: Domain, places: Sequence[Place], cone: Sequence[Term]) -> Geometry:
        """A geometry from its places and its cone; closure is added."""
        distinct = _distinct(places)
        if cone is self.everything(domain):
            # Every cover meets that.
            whole = distinct == (Place.whole(domain),)
            covered = [self._term(place, domain) for place in distinct]
            return Geometry(distinct, cone, WHOLE if whole else self._cover(domain, covered))
        cone = tuple(without_contained(cone))[:MOST_TERMS]
        terms = [self._term(place, domain) for place in distinct]
        missed = _closure(terms, cone, domain)
        if not missed and distinct == (Place.whole(domain),):
            return Geometry(distinct, cone, WHOLE)
        return Geometry(distinct, cone, self._cover(domain, [*terms, *missed]))

    def unknown(self, domain: Domain) -> Geometry:
        """Every position is active for any mask."""
        everything = self.everything(domain)
        return Geometry((), everything, self._cover(domain, everything))

    def everything(self, domain: Domain) -> tuple[Term, ...]:
        """All cells for every position."""
        if domain not in self._everything:
            rows = torch.ones(domain.height, self.mask.height, dtype=torch.bool)
            columns = torch.ones(domain.width, self.mask.width, dtype=torch.bool)
            self._everything[domain] = (Term(rows, columns),)
        return self._everything[domain]

    def met(self, domain: Domain, geometries: Sequence[Geometry]) -> Geometry:
        """That of what is made of several values position by position: active where any of them is."""
        first = geometries[0]
        if all(geometry is first for geometry in geometries):
            return first
        if any(geometry.unknown for geometry in geometries):
            return self.unknown(domain)
        places = [place for geometry in geometries for place in geometry.places]
        everything = self.everything(domain)
        if any(geometry.cone is everything for geometry in geometries):
            return self.made(domain, places, everything)
        return self.made(domain, places, [term for geometry in geometries for term in geometry.cone])

    def both(self, domain: Domain, geometries: Sequence[Geometry]) -> Geometry:
        """Where all positions are active that are so in any of several values, by closure too."""
        met = self.met(domain, geometries)
        terms = [term for geometry in geometries for term in self.terms(geometry, domain)]
        return met if met.unknown else replace(met, cover=self._cover(domain, terms))

    def with_everything(self, geometry: Geometry, domain: Domain) -> Geometry:
        """The same places of what depends on all cells."""
        if geometry.unknown:
            return geometry
        return self.made(domain, geometry.places, self.everything(domain))

    def windowed(
        self,
        source: Geometry,
        domain: Domain,
        reads: tuple[Reads, Reads],
        vertical: Callable[[Canvas], Canvas],
        horizontal: Callable[[Canvas], Canvas],
    ) -> Geometry:
        """That of what reads rows and columns of a value.

        Args:
            source: the geometry of the value.
            domain: the resulting size.
            reads: which rows each row reads, which columns each column.
            vertical, horizontal: what becomes of canvases.
        """
        if source.unknown:
            return self.unknown(domain)
        places = [Place(vertical(rows), horizontal(columns), turned) for rows, columns, turned in source.places]
        return self.made(domain, places, self.seen(source.cone, reads, domain))

    def resized(self, source: Geometry, domain: Domain, cone: Sequence[Term]) -> Geometry:
        """That of what changes size and keeps its canvas."""
        if source.unknown:
            return self.unknown(domain)
        places = [
            Place(rows.resized(domain.height), columns.resized(domain.width), turned)
            for rows, columns, turned in source.places
        ]
        return self.made(domain, places, cone)

    def transposed(self, source: Geometry, domain: Domain) -> Geometry:
        """That of rows for columns; ``domain`` is the resulting size."""
        if source.unknown:
            return self.unknown(domain)
        places = [Place(columns, rows, not turned) for rows, columns, turned in source.places]
        terms = self.terms(source, Domain(domain.width, domain.height))
        cone, cover = ([Term(t.columns, t.rows, not t.turned) for t in old] for old in (source.cone, terms))
        return Geometry(tuple(places), tuple(cone), self._cover(domain, cover))

    def seen(self, cone: Sequence[Term], reads: tuple[Reads, Reads], domain: Domain) -> Sequence[Term]:
        """The cone of what reads rows and columns of a value with a cone; ``domain`` is the resulting size."""
        source = Domain(reads[0].shape[1], reads[1].shape[1])
        if cone is self._everything.get(source) and bool(reads[0].any(1).all() and reads[1].any(1).all()):
            return self.everything(domain)
        return [Term(_reached(reads[0], term.rows), _reached(reads[1], term.columns), term.turned) for term in cone]

    def terms(self, geometry: Geometry, domain: Domain) -> list[Term]:
        """The cover of a geometry as terms, that of the whole map too."""
        return list(geometry.cover.terms) or [self._term(Place.whole(domain), domain)]

    def output(self, geometry: Geometry, domain: Domain) -> Cover:
        """The cover by which an output of the graph is masked.

        One that is the picture keeps to the user's mask, whatever its positions cover on the way; so does one of which
        it is not known where its positions lie.
        """
        if geometry.unknown or Place.whole(domain) in geometry.places:
            return WHOLE
        same = (domain.height, domain.width) == (self.mask.height, self.mask.width)
        if same and any(
            not place.turned and place.rows.spans_map(domain.height) and place.columns.spans_map(domain.width)
            for place in geometry.places
        ):
            return WHOLE
        return geometry.cover

    def _term(self, place: Place, domain: Domain) -> Term:
        counts = (self.mask.height, self.mask.width)
        rows, columns = reversed(counts) if place.turned else counts
        return Term(
            self._axis(place.rows, domain.height, rows), self._axis(place.columns, domain.width, columns), place.turned
        )

    def _axis(self, canvas: Canvas, size: int, count: int) -> Tensor:
        key = (canvas, size, count)
        if key not in self._cells:
            self._cells[key] = canvas.cells(size, count)
        return self._cells[key]

    def _cover(self, domain: Domain, terms: Sequence[Term]) -> Cover:
        cover = Cover.of(terms)
        return WHOLE if cover == Cover.of([self._term(Place.whole(domain), domain)]) else cover


def _reached(reads: Reads, cells: Tensor) -> Tensor:
    return reads.to(torch.float32) @ cells.to(torch.float32) > 0


def _distinct(places: Sequence[Place]) -> tuple[Place, ...]:
    """The places less those that lie like others, and those that differ from others inside their own padding only."""
    found: list[Place] = []
    for place in places:
        for number, other in enumerate(found):
            if place.alike(other):
                rows, columns = map(overlaid, other[:2], place[:2])
                assert rows is not None and columns is not None
                found[number] = Place(rows, columns, place.turned)
                break
        else:
            found.append(place)
    for place in list(found):
        others = [other for other in found if other is not place]
        if any(place.alike(other, True) and not other.alike(place, True) for other in others):
            found = others
    return tuple(found)


def joined(parts: Sequence[tuple[Place, ...]], axis: int) -> tuple[Place, ...]:
    """The places of values that are joined along an axis (0: vertically); each is empty where the others lie."""
    sizes = [int(places[0][axis].size) for places in parts]  # type: ignore[union-attr]
    found: list[Place] = []
    for number, places in enumerate(parts):
        before, after = (Canvas.nothing(sum(rest)) for rest in (sizes[:number], sizes[number + 1 :]))
        for place in places:
            if axis == 0:
                added = place._replace(rows=Canvas.joined([before, place.rows, after]))
            else:
                added = place._replace(columns=Canvas.joined([before, place.columns, after]))
            for at, known in enumerate(found):
                if (filled := _filled(known, added, axis)) is not None:
                    found[at] = filled
                    break
            else:
                found.append(added)
    return _distinct(found)


def _filled(one: Place, other: Place, axis: int) -> Place | None:
    """Two places as one, where each is empty along an axis where the other is not, and the other axis is the same."""
    if one.turned != other.turned or one[1 - axis] != other[1 - axis]:
        return None
    if axis == 0:
        rows = overlaid(one.rows, other.rows, fill=True)
        return None if rows is None else one._replace(rows=rows)
    columns = overlaid(one.columns, other.columns, fill=True)
    return None if columns is None else one._replace(columns=columns)


def _closure(cover: Sequence[Term], cone: Sequence[Term], domain: Domain) -> list[Term]:
    """Terms with the cone of each position whose cover meets none of it."""
    everywhere = torch.ones(domain.height, domain.width, dtype=torch.bool)
    depends, meets = ~everywhere, ~everywhere
    for term in cone:
        depends |= term.at(everywhere)
        for covered in cover:
            meets |= term.meets(covered)
    missed = depends & ~meets
    found: list[Term] = []
    for pattern in missed.unique(dim=0) if bool(missed.any()) else ():
        if bool(pattern.any()):
            which = (missed == pattern).all(1)
            found += [
                term._replace(rows=term.rows & which[:, None], columns=term.columns & pattern[:, None]) for term in cone
            ]
    return found
