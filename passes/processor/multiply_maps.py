"""Let recorded and dense calls multiply whole maps with the packed weights that edits use.

Why: linear layers take half of a recorded call of a U-Net where PyTorch's products are slow, and packed weights, which
are multiplied faster there, exist anyway.

Before: record: ``y = linear(x, w, b)``
After:  record: ``y = linear_map(x, w, packed w, b)``, which takes the faster of both products. Packed weights are
        further inputs of the graph, outputs of the prologue.

Conditions:
1. The edit graph has the packed weight (see ``pack_weights``), which is one of the graph's inputs.
2. Map, weight and result have the same dtype: under autocast they have not.
"""

from __future__ import annotations

import torch
from torch import fx

from fisedit_compile.passes.common.arguments import read_arguments
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.ir import RowsBuilder
from fisedit_compile.passes.common.meta import HOISTED, VALUE
from fisedit_compile.passes.common.targets import aten

NAME = "multiply_maps"


def packed_weights(edit: fx.Graph) -> dict[str, int]:
    """Outputs of the prologue that hold the packed weight, by the name of the weight."""
    return {
        node.args[0].name: node.meta[HOISTED]
        for node in edit.nodes
        if node.target is torch.ops.fisedit.pack_matrix.default
        and node.args[0].op == "placeholder"
        and HOISTED in node.meta
    }


def multiply_maps(compilation: Compilation) -> None:
    """Run the pass on the record graph, which has its stores, behind ``hoist_parameters`` on the edit graph.

    What the record graph takes as further inputs joins ``dense_inputs``.
    """
    record, report = compilation.module("record"), compilation.report
    graph = record.graph
    weights = packed_weights(compilation.edit.graph)
    inputs: dict[int, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target is not aten.linear.default:
            continue
        given = read_arguments(node)
        x, weight = given["input"], given["weight"]
        number = weights.get(weight.name)
        if number is None:
            continue
        if len({value.meta[VALUE].dtype for value in (x, weight, node)}) > 1:
            report.miss(NAME, node, "map, weight and result have different dtypes")
            continue
        if number not in inputs:
            last = [placeholder for placeholder in graph.nodes if placeholder.op == "placeholder"][-1]
            with graph.inserting_after(last):
                inputs[number] = graph.placeholder(f"hoisted_{number}")
        target = torch.ops.fisedit.linear_map.default
        result = RowsBuilder(node).call(target, x, weight, inputs[number], given["bias"])
        result.meta.update(node.meta)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
        report.match(NAME)
    record.recompile()
    compilation.dense_inputs += tuple(inputs)
