"""Bring a traced graph to the few spellings that the other passes match.

Why: tracing leaves copies that mean nothing in a functional graph, and several spellings of one operation.

Before: ``c = lift_fresh_copy(get_attr)``, ``d = dropout(x, 0.1, False)``, ``e = to.dtype(x, x.dtype)``,
        ``f = type_as(x, y)``, ``j = copy(x, y)``, ``g = expand(x, x.shape)``, ``h = einsum("abc->cab", [x])``,
        ``i = getitem(_native_batch_norm_legit_no_training(x, w, b, mean, variance, momentum, eps), 0)``,
        ``k = new_zeros(x, [3, 3])``
After:  ``c = get_attr``, ``d = x``, ``e = x``, ``f = to.dtype(x, y.dtype)``, ``j = y``, ``g = x``,
        ``h = permute(x, [2, 0, 1])``,
        ``i = batch_norm(x, w, b, mean, variance, False, momentum, eps, False)``,
        ``k = full([3, 3], 0, dtype=x.dtype, device=x.device)`` (which reads no map)

Conditions:
1. A copy (clone, contiguous, lift_fresh_copy) is dropped unless it is a graph output: the graph is functional, so
   nobody can tell, but a caller may write into an output. A clone to another memory format is dropped as well; strides
   are not part of a value.
2. dropout is dropped when it is not training or its probability is 0.
3. A cast to the dtype and device the value already has is dropped, also an expand to the same shape, a slice that
   takes everything, and a copy over a value of the same dtype, device and shape (what ``x[...] = y`` becomes).
4. Nothing that stands between a graph input and an output (also detach and alias) is dropped.
5. An einsum of one operand that keeps each of its dimensions is a permutation.
6. Of a batch norm nothing but the result is read.
7. A new tensor is filled with one number.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fisedit_compile.passes.common.arguments import read_arguments
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.meta import VALUE
from fisedit_compile.passes.common.targets import NO_OPERATION, aten

NAME = "canonicalize"
#: Operators that do nothing where dtype, device and shape stay the same.
IDLE_IN_SHAPE = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default, aten.expand.default,
                 aten.slice.Tensor, aten.copy.default}  # fmt: skip
DROPOUTS = (aten.dropout.default, aten.feature_dropout.default)
BATCH_NORM = aten._native_batch_norm_legit_no_training.default
#: Operators that take nothing but dtype and device from a value, and the number with which they fill a new one.
NEW = {aten.new_zeros.default: 0, aten.new_ones.default: 1, aten.new_full.default: None}
#: Operators that are called for a result of its own memory.
COPIES = {aten.clone.default, aten.contiguous.default, aten.lift_fresh_copy.default, aten._to_copy.default,
          aten.copy.default}  # fmt: skip


def idle_source(node: fx.Node) -> fx.Node | str | None:
    """The input whose value is the node's, a reason why it is not, or None where the operator is none that may have
    one. Which of these operators a trace has depends on how its inputs lie in memory."""
    target = node.target
    source = node.args[1 if target is aten.copy.default else 0] if node.args else None
    if target in DROPOUTS:
        probability, training = node.args[1], node.args[2]
        if training and probability != 0:
            return "dropout in training mode is random"
    elif target in IDLE_IN_SHAPE:
        assert isinstance(source, fx.Node)
        before, after = source.meta.get(VALUE), node.meta.get(VALUE)
        if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
            return "no tensor value is known"
        if (before.dtype, before.device, before.shape) != (after.dtype, after.device, after.shape):
            return "it changes the dtype, device or shape"
    elif target not in NO_OPERATION:
        return None
    assert isinstance(source, fx.Node)
    return source


def _replacement(node: fx.Node) -> fx.Node | str | None:
    """The input that can stand for the node, a reason why not, or None when no rule looks at it."""
    target, source = node.target, idle_source(node)
    if not isinstance(source, fx.Node):
        return source
    if any(user.op == "output" for user in node.users):
        if target in COPIES:
            return "it makes an output that shares no memory"
        if source.op == "placeholder":
            return "it copies a graph input into an output"
    return source


def _as_permutation(node: fx.Node) -> list[int] | None:
    """Which dimension of its one operand each dimension of an einsum is, when it does nothing else."""
    equation, operands = node.args[0], node.args[1]
    assert isinstance(equation, str) and isinstance(operands, (list, tuple))
    before, arrow, after = equation.replace(" ", "").partition("->")
    if len(operands) != 1 or not arrow or "." in equation or len(set(before)) != len(before):
        return None
    return [before.index(letter) for letter in after] if sorted(before) == sorted(after) else None


def _spelling(node: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    """Another operator that does the same, with its arguments, or None when the node stays as it is."""
    if node.target is aten.type_as.default:
        source, like = node.args
        assert isinstance(like, fx.Node)
        return aten.to.dtype, (source, like.meta[VALUE].dtype), {}
    if node.target is aten.einsum.default:
        order = _as_permutation(node)
        return None if order is None else (aten.permute.default, (node.args[1][0], order), {})  # type: ignore[index]
    if node.target in NEW:
        given, value = read_arguments(node), node.meta[VALUE]
        number = NEW[node.target] if "fill_value" not in given else given["fill_value"]
        return aten.full.default, (given["size"], number), {"dtype": value.dtype, "device": value.device}
    norm = node.args[0] if node.target is operator.getitem and node.args[1] == 0 else None
    if isinstance(norm, fx.Node) and norm.target is BATCH_NORM and len(norm.users) == 1:
        *operands, momentum, epsilon = norm.args
        return aten.batch_norm.default, (*operands, False, momentum, epsilon, False), {}
    return None


def _respelled(node: fx.Node) -> fx.Node:
    """The node that stands for this one from now on."""
    found = _spelling(node)
    if found is None:
        return node
    with node.graph.inserting_before(node):
        other = node.graph.call_function(*found)
    other.meta.update(node.meta)
    node.replace_all_uses_with(other)
    node.graph.erase_node(node)
    return other


def canonicalize(compilation: Compilation) -> None:
    """Run the pass on the traced graph."""
    graph_module, report = compilation.edit, compilation.report
    graph = graph_module.graph
    # From the end, so that the copy behind several others is the one that is kept for an output.
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function":
            continue
        node = _respelled(node)
        found = _replacement(node)
        if isinstance(found, fx.Node):
            node.replace_all_uses_with(found)
            graph.erase_node(node)
            report.match(NAME)
        elif isinstance(found, str) and node.target in DROPOUTS:
            report.miss(NAME, node, found)
    graph.eliminate_dead_code()
    graph_module.recompile()
