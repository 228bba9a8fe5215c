"""Bring the weights of matrix products to the order that the processor's library multiplies fastest.

Why: a product with few rows spends much of its time on bringing the weight into that order, again at every call. Packed
once, the weight serves all calls until it changes. Measured, products of float32 rows take half the time and less.

Before: ``y = linear(rows, w, b)``
After:  ``y = linear_rows(rows, pack_matrix(w, n), b)``
Before: ``y = conv_rows(..., pack_conv_weight(w), b, 1)``
After:  ``y = conv_rows(..., pack_matrix(pack_conv_weight(w), n), b, 1)``
``hoist_parameters`` moves ``pack_matrix`` to the prologue. There products of ``n`` rows, as many as edits are likely to
have, are measured with and without packing; without ``n`` the weight is packed in any case.

Conditions:
1. The weight depends on parameters only, has two dimensions and at least one element.
2. It is of a dtype for which there is an order. (Products on other devices are passed over; that is no miss.)
3. Autocast is off: under autocast the product is computed in another dtype than the weight's.
4. A convolution has one group.
5. With it, packed weights take no more bytes than allowed.
"""

from __future__ import annotations

import torch
from torch import fx

from fisedit_compile.operators.products.aten import TYPICAL_ROWS, packs
from fisedit_compile.passes.caching.hoist_parameters import constant_nodes
from fisedit_compile.passes.common.arguments import read_arguments
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.ir import copy_provenance, likely_rows
from fisedit_compile.passes.common.meta import LIKELY_ROWS, PLAN_INPUT, VALUE
from fisedit_compile.passes.common.targets import aten

NAME = "pack_weights"
CONV_ROWS, CONV_CHOICE = torch.ops.fisedit.conv_rows.default, torch.ops.fisedit.conv_choice.default
LINEAR_ROWS = torch.ops.fisedit.linear_rows.default
REORDERINGS = (torch.ops.fisedit.pack_conv_weight.default, aten.reshape.default)
#: Which argument is the weight.
PRODUCTS = {aten.linear.default: 1, CONV_ROWS: 4, CONV_CHOICE: 4}


def _weight_value(weight: fx.Node) -> torch.Tensor | None:
    """The tensor that the weight is, or is a reordering of; None when it was computed in another way."""
    source = weight
    while source.target in REORDERINGS and isinstance(source.args[0], fx.Node):
        source = source.args[0]
    value = source.meta.get(VALUE)
    return value if isinstance(value, torch.Tensor) else None


def refusal(node: fx.Node, weight: fx.Node, constant: set[fx.Node]) -> str | None:
    """Why the weight of a product cannot be packed; None when it can."""
    if weight not in constant:
        return "the weight depends on the inputs"
    value = _weight_value(weight)
    if value is None:
        return "the weight is computed from parameters"
    if weight.target not in REORDERINGS and value.dim() != 2:
        return "the weight is not a matrix"
    if value.numel() == 0:
        return "the weight has no elements"
    if not packs(value.device.type, value.dtype):
        return f"no order is known for {str(value.dtype).removeprefix('torch.')}"
    if torch.is_autocast_enabled(value.device.type):
        return "autocast is on"
    if node.target is CONV_ROWS and node.args[6] != 1:
        return "a convolution with groups"
    return None


def rows_of_product(node: fx.Node) -> int:
    """How many rows a product is likely to have."""
    if node.target in (CONV_ROWS, CONV_CHOICE):
        table = node.args[3]
        assert isinstance(table, fx.Node)
        specification = table.meta.get(PLAN_INPUT)
        # One product for each sample.
        return TYPICAL_ROWS if specification is None else likely_rows(specification.of.target)
    rows = node.args[0]
    assert isinstance(rows, fx.Node)
    value = rows.meta.get(VALUE)
    exactly = value.numel() // max(value.shape[-1], 1) if isinstance(value, torch.Tensor) else TYPICAL_ROWS
    return int(node.meta.get(LIKELY_ROWS, max(exactly, 1)))


def pack_weights(compilation: Compilation) -> None:
    """Run the pass on the edit graph, whose conversions are lowered.

    The option ``packing`` is the most bytes that copies of weights may take, those of other passes included; without
    ``pack_all`` weights are packed only where products are then measured to be faster. The report counts what was
    packed, and its bytes in ``packed_bytes``.
    """
    graph_module, options, report = compilation.edit, compilation.options, compilation.report
    limit = options.packing
    graph = graph_module.graph
    constant = constant_nodes(graph, compilation.inputs)
    packed: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target not in PRODUCTS:
            continue
        at = PRODUCTS[node.target]
        weight = node.args[at]
        assert isinstance(weight, fx.Node)
        value = _weight_value(weight)
        if value is not None and value.device.type != "cpu":
            continue
        reason = refusal(node, weight, constant)
        if reason is None and value is not None and weight not in packed:
            if limit is not None and report.packed_bytes + value.nbytes > limit:
                reason = f"packed weights would take more than {limit} bytes"
            else:
                report.packed_bytes += value.nbytes
                with graph.inserting_after(weight):
                    arguments = (weight,) if options.pack_all else (weight, rows_of_product(node))
                    packed[weight] = graph.call_function(torch.ops.fisedit.pack_matrix.default, arguments)
                copy_provenance(node, packed[weight])
        if reason is not None:
            report.miss(NAME, node, reason)
            continue
        node.args = (*node.args[:at], packed[weight], *node.args[at + 1 :])
        if node.target is aten.linear.default:
            given = read_arguments(node)
            node.target, node.args, node.kwargs = LINEAR_ROWS, (given["input"], given["weight"], given["bias"]), {}
        report.match(NAME)
    graph_module.recompile()
