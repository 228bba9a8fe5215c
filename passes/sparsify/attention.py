"""Attention with row queries.

Why: only active positions need their output. Keys and values of unchanged positions are the recorded ones, so a
self-attention costs active queries times all keys (the approximation of FISEdit section 4.3). In cross-attention keys
and values come from the prompt and are computed afresh.

Where each position has tokens of its own (those of a window, see unfold_windows.py), attention stays within a position.

Before: ``y = scaled_dot_product_attention(q, k, v, mask)``
After:  self:   ``y = to_map(attention_rows(q rows, k rows, v rows, recorded k, recorded v, index, valid, scale))``
        masked: ``y = to_map(transpose(scaled_dot_product_attention(transpose(q rows), k map, v map, mask rows)))``
        cross:  ``y = to_map(transpose(scaled_dot_product_attention(transpose(q rows), k, v, mask rows)))``
        within: ``y = to_map(scaled_dot_product_attention(q rows, k rows, v rows, mask rows))``
where the ``k map`` is the recorded one with the rows written in, and ``mask rows`` are what a mask says of the active
queries, if it differs from query to query.

Conditions:
1. The query is spatial with dimensions (batch, heads, space, channel) or (batch, space, channel), or its last two
   dimensions are channels.
2. Key and value are both spatial, at one resolution and with the query's dimensions, or both not spatial. Within a
   position all three are, at one resolution.
3. A mask is not spatial and has no more dimensions than the query.
4. There is no dropout, the attention is not causal, and keys have as many heads as queries.
"""

from __future__ import annotations

import torch
from torch import fx

from fisedit_compile.passes.common.arguments import read_arguments
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.family import Family, Inferred, rewrite_nodes
from fisedit_compile.passes.common.ir import RowsBuilder, shape_of, spatial_of
from fisedit_compile.passes.common.layouts import Spatial
from fisedit_compile.passes.common.reading.attentions import HEADS, SINGLE, is_within
from fisedit_compile.passes.common.targets import ATTENTIONS, aten

NAME = "sparsify_attention"


def infer(node: fx.Node) -> Inferred:
    """The layout of the query."""
    given = read_arguments(node)
    query, key, value = (spatial_of(given[name]) for name in ("query", "key", "value"))
    within = is_within(node)
    if query is None or (query.dims not in (HEADS, SINGLE) and not within):
        return "the query is not a spatial value with dimensions (batch, heads, space, channel)"
    if given["dropout_p"] or given["is_causal"] or given.get("enable_gqa"):
        return "it has dropout, is causal or groups its queries"
    if (key is None) != (value is None):
        return "only one of key and value is a spatial value"
    if key is None and within:
        return "keys and values of all positions are the same"
    if key is not None:
        assert value is not None
        if key.dims != query.dims or value.dims != query.dims:
            return "key and value do not have the dimensions of the query"
        if key.domain != value.domain or (within and key.domain != query.domain):
            return "key and value lie on different resolutions"
        if len(query.dims) == 4 and not within and shape_of(given["key"])[1] != shape_of(given["query"])[1]:
            return "keys have another number of heads"
    mask = given["attn_mask"]
    if mask is not None:
        if spatial_of(mask) is not None:
            return "the mask is a spatial value"
        if len(shape_of(mask)) > len(query.dims):
            return "the mask has more dimensions than the query"
    return query


def _mask_rows(node: fx.Node, builder: RowsBuilder) -> fx.Node | None:
    """What the mask says of the active queries ``[b, 1 or N, *C, keys]``; it need not have heads."""
    given = read_arguments(node)
    mask, spatial = given["attn_mask"], spatial_of(given["query"])
    assert spatial is not None
    if mask is None:
        return None
    rows = builder.dense_rows(mask, spatial, (*shape_of(given["query"])[:-1], shape_of(given["key"])[-2]))
    assert isinstance(rows, fx.Node)
    return rows


