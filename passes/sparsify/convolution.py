"""Convolutions on rows.

Why: a convolution's cost is its output positions; only active ones are computed. Neighbours that did not change are
read from the recorded input (the halo), as in SIGE section 3.2.

Before: ``y = conv2d(x, w, b, stride, padding, dilation, groups)``
After:  ``y = to_map(conv_rows(to_rows(x), recorded(x, "rows"), halo, table, pack_conv_weight(w), b, groups))``
        and for a 1x1 kernel with stride 1 and no padding ``y = to_map(linear(to_rows(x), reshape(w), b))``

Conditions:
1. x is spatial with dimensions (batch, channel, height, width).
2. Weight and bias are not spatial.
3. The kernel has two dimensions.
"""

from __future__ import annotations

import torch
from torch import fx

from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.family import Family, Inferred, rewrite_nodes
from fisedit_compile.passes.common.ir import RowsBuilder, shape_of, spatial_of
from fisedit_compile.passes.common.layouts import NCHW, Spatial
from fisedit_compile.passes.common.reading.convolutions import read_convolution
from fisedit_compile.passes.common.targets import CONVOLUTIONS, aten
from fisedit_compile.runtime.spec import Domain

NAME = "sparsify_conv"


def infer(node: fx.Node) -> Inferred:
    """NCHW at the resolution of the output."""
    convolution = read_convolution(node)
    if isinstance(convolution, str):
        return convolution
    spatial = spatial_of(convolution.x)
    if spatial is None or spatial.dims != NCHW:
        return "the input is not a spatial value with dimensions (batch, channel, height, width)"
    if spatial_of(convolution.weight) or spatial_of(convolution.bias):
        return "weight or bias is a spatial value"
    return Spatial(Domain(*shape_of(node)[2:]), NCHW)


def rewrite(node: fx.Node, builder: RowsBuilder) -> str | None:
    """Replace the node by ``conv_rows`` or ``linear``."""
    convolution = read_convolution(node)
    assert not isinstance(convolution, str)
    source, target = spatial_of(convolution.x), spatial_of(node)
    assert source is not None and target is not None
    weight_shape = shape_of(convolution.weight)
    kernel = weight_shape[2:]
    rows = builder.rows(convolution.x)
    plain = kernel == (1, 1) and convolution.stride == (1, 1) and convolution.padding == (0, 0)
    if plain and convolution.groups == 1 and not convolution.transposed and source.domain == target.domain:
        weight = builder.call(aten.reshape.default, convolution.weight, list(weight_shape[:2]))
        builder.replace(builder.call(aten.linear.default, rows, weight, convolution.bias))
        return None
    stencil = convolution.stencil(source.domain, target.domain)
    packed = builder.call(
        torch.ops.fisedit.pack_conv_weight.default, convolution.weight, convolution.transposed, convolution.groups
    )
    builder.replace(
        builder.call(
            torch.ops.fisedit.conv_rows.default,
            rows,
            builder.recorded_rows(convolution.x, rows),
            builder.plan("halo", stencil),
            builder.plan("table", stencil),
            packed,
            convolution.bias,
            convolution.groups,
        )
    )
    return None


FAMILY = Family(NAME, CONVOLUTIONS.__contains__, infer, rewrite)


def sparsify_conv(compilation: Compilation) -> None:
    """Run the pass on the edit graph."""
    rewrite_nodes(FAMILY, compilation.edit.graph, compilation.report)
