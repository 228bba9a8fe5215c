"""Reshapes that cut a map into patches or windows, or put them together: space to depth by hand, and back.

Why: transformers cut pictures into patches or windows and put them together at their end with reshapes and
permutations alone. The patches are the positions of a coarser resolution, what lies within one are channels; so a cut
is a ``pixel_unshuffle`` and its inverse a ``pixel_shuffle``, whatever the order of the channels.

Before: ``y = reshape(x, [B, C, H / f, f, W / g, g])``     After: ``y = to_map(permute(gather_taps(x rows)))``
Before: ``y = reshape(x, [B, C, h * f, w * g])`` with x of dimensions (batch, channel, height, channel, width, channel)
After:  ``y = to_map(pixel_select(flatten(permute(gather_taps(x rows))), subposition, f, g))``

Conditions: those of common/reading/patches.py, which tells such a reshape.
"""

from __future__ import annotations

import torch
from torch import fx

from fisedit_compile.passes.common.ir import RowsBuilder, shape_of, spatial_of
from fisedit_compile.passes.common.reading.patches import patch_stencil, reshape_patches
from fisedit_compile.passes.common.targets import aten


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
    stencil = patch_stencil(patches.cut, source.domain, target.domain, patches.factors)
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
