"""What was measured on this machine of the operators that a network has: which way each one takes, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fisedit_compile.operators.attention.aten import MEASURED as ATTENTION
from fisedit_compile.operators.attention.aten import MOST_KEYS, describe_heads
from fisedit_compile.operators.choosing import Times, costs, describe_count
from fisedit_compile.operators.convolution import maps
from fisedit_compile.operators.convolution.choice import describe_shape
from fisedit_compile.operators.products import aten as packed
from fisedit_compile.passes.common.meta import VALUE
from fisedit_compile.passes.common.program import Program, SparseProgram
from fisedit_compile.passes.common.targets import aten
from fisedit_compile.passes.processor.pack_weights import REORDERINGS

fisedit = torch.ops.fisedit


def _calls(graph_module: fx.GraphModule | None, *targets: object) -> Iterator[fx.Node]:
    """Nodes of a graph that call one of the operators."""
    for node in graph_module.graph.nodes if graph_module is not None else ():
        if node.target in targets:
            yield node


def _value(node: object) -> Tensor:
    assert isinstance(node, fx.Node)
    value: Tensor = node.meta[VALUE]
    return value


def _describe_packing(node: fx.Node) -> str | None:
    """The product that was measured when a weight was packed, in words; None where nothing was."""
    weight, *rows = node.args
    if not rows or not isinstance(rows[0], int):
        return None
    transposed = False
    while isinstance(weight, fx.Node) and weight.target in REORDERINGS:
        transposed = transposed or (weight.target is fisedit.pack_conv_weight.default and bool(weight.args[1]))
        weight = weight.args[0]
    value = _value(weight)
    if node.target is fisedit.pack_tile_weights.default:
        value = value[..., 0, 0]
    outputs = value.shape[1 if transposed else 0]
    return packed.describe_product(rows[0], value.numel() // outputs, outputs, value.dtype)


def measured_convolutions(programs: Sequence[Program]) -> dict[str, Times]:
    """Seconds of each way to compute 3x3 convolutions, by case: on rows by edits, on whole maps by recorded and dense
    calls."""
    shapes, whole = set(), {}
    for program in programs:
        for node in _calls(program.record, fisedit.conv_map.default):
            weight, channels_last = _value(node.args[2]), bool(node.args[5])
            case = maps.describe_map(weight.shape[1], weight.shape[0], channels_last, weight.dtype)
            whole[f"{maps.MEASURED} {case}"] = f"whole map, {case}"
        if not isinstance(program, SparseProgram):
            continue
        for node in _calls(program.edit, fisedit.conv_choice.default):
            arguments: tuple[Any, ...] = node.args
            given, height, width = arguments[-3:]
            weight = _value(given)
            size = program.batch, height, width
            shapes.add(describe_shape(*size, weight.shape[1], weight.shape[0], weight.dtype))
    entries = costs.entries()
    known = {key.removeprefix("convolution "): times for key, times in entries.items()}
    found = {case: times for case, times in known.items() if case.partition(",")[0] in shapes}
    return found | {whole[key]: times for key, times in entries.items() if key in whole}


def measured_products(programs: Sequence[Program]) -> dict[str, Times]:
    """Seconds of products with weights as they are and packed, by case: of few rows when weights are packed for edits,
    of whole maps in recorded and dense calls."""
    wanted = {}
    for program in programs:
        prologue = program.prologue if isinstance(program, SparseProgram) else None
        for node in _calls(prologue, fisedit.pack_matrix.default, fisedit.pack_tile_weights.default):
            case = _describe_packing(node)
            if case is not None:
                wanted[f"product {case}"] = case
        for node in _calls(program.record, fisedit.linear_map.default):
            given, weight = _value(node.args[0]), _value(node.args[1])
            rows_of_map = min(given.numel() // max(given.shape[-1], 1), packed.MOST_ROWS)
            product = packed.describe_product(rows_of_map, weight.shape[1], weight.shape[0], weight.dtype)
            wanted[f"{packed.MEASURED} {product}"] = f"whole map, {product}"
    return {wanted[key]: times for key, times in costs.entries().items() if key in wanted}


def measured_attention(programs: Sequence[Program]) -> dict[str, Times]:
    """Seconds of each way to compute attention, by case, whatever the number of queries."""
    wanted = set()
    for program in programs:
        for node in _calls(program.record, aten.scaled_dot_product_attention.default):
            query, key, value = (_value(given) for given in node.args[:3])
            if query.dim() == 3:  # one head
                query, key, value = query[:, None], key[:, None], value[:, None]
            if query.dim() == 4:
                wanted.add((describe_heads(query, key, value), min(key.shape[2], MOST_KEYS)))
    ends = {(heads, f"{describe_count(keys)} keys") for heads, keys in wanted}
    found = {}
    for entry, times in costs.entries().items():
        operator, _, case = entry.partition(" ")
        heads, _, counts = case.partition(", ")
        if operator == ATTENTION and (heads, counts.rpartition(", ")[2]) in ends:
            found[case] = times
    return found
