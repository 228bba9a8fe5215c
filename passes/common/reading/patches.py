"""Reshapes that cut a map into patches or windows, or put them together, told by the sizes before and after.

Conditions:
1. A cut divides height and width, each by more than one; each one's rest is the dimension behind it.
2. A join multiplies height and width, the channel dimension behind each, by more than one.
3. All other dimensions are kept, merged or split as in any other reshape (see layouts.reshape_layout).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from fisedit_compile.passes.common.layouts import CHANNEL, HEIGHT, SPACE, WIDTH, Dimension, Spatial, reshape_layout
from fisedit_compile.runtime.spec import Domain, Stencil, StencilKind


@dataclass(frozen=True)
class Patches:
    """A reshape seen in two steps: to or from patches, and what else it does.

    Attributes:
        cut: whether the map is cut; else it is put together.
        factors: height and width of a patch.
        parts: layout and sizes of the map as patches: the result of a cut, the operand of a join.
        after: layout of the reshape's result.
    """

    cut: bool
    factors: tuple[int, int]
    parts: tuple[Spatial, tuple[int, ...]]
    after: Spatial

    @property
    def offset_dims(self) -> tuple[int, int]:
        """Which dimensions of the parts say where in its patch a value lies, vertically and horizontally."""
        spatial = self.parts[0]
        return spatial.dims.index(HEIGHT) + 1, spatial.dims.index(WIDTH) + 1


def _in_rows_and_columns(spatial: Spatial, shape: tuple[int, ...]) -> tuple[Spatial, tuple[int, ...]]:
    if spatial.space_rank == 2:
        return spatial, shape
    at, domain = spatial.dims.index(SPACE), spatial.domain
    dims = (*spatial.dims[:at], HEIGHT, WIDTH, *spatial.dims[at + 1 :])
    return spatial.with_dims(dims), (*shape[:at], domain.height, domain.width, *shape[at + 1 :])


def _cut(spatial: Spatial, before: tuple[int, ...], after: tuple[int, ...]) -> Patches | None:
    """Condition 1, with the largest factors that fit, equal ones first."""
    spatial, before = _in_rows_and_columns(spatial, before)
    ends = set(itertools.accumulate(after, lambda product, size: product * size))
    domain = spatial.domain
    candidates = itertools.product(_divisors(domain.height), _divisors(domain.width))
    for factors in sorted(candidates, key=lambda pair: (pair[0] == pair[1], pair[0] * pair[1]), reverse=True):
        coarse = Domain(domain.height // factors[0], domain.width // factors[1])
        if coarse.size < 2:
            continue
        dims: list[Dimension] = []
        sizes: list[int] = []
        for name, size in zip(spatial.dims, before, strict=True):
            if name in (HEIGHT, WIDTH):
                factor = factors[name == WIDTH]
                dims += [name, CHANNEL]
                sizes += [size // factor, factor]
            else:
                dims.append(name)
                sizes.append(size)
        inner = {math.prod(sizes[: at + 1]) for at, name in enumerate(dims) if name in (HEIGHT, WIDTH)}
        parts = (Spatial(coarse, tuple(dims)), tuple(sizes))
        found = reshape_layout(*parts, after) if inner <= ends else ""
        if isinstance(found, Spatial):
            return Patches(True, factors, parts, found)
    return None


def _divisors(size: int) -> list[int]:
    return [factor for factor in range(2, size + 1) if size % factor == 0]


def _join(spatial: Spatial, before: tuple[int, ...], after: tuple[int, ...]) -> Patches | None:
    """Condition 2."""
    dims, sizes, factors = [], [], []
    at = 0
    while at < len(before):
        name, size = spatial.dims[at], before[at]
        if name in (HEIGHT, WIDTH) and spatial.dims[at + 1 : at + 2] == (CHANNEL,):
            factors.append(before[at + 1])
            size *= before[at + 1]
            at += 1
        dims.append(name)
        sizes.append(size)
        at += 1
    if len(factors) != 2 or 1 in factors:
        return None
    height, width = factors
    domain = Domain(spatial.domain.height * height, spatial.domain.width * width)
    found = reshape_layout(Spatial(domain, tuple(dims)), tuple(sizes), after)
    return Patches(False, (height, width), (spatial, before), found) if isinstance(found, Spatial) else None


def reshape_patches(spatial: Spatial, before: tuple[int, ...], after: tuple[int, ...]) -> Patches | None:
    """A reshape as one to or from patches, or None when it is neither."""
    return _cut(spatial, before, after) or _join(spatial, before, after)


def patch_stencil(cut: bool, source: Domain, target: Domain, factors: tuple[int, int]) -> Stencil:
    """The stencil of a cut into patches, or of a join of them."""
    height, width = factors
    kind: StencilKind = "pixel_unshuffle" if cut else "pixel_shuffle"
    return Stencil.of(kind, source, target, factor=height, **({} if height == width else {"factor_x": width}))
