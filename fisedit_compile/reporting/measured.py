"""What was measured on this machine of the operators that a network has: how long each implementation takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fisedit_compile.operators.attention.spec import MEASURED as ATTENTION
from fisedit_compile.operators.attention.spec import AttentionCase
from fisedit_compile.operators.convolution import spec as convolution
from fisedit_compile.operators.convolution.spec import ConvolutionCase, MapCase
from fisedit_compile.operators.products import spec as products
from fisedit_compile.operators.products.spec import ProductCase
from fisedit_compile.operators.records import Times, costs, dtype_name
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


def _packed_product(node: fx.Node) -> ProductCase | None:
    """The product that was measured when a weight was packed; None where nothing was."""
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
    return ProductCase.of(rows[0], value.numel() // outputs, outputs, value.dtype)


def measured_convolutions(programs: Sequence[Program]) -> dict[str, Times]:
    """Seconds of each way to compute 3x3 convolutions, by case: on rows by edits, on whole maps by recorded and dense
    calls."""
    shapes, whole = set(), set()
    for program in programs:
        for node in _calls(program.record, fisedit.conv_map.default):
            weight, channels_last = _value(node.args[2]), bool(node.args[5])
            whole.add(MapCase.of(weight.shape[1], weight.shape[0], channels_last, weight.dtype))
        if not isinstance(program, SparseProgram):
            continue
        for node in _calls(program.edit, fisedit.conv_choice.default):
            arguments: tuple[Any, ...] = node.args
            given, height, width = arguments[-3:]
            weight = _value(given)
            outputs, inputs = weight.shape[:2]
            shapes.add((program.batch, height, width, inputs, outputs, dtype_name(weight.dtype)))
    rows = costs.entries(convolution.MEASURED, ConvolutionCase)
    maps = costs.entries(convolution.MEASURED_MAPS, MapCase)
    found = {str(case): times for case, times in rows.items() if case.shape in shapes}
    return found | {f"whole map, {case}": times for case, times in maps.items() if case in whole}


def measured_products(programs: Sequence[Program]) -> dict[str, Times]:
    """Seconds of products with weights as they are and packed, by case: of few rows when weights are packed for edits,
    of whole maps in recorded and dense calls."""
    few, whole = set(), set()
    for program in programs:
        prologue = program.prologue if isinstance(program, SparseProgram) else None
        for node in _calls(prologue, fisedit.pack_matrix.default, fisedit.pack_tile_weights.default):
            few.add(_packed_product(node))
        for node in _calls(program.record, fisedit.linear_map.default):
            given, weight = _value(node.args[0]), _value(node.args[1])
            rows_of_map = min(given.numel() // max(given.shape[-1], 1), products.MOST_ROWS)
            whole.add(ProductCase.of(rows_of_map, weight.shape[1], weight.shape[0], weight.dtype))
    packed = costs.entries(products.PACKED, ProductCase)
    maps = costs.entries(products.MEASURED, ProductCase)
    found = {str(case): times for case, times in packed.items() if case in few}
    return found | {f"whole map, {case}": times for case, times in maps.items() if case in whole}


def measured_attention(programs: Sequence[Program]) -> dict[str, Times]:
    """Seconds of each way to compute attention, by case, whatever the number of queries."""
    wanted = set()
    for program in programs:
        for node in _calls(program.record, aten.scaled_dot_product_attention.default):
            query, key, value = (_value(given) for given in node.args[:3])
            if query.dim() == 3:  # one head
                query, key, value = query[:, None], key[:, None], value[:, None]
            if query.dim() == 4:
                wanted.add(AttentionCase.of(query, key, value)._replace(queries=0))
    entries = costs.entries(ATTENTION, AttentionCase)
    return {str(case): times for case, times in entries.items() if case._replace(queries=0) in wanted}
