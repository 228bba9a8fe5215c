"""Bring a traced graph into the few forms the other passes match.

Why: tracing leaves copies that mean nothing in a functional graph, and several spellings of one operation.

Before: ``c = lift_fresh_copy(get_attr)``, ``d = dropout(x, 0.1, False)``, ``e = to.dtype(x, x.dtype)``,
        ``f = type_as(x, y)``, ``g = expand(x, x.shape)``, ``h = swish-like aliases``
After:  ``c = get_attr``, ``d = x``, ``e = x``, ``f = to.dtype(x, y.dtype)``, ``g = x``

Conditions:
1. A copy (clone, contiguous, lift_fresh_copy) is dropped unless it is a graph output: the graph is functional, so
   nobody can tell, but a caller may write into an output. A clone to another memory format is dropped as well; strides
   are not part of a value.
2. dropout is dropped when it is not training or its probability is 0.
3. A cast to the dtype and device the value already has is dropped, also an expand to the same shape.
4. Nothing that stands between a graph input and an output (also detach and alias) is dropped.
"""

from __future__ import annotations

import torch
from torch import fx

from fisedit_compile.passes.report import Report
from fisedit_compile.passes.targets import NO_OPERATION, aten

NAME = "canonicalize"
DROPOUTS = (aten.dropout.default, aten.feature_dropout.default)
#: Operators that are called for a result of its own memory.
COPIES = {aten.clone.default, aten.contiguous.default, aten.lift_fresh_copy.default, aten._to_copy.default}


def _replacement(node: fx.Node) -> fx.Node | str | None:
    """The input that can stand for the node, a reason why not, or None when no rule looks at it."""
    target = node.target
    if target in DROPOUTS:
        probability, training = node.args[1], node.args[2]
        if training and probability != 0:
            return "dropout in training mode is random"
    elif target in (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default, aten.expand.default):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        before, after = source.meta.get("val"), node.meta.get("val")
        if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
            return "no tensor value is known"
        if (before.dtype, before.device, before.shape) != (after.dtype, after.device, after.shape):
            return "it changes the dtype, device or shape"
    elif target not in NO_OPERATION:
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if any(user.op == "output" for user in node.users):
        if target in COPIES:
            return "it makes an output that shares no memory"
        if source.op == "placeholder":
            return "it copies a graph input into an output"
    return source


def canonicalize(graph_module: fx.GraphModule, report: Report) -> fx.GraphModule:
    """Run the pass in place and return the module."""
    graph = graph_module.graph
    # From the end, so that the copy behind several others is the one that is kept for an output.
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function":
            continue
        if node.target is aten.type_as.default:
            source, like = node.args
            assert isinstance(like, fx.Node)
            with graph.inserting_before(node):
                cast = graph.call_function(aten.to.dtype, (source, like.meta["val"].dtype))
            cast.meta.update(node.meta)
            node.replace_all_uses_with(cast)
            graph.erase_node(node)
            node = cast
        found = _replacement(node)
        if isinstance(found, fx.Node):
            node.replace_all_uses_with(found)
            graph.erase_node(node)
            report.match(NAME)
        elif isinstance(found, str) and node.target in DROPOUTS:
            report.miss(NAME, node, found)
    graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module
