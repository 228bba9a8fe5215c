"""Linear layers, layer norms, RMS norms and other work within the channels of one position.

Why: each output position depends on the same input position only, so the operator runs on the rows as it is.

Before: ``y = linear(x, w, b)``            After: ``y = to_map(linear(to_rows(x), w, b))``
Before: ``y = layer_norm(x, [C], w, b)``   After: ``y = to_map(layer_norm(to_rows(x), [C], w, b))``
Before: ``y = matmul(x, w)``               After: ``y = to_map(matmul(to_rows(x), w))``
Before: ``y = matmul(x, z)``               After: ``y = to_map(matmul(to_rows(x), to_rows(z)))``
Before: ``y = batch_norm(x, w, b, mean, variance)`` (inference)
After:  ``y = to_map(batch_norm(permute(to_rows(x)), ...))`` with the channels brought to dimension 1 and back

Conditions:
1. x is spatial and the dimensions the operator works on are channels.
2. All other operands are not spatial; a matrix product's right side has two dimensions. Or a product's operands are
   both spatial, at one resolution, with the same dimensions, the last two of them channels.
3. A batch norm uses its running statistics.
"""

from __future__ import annotations

from torch import fx

from fisedit_compile.passes.common.arguments import read_arguments
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.family import Family, Inferred, rewrite_nodes
from fisedit_compile.passes.common.ir import RowsBuilder, shape_of, spatial_of
from fisedit_compile.passes.common.layouts import CHANNEL
from fisedit_compile.passes.common.targets import LAST_DIMENSION_NORMS, LAST_DIMENSION_PRODUCTS, PER_POSITION, aten

NAME = "sparsify_linear"


def is_within(node: fx.Node) -> bool:
    """Whether a node is the product of matrices of which each position has its own."""
    if node.target is not aten.matmul.default:
        return False
    left, right = spatial_of(node.args[0]), spatial_of(node.args[1])
    return left is not None and left == right and left.dims[-2:] == (CHANNEL, CHANNEL)


def infer(node: fx.Node) -> Inferred:
    """The layout of the input."""
    x = node.args[0]
    spatial = spatial_of(x)
    if spatial is not None and is_within(node):
        return spatial
    if spatial is None or any(spatial_of(value) for value in node.all_input_nodes if value is not x):
        return "an operand other than the first is a spatial value"
    if node.target in LAST_DIMENSION_PRODUCTS:
        right = node.args[1]
        assert isinstance(right, fx.Node)
        if len(shape_of(right)) != 2:
            return "the right side of the product is not a matrix"
        if spatial.dims[-1] != CHANNEL:
            return "the last dimension is not a channel dimension"
    elif node.target in LAST_DIMENSION_NORMS:
        normalised = read_arguments(node)["normalized_shape"]
        if any(name != CHANNEL for name in spatial.dims[len(spatial.dims) - len(normalised) :]):
            return "the normalised dimensions are not all channels"
    else:
        if spatial.batch_dim != 0 or spatial.channel_dims != (1,):
            return "the channels do not stand alone in dimension 1"
        if read_arguments(node)["training"]:
            return "the statistics are those of the batch"
    return spatial


def rewrite(node: fx.Node, builder: RowsBuilder) -> str | None:
    """Run the same operator on the rows."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    rows = builder.rows(x)
    if node.target is aten.batch_norm.default:
        moved = builder.call(aten.transpose.int, rows, 1, 2)  # [B, C, N]
        output = builder.call(node.target, moved, *node.args[1:], **node.kwargs)
        builder.replace(builder.call(aten.transpose.int, output, 1, 2))
    elif is_within(node):
        right = node.args[1]
        assert isinstance(right, fx.Node)
        builder.replace(builder.call(node.target, rows, builder.rows(right)))
    else:
        builder.replace(builder.call(node.target, rows, *node.args[1:], **node.kwargs))
    return None


FAMILY = Family(NAME, PER_POSITION.__contains__, infer, rewrite)


def sparsify_linear(compilation: Compilation) -> None:
    """Run the pass on the edit graph."""
    rewrite_nodes(FAMILY, compilation.edit.graph, compilation.report)
