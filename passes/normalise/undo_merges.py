"""Dimensions that are merged and taken apart again stay apart.

Why: ``nn.MultiheadAttention`` puts positions first, ``[T, B, E]``, merges samples with heads around its attention and
with positions around its last linear layer. A value whose samples are merged with something else has no layout that
rows know, so it is computed as a whole.

Before: ``y = reshape(permute(reshape(x, [T, B * h, D]), [1, 0, 2]), [B, h, T, D])``        (x ``[T, B, h * D]``)
After:  ``y = permute(reshape(x, [T, B, h, D]), [1, 2, 0, 3])``

Before: ``y = reshape(permute(reshape(x, [B * h, T, D]), [1, 0, 2]), [T, B, h * D])``        (x ``[B, h, T, D]``)
After:  ``y = reshape(permute(x, [2, 0, 1, 3]), [T, B, h * D])``

Before: ``y = reshape(linear(reshape(x, [T * B, E]), w, b), [T, B, F])``
After:  ``y = linear(reshape(x, [T, B, E]), w, b)``

Conditions, one for each of the three; where it does not hold, nothing was merged and taken apart:
1. The last reshape splits one dimension, where one dimension of ``x`` ends and the next begins.
2. The first reshape merges two dimensions, and the last one splits between them.
3. The linear layer reads a matrix that is a reshape, is read by one reshape, and that keeps the channels.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence

from torch import fx

from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.ir import insert_call, shape_of
from fisedit_compile.passes.common.targets import RESHAPES, aten
from fisedit_compile.passes.normalise.matching.matrix_products import Operand

NAME = "undo_merges"


def _ends(shape: Sequence[int]) -> set[int]:
    """How many elements the first dimensions hold, for each number of dimensions."""
    return set(itertools.accumulate(shape, operator.mul, initial=1))


def _split_order(order: Sequence[int], dim: int) -> list[int]:
    """An order of dimensions once ``dim`` is two of them."""
    return [new for old in order for new in ((dim, dim + 1) if old == dim else (old + (old > dim),))]


def _reshaped(before: fx.Node, value: fx.Node, sizes: Sequence[int]) -> fx.Node:
    return value if shape_of(value) == tuple(sizes) else insert_call(before, aten.reshape.default, value, list(sizes))


def _permuted(node: fx.Node) -> Operand | None:
    """What a reshape reads, seen before permutations, when these permute the result of another reshape."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    operand = Operand(source, tuple(range(len(shape_of(source)))))
    while operand.permuted:
        operand = operand.before_permutation()
    return operand if operand.node.target in RESHAPES and not operand.straight else None


def _split_before(node: fx.Node, operand: Operand) -> fx.Node | None:
    """Condition 1: split before permuting."""
    source, merged = operand.node.args[0], shape_of(operand.node)
    assert isinstance(source, fx.Node)
    before, after, ends = operand.shape, shape_of(node), _ends(shape_of(source))
    for place, dim in enumerate(operand.order):
        first, second = (*after[place : place + 2], 0, 0)[:2]
        if (*before[:place], first, second, *before[place + 1 :]) != after or first * second != before[place]:
            continue
        if min(first, second) > 1 and math.prod(merged[:dim]) * first in ends:
            parts = _reshaped(node, source, [*merged[:dim], first, second, *merged[dim + 1 :]])
            return insert_call(node, aten.permute.default, parts, _split_order(operand.order, dim))
    return None


def _merge_behind(node: fx.Node, operand: Operand) -> fx.Node | None:
    """Condition 2: merge after permuting."""
    source, merged = operand.node.args[0], shape_of(operand.node)
    assert isinstance(source, fx.Node)
    sizes, before, after = shape_of(source), operand.shape, shape_of(node)
    for dim in range(len(merged)):
        first, second = (*sizes[dim : dim + 2], 0, 0)[:2]
        if (*sizes[:dim], first * second, *sizes[dim + 2 :]) != merged or min(first, second) < 2:
            continue
        if math.prod(before[: operand.order.index(dim)]) * first in _ends(after):
            parts = insert_call(node, aten.permute.default, source, _split_order(operand.order, dim))
            return _reshaped(node, parts, after)
    return None


def _linear_apart(node: fx.Node) -> fx.Node | None:
    """Condition 3."""
    linear = node.args[0]
    if not isinstance(linear, fx.Node) or linear.target is not aten.linear.default or len(linear.users) != 1:
        return None
    matrix, after = linear.args[0], shape_of(node)
    assert isinstance(matrix, fx.Node)
    if matrix.target not in RESHAPES or len(shape_of(matrix)) != 2 or len(after) < 3:
        return None
    if after[-1] != shape_of(linear)[-1]:
        return None
    source = matrix.args[0]
    assert isinstance(source, fx.Node)
    apart = _reshaped(linear, source, [*after[:-1], shape_of(matrix)[1]])
    return insert_call(linear, aten.linear.default, apart, *linear.args[1:], **linear.kwargs)


def _apart(node: fx.Node) -> fx.Node | None:
    """The same value without a merge in between."""
    operand = _permuted(node)
    if operand is None:
        return _linear_apart(node)
    return _split_before(node, operand) or _merge_behind(node, operand)


def _erase(node: fx.Node) -> None:
    """Erase a node that nothing reads, and what only it read."""
    inputs = node.all_input_nodes
    node.graph.erase_node(node)
    for value in inputs:
        if value.op == "call_function" and not value.users:
            _erase(value)


def undo_merges(compilation: Compilation) -> None:
    """Run the pass on the traced graph."""
    graph_module, report = compilation.edit, compilation.report
    graph = graph_module.graph
    pending = [node for node in graph.nodes if node.target in RESHAPES]
    while pending:
        node = pending.pop()
        value = _apart(node) if node.users else None
        if value is None:
            continue
        node.replace_all_uses_with(value)
        _erase(node)
        report.match(NAME)
        # What was made on the way may be such a reshape, too, and so may be what reads it.
        pending += [other for other in (value, *value.all_input_nodes, *value.users) if other.target in RESHAPES]
    graph_module.recompile()
