"""What a compiled program asks of the runtime, as plain data: domains, stencils, plan inputs and cache sites."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from fisedit_compile.runtime.cover import WHOLE, Cover

Parameter = int | float | str | bool | tuple[int, ...]
StencilKind = Literal[
    "window",
    "transposed",
    "nearest",
    "nearest_exact",
    "bilinear",
    "pad",
    "pixel_shuffle",
    "pixel_unshuffle",
    "table",
    "transposition",
]
PlanKind = Literal["index", "valid", "halo", "table", "weights", "subposition", "inside"]
SiteKind = Literal["spatial", "value"]


@dataclass(frozen=True, order=True)
class Domain:
    """A spatial resolution; a position in it is the row-major number ``y * width + x``.

    ``cover`` says which mask cells its positions cover. Domains of one size with different covers are different places.
    """

    height: int
    width: int
    cover: Cover = field(default=WHOLE, kw_only=True)

    @property
    def size(self) -> int:
        """Number of positions."""
        return self.height * self.width

    @property
    def whole(self) -> Domain:
        """The domain of this size whose positions are shares of the whole map."""
        return Domain(self.height, self.width)

    def __str__(self) -> str:
        size = f"{self.height}x{self.width}"
        return size if self.cover.whole else f"{size} moved {self.cover.digest[:4]}"


@dataclass(frozen=True)
class Stencil:
    """How each position of ``target`` reads positions of ``source``: one tap for each position it reads.

    ``kind`` is ``window`` (convolution, pooling), ``transposed`` (transposed convolution), ``nearest``,
    ``nearest_exact``, ``bilinear``, ``pad``, ``pixel_shuffle``, ``pixel_unshuffle``, ``table`` (each row and each
    column reads one, given by number, -1: outside) or ``transposition`` (rows are columns); ``parameters`` are sorted
    name-value pairs of that kind.
    """

    kind: StencilKind
    source: Domain
    target: Domain
    parameters: tuple[tuple[str, Parameter], ...]

    @classmethod
    def of(cls, kind: StencilKind, source: Domain, target: Domain, **parameters: Parameter) -> Stencil:
        """Build a stencil from keyword parameters."""
        return cls(kind, source, target, tuple(sorted(parameters.items())))

    def __getitem__(self, name: str) -> Parameter:
        return dict(self.parameters)[name]

    def integer(self, name: str) -> int:
        """The parameter ``name`` as an int."""
        value = self[name]
        assert not isinstance(value, tuple)
        return int(value)

    def number(self, name: str) -> float:
        """The parameter ``name`` as a float."""
        value = self[name]
        assert not isinstance(value, tuple)
        return float(value)

    @property
    def taps(self) -> int:
        """Number of source positions a target position reads."""
        if self.kind in ("window", "transposed"):
            return self.integer("kernel_height") * self.integer("kernel_width")
        if self.kind == "bilinear":
            return 4
        if self.kind == "pixel_unshuffle":
            height, width = self.factors
            return height * width
        return 1

    @property
    def factors(self) -> tuple[int, int]:
        """By how much a pixel shuffle multiplies, or its inverse divides, height and width: ``factor``, and for the
        width ``factor_x`` where that is another."""
        names = dict(self.parameters)
        return self.integer("factor"), self.integer("factor_x" if "factor_x" in names else "factor")


@dataclass(frozen=True)
class PlanInput:
    """A graph input derived from the mask: ``index`` or ``valid`` of a domain; ``halo``, ``table``, ``weights``,
    ``subposition`` or ``inside`` of a stencil."""

    kind: PlanKind
    of: Domain | Stencil


@dataclass(frozen=True)
class Site:
    """One tensor that a recorded call stores.

    Attributes:
        name: unique within a program.
        kind: ``spatial`` (an edit replaces rows of it) or ``value`` (kept, or replaced as a whole).
        domain: resolution of a spatial site.
        order: permutation of a spatial site's dimensions to (batch, space..., channels...).
        space_rank: how many dimensions its space takes: 2 for height and width, 1 when flattened.
        shape, dtype: of the stored tensor as computed.
        lossless: never stored as a narrower type: outputs must be bit-identical, and edits subtract recorded sums from
            recorded totals.
    """

    name: str
    kind: SiteKind
    domain: Domain | None
    order: tuple[int, ...]
    space_rank: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    lossless: bool = False

    @property
    def bytes(self) -> int:
        """Size in bytes at the computed dtype."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize
