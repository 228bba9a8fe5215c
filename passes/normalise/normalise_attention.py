"""Eager attention becomes ``scaled_dot_product_attention``.

Why: networks that compute attention as product, softmax, product spell it in many ways, and most fold the heads into
the batch on the way, which hides the samples from every later pass. One operator on ``[B, heads, T, D]`` is the only
spelling that ``sparsify_attention`` needs to know, and it never makes the ``[B * heads, T, T]`` scores.

Before: ``a = reshape(q, [B * h, T, D])``, the same for ``k`` and ``v``           (q, k, v ``[B, h, T, D]``)
        ``s = baddbmm(mask, a, transpose(b, -1, -2), beta=1, alpha=scale)``
        ``y = reshape(bmm(softmax(s, -1), c), [B, h, T, D])``
After:  ``y = scaled_dot_product_attention(q, k, v, mask, scale=scale)``

The products may be ``bmm``, ``baddbmm``, ``matmul`` or ``einsum``; the scores may be multiplied or divided by a number
and cast to a wider dtype; a mask may be added to them; the weights may be cast back, pass an idle dropout and be
transposed. Without heads (``[B, T, D]``) one head is made. Operands that lie in another order are permuted.

Conditions, looked at for each softmax:
1. It normalises the last dimension, and its weights go through casts, permutations and idle dropouts into exactly one
   product. Nothing else reads the weights or the scores.
2. The scores are a product of two tensors (query and key) with one or two batch dimensions that do not broadcast.
3. Between the scores and the softmax stand casts, products with or quotients by Python numbers, and at most one added
   mask, added last and unscaled. Such numbers may also scale query and key.
4. Scores are cast to wider dtypes only, and query, key, value and result have one dtype once the casts that widen
   query and key are left out.
5. A mask has that dtype or is widened from it, and broadcasts to the scores without growing them.
6. The product with the value contracts the keys; nothing is added to it and it is not scaled.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fisedit_compile.passes.common.arguments import read_arguments
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.ir import eliminate_dead_code, insert_call, shape_of
from fisedit_compile.passes.common.meta import VALUE
from fisedit_compile.passes.common.targets import NO_OPERATION, PERMUTES, RESHAPES, SOFTMAXES, aten
from fisedit_compile.passes.normalise.matching.matrix_products import (
    PRODUCTS,
    Operand,
    Product,
    Unmatched,
    read_product,
    tensor_argument,
)

NAME = "normalise_attention"
CASTS = {aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default}
QUOTIENTS = {aten.div.Tensor, aten.div.Scalar}
SCALES = {aten.mul.Tensor, aten.mul.Scalar} | QUOTIENTS
#: Checks without a result, which tracing leaves beside a cast.
ASSERTIONS = {aten._assert_tensor_metadata.default}


@dataclass(frozen=True)
class Attention:
    """What was matched.

    Attributes:
        query, key, value: ``[batch, heads, T, D]``, or ``[batch, T, D]`` with or without heads folded into the batch.
        order: permutes ``[batch..., T, D]`` to the dimensions of ``end``.
        end: the product with the value, which is replaced.
    """

    query: Operand
    key: Operand
    value: Operand
    mask: fx.Node | None
    scale: float
    order: tuple[int, ...]
    end: fx.Node


def _dtype(node: fx.Node) -> torch.dtype:
    dtype = node.meta[VALUE].dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


def _widens(before: torch.dtype, after: torch.dtype) -> bool:
    return torch.promote_types(before, after) == after


def _is_widening_cast(node: fx.Node) -> bool:
    return node.target in CASTS and _widens(_dtype(tensor_argument(node)), _dtype(node))


def _readers(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if user.target not in ASSERTIONS]


def _follow_weights(softmax: fx.Node) -> tuple[fx.Node, Product]:
    """From the softmax to the product with the value, weights on the left (conditions 1 and 6)."""
    node = softmax
    while True:
        readers = _readers(node)
        if len(readers) != 1:
            raise Unmatched(f"the attention weights have {len(readers)} readers, expected 1")
        end = readers[0]
        if end.target in PRODUCTS:
            break
        if end.target is aten.dropout.default:
            if end.args[2] and end.args[1] != 0:
                raise Unmatched("the attention weights pass a dropout that is not idle")
        elif end.target not in CASTS | NO_OPERATION | PERMUTES:
            raise Unmatched(f"the attention weights are read by {end.target}, not by a matrix product")
        node = end
    product = read_product(end)
    if (product.left.node is node) == (product.right.node is node):
        raise Unmatched("the attention weights are not one operand of the product with the value")
    if product.right.node is node:
        product = product.flipped()
    weights = product.left
    while weights.node is not softmax:
        weights = weights.before_permutation() if weights.permuted else _input_of(weights)
    if not weights.straight:
        raise Unmatched("the product with the value does not contract the keys")
    if end.target is aten.baddbmm.default:
        given = read_arguments(end)
        if given["beta"] != 0 or given["alpha"] != 1:
            raise Unmatched("the product with the value is scaled, or something is added to it")
    return end, product


def _input_of(operand: Operand) -> Operand:
    return replace(operand, node=tensor_argument(operand.node))


def _number(node: fx.Node, position: int) -> float | None:
    value = node.args[position]
    return float(value) if isinstance(value, (int, float)) else None


def _follow_scores(softmax: fx.Node) -> tuple[fx.Node, float, fx.Node | None]:
    """From the softmax back to the product of query and key (condition 3): (product, scale, mask)."""
    scale, mask = 1.0, None
    node = tensor_argument(softmax)
    if not _widens(_dtype(node), _dtype(softmax)):
        raise Unmatched(f"the softmax narrows the attention scores to {_dtype(softmax)}")
    while True:
        readers = _readers(node)
        if len(readers) != 1:
            raise Unmatched(f"the attention scores have {len(readers)} readers, expected 1")
        if node.target in PRODUCTS:
            break
        if node.target in CASTS:
            if not _is_widening_cast(node):
                raise Unmatched(f"the attention scores are narrowed to {_dtype(node)}")
            node = tensor_argument(node)
        elif node.target in NO_OPERATION:
            node = tensor_argument(node)
        elif node.target in SCALES:
            place = 1 if _number(node, 1) is not None else 0
            factor = _number(node, place)
            if factor is None or (place == 0 and node.target in QUOTIENTS):
                raise Unmatched("the scale of the attention scores is not a Python number")
            scale = scale / factor if node.target in QUOTIENTS else scale * factor
            node = tensor_argument(node, 1 - place)
        elif node.target is aten.add.Tensor:
            if mask is not None or scale != 1.0 or node.kwargs.get("alpha", 1) != 1:
                raise Unmatched("more than one mask, or one that is scaled, is added to the attention scores")
            node, mask = _scores_and_mask(node)
        else:
            raise Unmatched(f"the softmax reads {node.target}, not a matrix product")
    if node.target is aten.baddbmm.default:
        given = read_arguments(node)
        if given["beta"] != 0:
            if given["beta"] != 1 or mask is not None or scale != 1.0:
                raise Unmatched("more than one mask, or one that is scaled, is added to the attention scores")
            mask = tensor_argument(node)
        scale *= float(given["alpha"])
    return node, scale, mask


def _scores_and_mask(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Which operand of a sum is the scores: the one that comes from a product."""

    def from_product(value: fx.Node) -> bool:
        while value.target in CASTS | SCALES | NO_OPERATION and isinstance(value.args[0], fx.Node):
            value = value.args[0]
        return value.target in PRODUCTS

    first, second = tensor_argument(node, 0), tensor_argument(node, 1)
    if from_product(first) == from_product(second):
        raise Unmatched("neither or both operands of the sum before the softmax are a matrix product")
    return (first, second) if from_product(first) else (second, first)


def _without_scale(operand: Operand) -> tuple[Operand, float]:
    """The operand before products with, and quotients by, Python numbers; and what these come to."""
    scale = 1.0
    while True:
        inner = operand.before_permutation() if operand.permuted else operand
        if inner.node.target not in SCALES or (factor := _number(inner.node, 1)) is None:
            return operand, scale
        if _dtype(tensor_argument(inner.node)) != _dtype(inner.node):
            return operand, scale
        scale = scale / factor if inner.node.target in QUOTIENTS else scale * factor
        operand = _input_of(inner)


def _before_widening(operand: Operand, dtype: torch.dtype) -> Operand:
    """The operand before casts that widen it from ``dtype``, and before permutations that need not be run."""
    start = operand
    while True:
        if _dtype(operand.node) != dtype and _is_widening_cast(operand.node):
            operand = _input_of(operand)
        elif operand.permuted and (not operand.straight or _dtype(operand.node) != dtype):
            operand = operand.before_permutation()
        else:
            return operand if _dtype(operand.node) == dtype else start


def _check_mask(mask: fx.Node, scores: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The mask in ``dtype`` (condition 5)."""
    while _dtype(mask) != dtype and _is_widening_cast(mask):
        mask = tensor_argument(mask)
    if _dtype(mask) != dtype:
        raise Unmatched(f"the mask is {_dtype(mask)}, expected {dtype}")
    shape, full = shape_of(mask), shape_of(scores)
    padded = (1,) * (len(full) - len(shape)) + shape
    if len(padded) != len(full) or any(size not in (1, whole) for size, whole in zip(padded, full, strict=True)):
        raise Unmatched(f"the mask {shape} does not broadcast to the attention scores {full}")
    return mask


def _match(softmax: fx.Node) -> Attention:
    """Check all conditions.

    Raises:
        Unmatched: one does not hold.
    """
    rank = len(shape_of(softmax))
    if read_arguments(softmax)["dim"] % rank != rank - 1:
        raise Unmatched("the softmax does not normalise the last dimension")
    start, scale, mask = _follow_scores(softmax)
    end, output = _follow_weights(softmax)
    scores = read_product(start)
    if scores.order != tuple(range(rank)):
        if scores.flipped().order != tuple(range(rank)):
            raise Unmatched("the attention scores do not end in queries and keys")
        scores = scores.flipped()
    # The value is [keys, D]; as the right operand of a product it is read as [D, keys].
    value = output.right.swapped()
    dtype = _dtype(value.node)
    (left, before), (right, after) = _without_scale(scores.left), _without_scale(scores.right)
    query, key, scale = _before_widening(left, dtype), _before_widening(right, dtype), scale * before * after
    found = (_dtype(query.node), _dtype(key.node), dtype, _dtype(end))
    if len(set(found)) != 1:
        raise Unmatched("query, key, value and result differ in dtype: " + ", ".join(map(str, found)))
    if mask is not None:
        mask = _check_mask(mask, start, dtype)
    return Attention(query, key, value, mask, scale, output.order, end)


class _Writer:
    """Inserts calls before a node, with their values and the node's provenance."""

    def __init__(self, before: fx.Node) -> None:
        self.before = before

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return insert_call(self.before, target, *args, **kwargs)

    def permuted(self, operand: Operand) -> fx.Node:
        """A node with the operand's dimensions in its order."""
        while operand.permuted and not operand.straight:
            operand = operand.before_permutation()
        return operand.node if operand.straight else self.call(aten.permute.default, operand.node, list(operand.order))

    def with_heads(self, operand: Operand, batch: tuple[int, int]) -> fx.Node:
        """The operand as ``[B, heads, T, D]``."""
        if len(operand.order) == 4:
            return self.permuted(operand)
        source = _unfolded(operand)
        if source is not None and source.shape[:2] == batch:
            return self.permuted(source)
        node = self.permuted(operand)
        if batch[1] == 1:
            return self.call(aten.unsqueeze.default, node, 1)
        return self.call(aten.reshape.default, node, [*batch, *shape_of(node)[1:]])


def _unfolded(operand: Operand) -> Operand | None:
    """The ``[B, heads, T, D]`` value that was reshaped to ``[B * heads, T, D]``."""
    node, order = operand.node, operand.order
    while node.target in NO_OPERATION:
        node = tensor_argument(node)
    if node.target not in RESHAPES or order[0] != 0:
        return None
    source = tensor_argument(node)
    while source.target in NO_OPERATION:
        source = tensor_argument(source)
    before = shape_of(source)
    if len(before) != 4 or (before[0] * before[1], *before[2:]) != shape_of(node):
        return None
    return Operand(source, (0, 1, order[1] + 1, order[2] + 1))


def _samples_behind(operand: Operand) -> tuple[int, int] | None:
    """Samples and heads that a reshape of ``[..., B, heads * D]`` to ``[..., B * heads, D]`` merged."""
    while operand.permuted:
        operand = operand.before_permutation()
    node, dim = operand.node, operand.order[0]
    if node.target not in RESHAPES:
        return None
    before, after = shape_of(tensor_argument(node)), shape_of(node)
    if len(before) != len(after) or dim + 2 != len(after) or before[:dim] != after[:dim]:
        return None
    return (before[dim], after[dim] // before[dim]) if after[dim] % before[dim] == 0 else None


def _samples_and_heads(attention: Attention) -> tuple[int, int]:
    """Read off whichever operand has heads or had them folded into the batch; without any, one head."""
    for operand in (attention.query, attention.value, attention.key):
        source = operand if len(operand.order) == 4 else _unfolded(operand)
        if source is not None:
            return source.shape[0], source.shape[1]
    for operand in (attention.query, attention.value, attention.key):
        if len(operand.order) == 3 and (found := _samples_behind(operand)) is not None:
            return found
    return attention.query.shape[0], 1


def _rewrite(attention: Attention) -> None:
    """Put the one operator in place of the last product."""
    end, rank = attention.end, len(attention.order)
    writer, batch = _Writer(end), _samples_and_heads(attention)
    inputs = [writer.with_heads(operand, batch) for operand in (attention.query, attention.key, attention.value)]
    mask = attention.mask
    if mask is not None:
        shape = shape_of(mask)
        if rank == 3 and len(shape) == 3:
            mask = writer.call(aten.reshape.default, mask, [*((1, 1) if shape[0] == 1 else batch), *shape[1:]])
        inputs.append(mask)
    node = writer.call(aten.scaled_dot_product_attention.default, *inputs, scale=attention.scale)
    straight = attention.order == tuple(range(rank))
    if rank == 3 and straight:
        for user in list(end.users):
            if user.target in RESHAPES and shape_of(user) == shape_of(node):
                user.replace_all_uses_with(node)
                end.graph.erase_node(user)
    if not _readers(end):
        return
    if rank == 3 and batch[1] == 1:
        node = writer.call(aten.squeeze.dim, node, 1)
    elif rank == 3:
        node = writer.call(aten.reshape.default, node, [batch[0] * batch[1], *shape_of(node)[2:]])
    end.replace_all_uses_with(writer.permuted(Operand(node, attention.order)))


def normalise_attention(compilation: Compilation) -> None:
    """Run the pass on the traced graph.

    The report gets a match for each rewritten attention and a reason for each softmax that was left alone.
    """
    graph_module, report = compilation.edit, compilation.report
    for softmax in list(graph_module.graph.nodes):
        if softmax.target not in SOFTMAXES:
            continue
        try:
            attention = _match(softmax)
        except Unmatched as reason:
            report.miss(NAME, softmax, str(reason))
            continue
        _rewrite(attention)
        report.match(NAME)
    eliminate_dead_code(graph_module.graph)
    graph_module.recompile()
