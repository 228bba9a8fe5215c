"""Compute what depends on parameters only once, not at every call.

Why: packing a convolution's weight costs as much as a sparse convolution itself; it changes only when the weight does.

Before: ``p = pack_conv_weight(w)`` inside the edit graph
After:  ``p`` is output ``i`` of a prologue graph whose result the executable keeps; the edit graph reads ``hoisted:i``

Conditions:
1. All inputs are parameters, constants or hoisted values, and the node has at least one such input. Of an operator with
   several outputs the pieces are hoisted, as graph inputs are tensors.
2. The operator is deterministic.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.deferred import DeferredModule
from fisedit_compile.passes.common.meta import HOISTED
from fisedit_compile.passes.common.program import InputInfo
from fisedit_compile.passes.common.targets import OVERLOAD

NAME = "hoist_parameters"


def is_repeatable(node: fx.Node) -> bool:
    """Whether the node is an operator with inputs that gives the same result for the same inputs."""
    if node.op != "call_function" or not (isinstance(node.target, OVERLOAD) or node.target is operator.getitem):
        return False
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return bool(node.all_input_nodes) and not random


def constant_nodes(graph: fx.Graph, infos: Sequence[InputInfo]) -> set[fx.Node]:
    """Nodes whose value depends on parameters and constants only, these included."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    constant = {node for node, info in zip(placeholders, infos, strict=True) if info.kind == "parameter"}
    for node in graph.nodes:
        if node.op == "get_attr":
            constant.add(node)
        elif is_repeatable(node) and all(value in constant for value in node.all_input_nodes):
            constant.add(node)
    return constant


def hoist_parameters(compilation: Compilation) -> None:
    """Run the pass: marks hoisted nodes of the edit graph with ``meta["hoisted"]``, and makes the prologue, if any."""
    graph = compilation.edit.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    constant = constant_nodes(graph, compilation.inputs)
    computed = [node for node in graph.nodes if node in constant and node.op == "call_function"]
    results = [node for node in computed if any(user not in constant for user in node.users)]
    if not results:
        return
    prologue = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in placeholders:
        copies[node] = prologue.node_copy(node)
    for node in graph.nodes:
        if node in constant and node.op != "placeholder":
            copies[node] = prologue.node_copy(node, lambda value: copies[value])
    prologue.output(tuple(copies[node] for node in results))
    prologue.eliminate_dead_code()
    for number, node in enumerate(results):
        node.meta[HOISTED] = number
        compilation.report.match(NAME)
    root: Any = compilation.edit
    compilation.prologue = DeferredModule(root, prologue, "Prologue")
