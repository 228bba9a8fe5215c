"""Attention with row queries.

Why: only active positions need their output. Keys and values of unchanged positions are the recorded ones, so a
self-attention costs active queries times all keys (the approximation of FISEdit section 4.3). In cross-attention keys
and values come from the prompt and are computed afresh.

Before: ``y = scaled_dot_product_attention(q, k, v, mask)``
After:  self:  ``y = to_map(attention_rows(q rows, k rows, v rows, recorded k, recorded v, index, valid, scale))``
        cross: ``y = to_map(transpose(scaled_dot_product_attention(transpose(q rows), k, v, mask)))``

Conditions:
1. The query is spatial with dimensions (batch, heads, space, channel) or (batch, space, channel).
2. Key and value are both spatial, at one resolution and with the query's dimensions, or both not spatial.
3. Self-attention has no mask; a cross-attention mask is the same for every query.
4. There is no dropout, the attention is not causal, and keys have as many heads as queries.
"""

from __future__ import annotations

import torch
from torch import fx

from fisedit_compile.passes.arguments import read_arguments
from fisedit_compile.passes.family import Family, Inferred, rewrite_family
from fisedit_compile.passes.ir import RowsBuilder, shape_of, spatial_of
from fisedit_compile.passes.layouts import BATCH, CHANNEL, SPACE
from fisedit_compile.passes.report import Report
from fisedit_compile.passes.targets import aten

NAME = "sparsify_attention"
HEADS = (BATCH, CHANNEL, SPACE, CHANNEL)
SINGLE = (BATCH, SPACE, CHANNEL)


def infer(node: fx.Node) -> Inferred:
    """The layout of the query."""
    given = read_arguments(node)
    query, key, value = (spatial_of(given[name]) for name in ("query", "key", "value"))
    if query is None or query.dims not in (HEADS, SINGLE):
        return "the query is not a spatial value with dimensions (batch, heads, space, channel)"
    if given["dropout_p"] or given["is_causal"] or given.get("enable_gqa"):
        return "it has dropout, is causal or groups its queries"
    if (key is None) != (value is None):
        return "only one of key and value is a spatial value"
    mask = given["attn_mask"]
    if key is not None:
        assert value is not None
        if key.dims != query.dims or value.dims != query.dims:
            return "key and value do not have the dimensions of the query"
        if key.domain != value.domain:
            return "key and value lie on different resolutions"
        if mask is not None:
            return "a self-attention with a mask"
        if len(query.dims) == 4 and shape_of(given["key"])[1] != shape_of(given["query"])[1]:
            return "keys have another number of heads"
    if mask is not None:
        if spatial_of(mask) is not None:
            return "the mask is a spatial value"
        mask_shape = shape_of(mask)
        if len(mask_shape) >= 2 and mask_shape[-2] != 1:
            return "the mask differs from query to query"
    return query


def rewrite(node: fx.Node, builder: RowsBuilder) -> str | None:
    """Replace the node by attention over row queries."""
    given = read_arguments(node)
    query, key, value = given["query"], given["key"], given["value"]
    spatial = spatial_of(query)
    key_spatial = spatial_of(key)
    assert spatial is not None
    single = spatial.dims == SINGLE

    def with_heads(rows: fx.Node) -> fx.Node:
        return builder.call(aten.unsqueeze.default, rows, 2) if single else rows  # [B, N, heads, D]

    query_rows = with_heads(builder.rows(query))
    if key_spatial is not None:
        key_rows, value_rows = builder.rows(key), builder.rows(value)
        recorded = [builder.recorded_rows(key, key_rows), builder.recorded_rows(value, value_rows)]
        output = builder.call(
            torch.ops.fisedit.attention_rows.default,
            query_rows,
            with_heads(key_rows),
            with_heads(value_rows),
            *(with_heads(item) for item in recorded),
            builder.plan("index", key_spatial.domain),
            builder.plan("valid", key_spatial.domain),
            given["scale"],
        )
        output = builder.call(aten.squeeze.dim, output, 2) if single else output
    else:
        rows = builder.rows(query)
        if not single:
            rows = builder.call(aten.transpose.int, rows, 1, 2)  # [B, heads, N, D]
        output = builder.call(
            aten.scaled_dot_product_attention.default, rows, key, value, given["attn_mask"], scale=given["scale"]
        )
        if not single:
            output = builder.call(aten.transpose.int, output, 1, 2)  # [B, N, heads, D]
    builder.replace(output)
    return None


FAMILY = Family(NAME, {aten.scaled_dot_product_attention.default}.__contains__, infer, rewrite)


def sparsify_attention(graph_module: fx.GraphModule, report: Report) -> fx.GraphModule:
    """Run the pass in place and return the module."""
    return rewrite_family(FAMILY, graph_module, report)
