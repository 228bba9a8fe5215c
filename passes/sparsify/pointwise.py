"""Elementwise operators and reductions over channels, on rows.

Why: they touch one position at a time, so they run on the rows as they are; only operands that are not spatial need
their dimensions brought into the order of rows.

Before: ``y = add(x, t)`` with t of shape [B, C, 1, 1]   After: ``y = to_map(add(to_rows(x), reshape(t, [B, 1, C])))``
Before: ``y = mul(x, p)`` with p of shape [1, C, H, W]   After: ``y = to_map(mul(to_rows(x), gather_rows(p, index)))``
Before: ``y = softmax(x, 1)``                            After: ``y = to_map(softmax(to_rows(x), 2))``
Before: ``y = prelu(x, w)`` with w of shape [C]          After: ``y = to_map(where(gt(rows, 0), rows, mul(rows, w)))``

Conditions:
1. All spatial operands have the same resolution and the same dimensions as the output.
2. Any other operand broadcasts to the output without adding dimensions.
3. A reduction works on channel dimensions only.
4. A prelu with several weights has the channels in dimension 1, where it looks for them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fisedit_compile.passes.common.arguments import read_arguments
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.family import Family, Inferred, rewrite_nodes
from fisedit_compile.passes.common.ir import RowsBuilder, shape_of, spatial_of
from fisedit_compile.passes.common.layouts import CHANNEL, Spatial, check_dims
from fisedit_compile.passes.common.meta import VALUE
from fisedit_compile.passes.common.targets import REDUCTIONS, aten, is_elementwise
from fisedit_compile.private.operators import schema_of

NAME = "sparsify_pointwise"


def _infer_elementwise(node: fx.Node) -> Inferred:
    value = node.meta.get(VALUE)
    if not isinstance(value, torch.Tensor):
        return "it does not return one tensor"
    rank = len(shape_of(node))
    operands = [(item, spatial) for item in node.all_input_nodes if (spatial := spatial_of(item)) is not None]
    first = operands[0][1]
    for item, spatial in operands:
        if len(spatial.dims) != rank:
            return "operands of different rank broadcast against each other"
        if spatial != first:
            return "operands lie on different resolutions or have their dimensions in different order"
        if shape_of(item)[spatial.batch_dim] != shape_of(node)[spatial.batch_dim]:
            return "the batch is broadcast"
    if any(shape_of(node)[dim] != shape_of(operands[0][0])[dim] for dim in first.space_dims):
        return "the positions are broadcast"
    if _has_channel_weights(node) and first.channel_dims[:1] != (1,):
        return "the weights of a prelu do not belong to a channel dimension"
    return first


def _has_channel_weights(node: fx.Node) -> bool:
    """Whether the node is a prelu whose weights lie along dimension 1, unlike operands that broadcast."""
    return node.target is aten.prelu.default and math.prod(shape_of(node.args[1])) > 1  # type: ignore[arg-type]


def _rewrite_prelu(node: fx.Node, builder: RowsBuilder) -> str | None:
    x, weight = node.args
    spatial = spatial_of(node)
    assert isinstance(x, fx.Node) and spatial is not None
    rows = builder.rows(x)
    weight = builder.call(aten.reshape.default, weight, [-1] + [1] * (len(spatial.channel_dims) - 1))
    positive = builder.call(aten.gt.Scalar, rows, 0)
    builder.replace(builder.call(aten.where.self, positive, rows, builder.call(aten.mul.Tensor, rows, weight)))
    return None


def _reduced_dims(node: fx.Node, rank: int) -> list[int]:
    dims = read_arguments(node)["dim"]
    dims = [dims] if isinstance(dims, int) else list(dims or range(rank))
    return sorted(dim % rank for dim in dims)


def _infer_reduction(node: fx.Node) -> Inferred:
    spatial = spatial_of(node.args[0])
    if spatial is None:
        return "the first operand is not spatial"
    dims = _reduced_dims(node, len(spatial.dims))
    if any(spatial.dims[dim] != CHANNEL for dim in dims):
        return "it works across positions or samples"
    if not REDUCTIONS[node.target] or read_arguments(node).get("keepdim"):
        return spatial
    return check_dims(Spatial(spatial.domain, tuple(n for dim, n in enumerate(spatial.dims) if dim not in dims)))


def infer(node: fx.Node) -> Inferred:
    """The common layout of the spatial operands, less reduced dimensions."""
    return _infer_reduction(node) if node.target in REDUCTIONS else _infer_elementwise(node)


def _rewrite_elementwise(node: fx.Node, builder: RowsBuilder) -> str | None:
    spatial, sizes = spatial_of(node), shape_of(node)
    assert spatial is not None
    reasons: list[str] = []

    def convert(value: Any) -> Any:
        if not isinstance(value, fx.Node) or not isinstance(value.meta.get(VALUE), torch.Tensor):
            return value  # a number, which may be an input of the graph
        if spatial_of(value) is not None:
            return builder.rows(value)
        converted = builder.dense_rows(value, spatial, sizes)
        if isinstance(converted, str):
            reasons.append(converted)
            return value
        return converted

    # Rows have another rank than the map, so its memory format says nothing about them.
    kept = tuple(value for value in node.args if not isinstance(value, torch.memory_format))
    args = fx.node.map_aggregate(kept, convert)
    kwargs = fx.node.map_aggregate({k: v for k, v in node.kwargs.items() if k != "memory_format"}, convert)
    if reasons:
        return reasons[0]
    builder.replace(builder.call(node.target, *args, **kwargs))
    return None


def _rewrite_reduction(node: fx.Node, builder: RowsBuilder) -> str | None:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    spatial = spatial_of(x)
    assert spatial is not None
    given = read_arguments(node)
    dims = [spatial.row_dim(dim) for dim in _reduced_dims(node, len(spatial.dims))]
    given["dim"] = dims[0] if isinstance(given["dim"], int) else dims
    names = [argument.name for argument in schema_of(node.target).arguments if not argument.kwarg_only]
    keywords = [argument.name for argument in schema_of(node.target).arguments if argument.kwarg_only]
    rest = [given[name] for name in names[1:]]
    builder.replace(builder.call(node.target, builder.rows(x), *rest, **{name: given[name] for name in keywords}))
    return None


def rewrite(node: fx.Node, builder: RowsBuilder) -> str | None:
    """Run the same operator on rows."""
    if node.target in REDUCTIONS:
        return _rewrite_reduction(node, builder)
    return _rewrite_prelu(node, builder) if _has_channel_weights(node) else _rewrite_elementwise(node, builder)


FAMILY = Family(NAME, lambda target: is_elementwise(target) or target in REDUCTIONS, infer, rewrite)


def sparsify_pointwise(compilation: Compilation) -> None:
    """Run the pass on the edit graph."""
    rewrite_nodes(FAMILY, compilation.edit.graph, compilation.report)
