"""Reshapes that cut a map into patches or windows, or put them together: space to depth by hand, and back.

Why: transformers cut pictures into patches or windows and put them together at their end with reshapes and
permutations alone. The patches are the positions of a coarser resolution, what lies within one are channels; so a cut
is a ``pixel_unshuffle`` and its inverse a ``pixel_shuffle``, whatever the order of the channels.

Before: ``y = reshape(x, [B, C, H / f, f, W / g, g])``     After: ``y = to_map(permute(gather_taps(x rows)))``
Before: ``y = reshape(x, [B, C, h * f, w * g])`` with x of dimensions (batch, channel, height, channel, width, channel)
After:  ``y = to_map(pixel_select(flatten(permute(gather_taps(x rows))), subposition, f, g))``

Conditions:
1. A cut divides height and width, each by more than one; each one's rest is the dimension behind it.
2. A join multiplies height and width, the channel dimension behind each, by more than one.
3. All other dimensions are kept, merged or split as in any other reshape (see layouts.reshape_layout).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import fx

from fisedit_compile.passes.common.ir import RowsBuilder, shape_of, spatial_of
from fisedit_compile.passes.common.layouts import CHANNEL, HEIGHT, SPACE, WIDTH, Spatial, reshape_layout
from fisedit_compile.passes.common.targets import aten
from fisedit_compile.runtime.spec import Domain, Stencil


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
    choices = itertools.product(_divisors(domain.height), _divisors(domain.width))
    for factors in sorted(choices, key=lambda pair: (pair[0] == pair[1], pair[0] * pair[1]), reverse=True):
        coarse = Domain(domain.height // factors[0], domain.width // factors[1])
        if coarse.size < 2:
            continue
        dims: list[str] = []
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


def patch_stencil(kind: str, source: Domain, target: Domain, factors: tuple[int, int]) -> Stencil:
    """The stencil of a cut (``pixel_unshuffle``) or a join (``pixel_shuffle``)."""
    height, width = factors
    return Stencil.of(kind, source, target, factor=height, **({} if height == width else {"factor_x": width}))


def rewrite_patches(node: fx.Node, builder: RowsBuilder) -> None:
    """Replace a reshape that leads to another resolution."""
    x, after = node.args[0], shape_of(node)
    assert isinstance(x, fx.Node)
    source, target = spatial_of(x), spatial_of(node)
    assert source is not None and target is not None
    patches = reshape_patches(source, shape_of(x), after)
    assert patches is not None
    (height, width), channels = patches.factors, [after[dim] for dim in target.channel_dims]
    spatial, sizes = patches.parts
    kind = "pixel_unshuffle" if patches.cut else "pixel_shuffle"
    stencil = patch_stencil(kind, source.domain, target.domain, patches.factors)
    rows = builder.taps(x, stencil, 0.0)  # [B, N, K, *C]
    offsets = [spatial.channel_dims.index(dim) for dim in patches.offset_dims]
    count = len(spatial.channel_dims)
    rest = [place for place in range(count) if place not in offsets]
    if patches.cut:
        # From (offsets, rest) to the order in which the parts have their channels.
        inner = [sizes[dim] for dim in spatial.channel_dims]
        rows = builder.call(
            aten.reshape.default, rows, [after[target.batch_dim], -1, height, width, *(inner[place] for place in rest)]
        )
        order = [offsets.index(place) if place in offsets else 2 + rest.index(place) for place in range(count)]
        rows = builder.call(aten.permute.default, rows, [0, 1, *(2 + place for place in order)])
    else:
        rows = builder.call(aten.permute.default, rows, [0, 1, 2, *(3 + place for place in (*rest, *offsets))])
        rows = builder.call(aten.flatten.using_ints, rows, 3) if count > 1 else rows
        subposition = builder.plan("subposition", stencil)
        factors = (height,) if height == width else (height, width)
        rows = builder.call(torch.ops.fisedit.pixel_select.default, rows, subposition, *factors)
    builder.replace(builder.call(aten.reshape.default, rows, [after[target.batch_dim], -1, *channels]))