def _attend_within(node: fx.Node, builder: RowsBuilder) -> None:
    """Attention of the tokens of each active position, samples and positions as one batch where there are heads."""
    given = read_arguments(node)
    rows = [builder.rows(given[name]) for name in ("query", "key", "value")]  # [B, N, *heads, tokens, D]
    mask = _mask_rows(node, builder)
    spatial = spatial_of(given["query"])
    assert spatial is not None
    batch, *channels = (shape_of(node)[dim] for dim in (spatial.batch_dim, *spatial.channel_dims))
    # A mask for each sample, but not for each position, would have to be repeated.
    sizes = [1, 1] if mask is None else _sizes(given["attn_mask"], spatial)
    folded = len(channels) == 3 and (sizes[0] == 1 or max(sizes[1:]) > 1)
    if folded:
        rows = [builder.call(aten.flatten.using_ints, value, 0, 1) for value in rows]
        mask = mask if mask is None else builder.call(aten.flatten.using_ints, mask, 0, 1)
    output = builder.call(node.target, *rows, mask, scale=given["scale"])
    builder.replace(builder.call(aten.reshape.default, output, [batch, -1, *channels]) if folded else output)


def _sizes(mask: fx.Node, spatial: Spatial) -> list[int]:
    """How many samples and positions a mask tells apart."""
    shape = (1,) * (len(spatial.dims) - len(shape_of(mask))) + shape_of(mask)
    return [shape[spatial.batch_dim], *(shape[dim] for dim in spatial.space_dims)]


def _attend_with_mask(node: fx.Node, builder: RowsBuilder) -> None:
    """Attention of the active queries to all positions, or to what is not spatial."""
    given = read_arguments(node)
    spatial, key_spatial, mask = spatial_of(given["query"]), spatial_of(given["key"]), given["attn_mask"]
    assert spatial is not None
    single = spatial.dims == SINGLE

    def with_heads_first(rows: fx.Node) -> fx.Node:
        return rows if single else builder.call(aten.transpose.int, rows, 1, 2)  # [B, heads, N, D]

    operands = [with_heads_first(builder.rows(given["query"]))]
    for operand in (given["key"], given["value"]):
        if key_spatial is not None:
            rows = builder.rows(operand)
            index, valid = (builder.plan(kind, key_spatial.domain) for kind in ("index", "valid"))
            whole = builder.call(
                torch.ops.fisedit.scatter_rows.default, builder.recorded_rows(operand, rows), rows, index, valid
            )
            operand = with_heads_first(whole)
        operands.append(operand)
    if mask is not None and shape_of(mask)[-2:-1] not in ((), (1,)):
        differing = _mask_rows(node, builder)
        assert differing is not None
        mask = with_heads_first(differing)
    output = builder.call(node.target, *operands, mask, scale=given["scale"])
    builder.replace(with_heads_first(output))


def rewrite(node: fx.Node, builder: RowsBuilder) -> str | None:
    """Replace the node by attention over row queries."""
    given = read_arguments(node)
    query, key, value = given["query"], given["key"], given["value"]
    spatial, key_spatial = spatial_of(query), spatial_of(key)
    assert spatial is not None
    if is_within(node):
        _attend_within(node, builder)
        return None
    if key_spatial is None or given["attn_mask"] is not None:
        _attend_with_mask(node, builder)
        return None
    single = spatial.dims == SINGLE

    def with_heads(rows: fx.Node) -> fx.Node:
        return builder.call(aten.unsqueeze.default, rows, 2) if single else rows  # [B, N, heads, D]

    query_rows = with_heads(builder.rows(query))
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
    builder.replace(builder.call(aten.squeeze.dim, output, 2) if single else output)
    return None


FAMILY = Family(NAME, ATTENTIONS.__contains__, infer, rewrite)


def sparsify_attention(compilation: Compilation) -> None:
    """Run the pass on the edit graph."""
    rewrite_nodes(FAMILY, compilation.edit.graph, compilation.report)
