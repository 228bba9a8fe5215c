"""Attention within windows is folded into the batch again where whole maps are computed.

Why: unfold_windows.py keeps samples and windows apart, so that passes can tell what is a position; but PyTorch's fast
ways of computing attention take four dimensions, and with five it makes all scores.

Before: ``y = scaled_dot_product_attention(q, k, v, mask)``                  (q ``[B, n, heads, T, D]``)
After:  ``y = reshape(scaled_dot_product_attention(reshape(q, [B * n, heads, T, D]), ...), [B, n, heads, T, D])``

Conditions:
1. Query, key and value have five dimensions, the first two of the same sizes.
"""

from __future__ import annotations

from torch import fx

from fisedit_compile.passes.common.arguments import read_arguments
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.ir import insert_call, shape_of
from fisedit_compile.passes.common.meta import VALUE
from fisedit_compile.passes.common.targets import aten

NAME = "fold_attention"


def _folded_mask(node: fx.Node, mask: fx.Node, sizes: tuple[int, ...]) -> fx.Node:
    """A mask of five dimensions, or fewer, as one of four."""
    shape = (1,) * (5 - len(shape_of(mask))) + shape_of(mask)
    if shape[:2] not in ((1, 1), sizes):
        whole = insert_call(node, aten.reshape.default, mask, list(shape))
        mask, shape = insert_call(node, aten.expand.default, whole, [*sizes, *shape[2:]]), (*sizes, *shape[2:])
    return insert_call(node, aten.reshape.default, mask, [shape[0] * shape[1], *shape[2:]])


def fold_attention(compilation: Compilation) -> None:
    """Run the pass on the record graph."""
    graph_module, report = compilation.module("record"), compilation.report
    for node in list(graph_module.graph.nodes):
        if node.target is not aten.scaled_dot_product_attention.default or len(shape_of(node)) != 5:
            continue
        given = read_arguments(node)
        operands = [given[name] for name in ("query", "key", "value")]
        sizes = shape_of(node)[:2]
        if any(len(shape_of(value)) != 5 or shape_of(value)[:2] != sizes for value in operands):
            continue
        folded = [
            insert_call(node, aten.reshape.default, value, [sizes[0] * sizes[1], *shape_of(value)[2:]])
            for value in operands
        ]
        mask = given["attn_mask"]
        if mask is not None:
            mask = _folded_mask(node, mask, sizes)
        rest = {"is_causal": True} if given["is_causal"] else {}
        attended = insert_call(node, node.target, *folded, mask, scale=given["scale"], **rest)
        apart = insert_call(node, aten.reshape.default, attended, list(shape_of(node)))
        apart.meta = {**node.meta, VALUE: apart.meta[VALUE]}
        node.replace_all_uses_with(apart)
        graph_module.graph.erase_node(node)
        report.match(NAME)
    graph_module.graph.lint()
    graph_module.recompile()
