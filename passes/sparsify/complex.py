"""Complex numbers from pairs of channels and back, on rows.

Why: rotary embeddings turn pairs of channels by multiplying complex numbers (Qwen-Image). Each pair belongs to one
position, so it becomes a number on the rows as it does on the map.

Before: ``z = complex_of_pairs(x)`` with x of shape [B, T, heads, D, 2]
After:  ``z = to_map(complex_of_pairs(to_rows(x)))``
Before: ``y = view_as_real(z)``            After: ``y = to_map(view_as_real(to_rows(z)))``

Conditions:
1. The pairs lie along the last dimension, and it is a channel dimension.
"""

from __future__ import annotations

from torch import fx

from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.family import Family, Inferred, rewrite_nodes
from fisedit_compile.passes.common.ir import RowsBuilder, spatial_of
from fisedit_compile.passes.common.layouts import CHANNEL
from fisedit_compile.passes.common.targets import COMPLEX, aten

NAME = "sparsify_complex"


def infer(node: fx.Node) -> Inferred:
    """The layout of the input, with a last channel dimension less or more."""
    spatial = spatial_of(node.args[0])
    assert spatial is not None  # the only operand
    if node.target is aten.view_as_real.default:
        return spatial.with_dims((*spatial.dims, CHANNEL))
    if spatial.dims[-1] != CHANNEL:
        return "the last dimension is not a channel dimension"
    return spatial.with_dims(spatial.dims[:-1])


def rewrite(node: fx.Node, builder: RowsBuilder) -> str | None:
    """Run the same operator on the rows; channels keep their order there, so that the pairs lie along the last one."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    builder.replace(builder.call(node.target, builder.rows(x)))
    return None


FAMILY = Family(NAME, COMPLEX.__contains__, infer, rewrite)


def sparsify_complex(compilation: Compilation) -> None:
    """Run the pass on the edit graph."""
    rewrite_nodes(FAMILY, compilation.edit.graph, compilation.report)
