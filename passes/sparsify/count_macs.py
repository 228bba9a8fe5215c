"""Count the multiply-accumulates of a dense graph."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import fx

from fisedit_compile.passes.common.arguments import read_arguments
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.ir import origin_of, shape_of, spatial_of
from fisedit_compile.passes.common.report import MacCount, MacKind
from fisedit_compile.passes.common.targets import CONVOLUTIONS, aten

ENCODER_WEIGHTS = ("qkv_weight", "proj_weight", "ffn_weight_1", "ffn_weight_2")
PRODUCTS = {
    aten.matmul.default: 0,
    aten.bmm.default: 0,
    aten.mm.default: 0,
    aten.addmm.default: 1,
    aten.baddbmm.default: 1,
}


def macs_of(node: fx.Node) -> tuple[MacKind, int] | None:
    """Kind and multiply-accumulates of a node, or None when it has none worth counting."""
    if node.op != "call_function":
        return None
    if node.target in CONVOLUTIONS:
        given = read_arguments(node)
        weight = shape_of(given["weight"])
        transposed = given.get("transposed", node.target is aten.conv_transpose2d.input)
        return "convolution", math.prod(shape_of(given["input"] if transposed else node)) * math.prod(weight[1:])
    if node.target is aten.linear.default:
        return "linear", math.prod(shape_of(node)) * shape_of(node.args[0])[-1]  # type: ignore[arg-type]
    if node.target in PRODUCTS:
        return "product", math.prod(shape_of(node)) * shape_of(node.args[PRODUCTS[node.target]])[-1]  # type: ignore[arg-type]
    if node.target is aten.scaled_dot_product_attention.default:
        given = read_arguments(node)
        query, key, value = (shape_of(given[name]) for name in ("query", "key", "value"))
        return "attention", math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    if node.target is aten._transformer_encoder_layer_fwd.default:
        # What nn.TransformerEncoderLayer is in inference; its weights are those of four linear layers.
        given = read_arguments(node)
        samples, tokens, width = shape_of(given["src"])
        weights = sum(math.prod(shape_of(given[name])) for name in ENCODER_WEIGHTS)
        return "transformer layer", samples * tokens * (weights + 2 * tokens * width)
    if node.target is aten._native_multi_head_attention.default:
        given = read_arguments(node)
        (samples, queries, width), keys = shape_of(given["query"]), shape_of(given["key"])[1]
        # One linear layer for queries and one for results, two for keys.
        return "attention layer", 2 * samples * width * ((queries + keys) * width + queries * keys)
    return None


def counts(dense: fx.Graph, edit: fx.Graph) -> Iterator[MacCount]:
    """One count for each node of the dense graph; nodes still present in the edit graph run densely there."""
    left = {node.name for node in edit.nodes}
    for node in dense.nodes:
        if (counted := macs_of(node)) is not None:
            spatial = spatial_of(node)
            on_rows = spatial is not None and origin_of(node) not in left
            yield MacCount(origin_of(node), *counted, spatial.domain if on_rows and spatial else None)


def count_macs(compilation: Compilation) -> None:
    """Run the pass: the counts go to ``report.mac_counts``, no graph is changed."""
    dense, edit = compilation.module("record").graph, compilation.edit.graph
    compilation.report.mac_counts = list(counts(dense, edit))
