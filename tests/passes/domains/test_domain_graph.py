"""The graph of resolutions, and the walk that tells pictures from other tensors of rank four."""

from __future__ import annotations

import pytest

from fisedit_compile.passes.domains.geometry.domain_graph import (
    NOT_SPATIAL,
    connection_kind,
    data_flow,
    domain_graph,
    is_attention_bias,
    reaches_anchor,
    reads_channels_last,
)
from fisedit_compile.runtime.spec import Domain
from support.graphs import DOMAIN, GraphBuilder, aten, layout

SDPA = aten.scaled_dot_product_attention.default


def test_data_flow_has_an_edge_for_each_use_lists_included() -> None:
    builder = GraphBuilder()
    x, y = builder.picture(), builder.picture(name="y")
    joined = builder.call(aten.cat.default, [x, y, x], 1)
    flow = data_flow(builder.module(joined).graph)
    assert set(flow.edges) == {("x", joined.name), ("y", joined.name), (joined.name, "output")}
    assert flow.nodes[joined.name]["node"] is joined


@pytest.mark.parametrize(
    ("path", "reaches"),
    [
        (lambda b, x: x, True),
        (lambda b, x: b.call(aten.mul.Tensor, b.call(aten.to.dtype, x, x.meta["val"].dtype), 2.0), True),
        (lambda b, x: b.call(aten.cat.default, [x, x], 1), True),
        (lambda b, x: b.piece(b.call(aten.chunk.default, x, 2, 1), 0), True),
        (lambda b, x: b.call(aten.reshape.default, x, [2, 3, 2, 5, 4]), True),
        (lambda b, x: b.call(aten.softmax.int, x, -1), False),
        (lambda b, x: b.call(aten.matmul.default, x, b.parameter(4, 4)), False),
        (lambda b, x: b.call(aten.mean.dim, x, [1], True), False),
        (lambda b, x: b.call(aten.flip.default, x, [3]), True),
    ],
)
def test_only_elementwise_and_layout_operators_lead_to_an_anchor(path, reaches) -> None:
    builder = GraphBuilder()
    x = builder.picture(spatial=None)
    value = path(builder, x)
    anchor = builder.call(aten.constant_pad_nd.default, value, [1, 1])
    flow = data_flow(builder.module(anchor).graph)
    assert reaches_anchor(flow, "x") is reaches


@pytest.mark.parametrize(
    "anchor",
    [
        lambda b, x: b.call(aten.conv2d.default, x, b.parameter(3, 6, 1, 1)),
        lambda b, x: b.call(aten.convolution.default, x, b.parameter(3, 6, 1, 1), None, [1], [0], [1], False, [0], 1),
        lambda b, x: b.call(aten.conv_transpose2d.input, x, b.parameter(6, 3, 1, 1)),
        lambda b, x: b.call(aten.group_norm.default, x, 2),
        lambda b, x: b.call(aten.max_pool2d.default, x, [2]),
        lambda b, x: b.call(aten.upsample_bilinear2d.vec, x, [10, 8], False, None),
        lambda b, x: b.call(aten.pixel_unshuffle.default, b.call(aten.constant_pad_nd.default, x, [0, 0, 0, 1]), 2),
    ],
)
def test_anchors(anchor) -> None:
    builder = GraphBuilder()
    node = anchor(builder, builder.picture(spatial=None))
    assert reaches_anchor(data_flow(builder.module(node).graph), "x")


@pytest.mark.parametrize(
    ("path", "is_bias"),
    [
        (lambda b, x, q: b.call(SDPA, q, q, q, x), True),
        (lambda b, x, q: b.call(SDPA, q, q, q, attn_mask=b.call(aten.mul.Tensor, x, -1.0)), True),
        (lambda b, x, q: b.call(SDPA, q, q, q, b.call(aten.expand.default, x, [2, 6, 5, 5])), True),
        (lambda b, x, q: b.call(SDPA, x, x, x), False),
        (lambda b, x, q: b.call(SDPA, q, q, q, b.call(aten.softmax.int, x, -1)), False),
        (lambda b, x, q: b.call(aten.relu.default, x), False),
    ],
)
def test_masks_of_attentions(path, is_bias) -> None:
    builder = GraphBuilder()
    x, query = builder.input(2, 6, 5, 5), builder.input(2, 6, 5, 3, name="query")
    node = path(builder, x, query)
    assert is_attention_bias(data_flow(builder.module(node).graph), "x") is is_bias


@pytest.mark.parametrize(
    ("path", "is_last"),
    [
        (lambda b, x: x, False),
        (lambda b, x: b.call(aten.permute.default, x, [0, 3, 1, 2]), True),
        (lambda b, x: b.call(aten.movedim.int, b.call(aten.relu.default, x), -1, 1), True),
        (lambda b, x: b.call(aten.transpose.int, b.call(aten.transpose.int, x, 1, 3), 2, 3), True),
        (lambda b, x: b.call(aten.transpose.int, x, 1, 3), False),  # height and width are swapped
        (lambda b, x: b.call(aten.permute.default, x, [0, 2, 3, 1]), False),
    ],
)
def test_channels_last_is_read_off_the_way_to_the_anchor(path, is_last) -> None:
    builder = GraphBuilder()
    node = builder.call(aten.max_pool2d.default, path(builder, builder.picture(spatial=None)), [2])
    assert reads_channels_last(data_flow(builder.module(node).graph), "x") is is_last


def linear(b, x):
    return b.call(aten.linear.default, x, b.parameter(3, int(x.meta["val"].shape[-1]), name="w"))


def layer_norm(b, x, count: int = 1):
    return b.call(aten.layer_norm.default, x, list(x.meta["val"].shape[-count:]))


def pooled(b, x):
    return b.call(aten.max_pool2d.default, x, [2])


def tokens(b, x):
    batch, height, width, channels = x.meta["val"].shape
    return b.call(aten.reshape.default, x, [batch, height * width, channels])


def five(b):
    return b.input(3, 1, 1, 1, 1, name="five")


CHANNELS_FIRST = [0, 3, 1, 2]


@pytest.mark.parametrize(
    ("path", "is_last"),
    [
        # A linear layer or norm over the last dimension says nothing where something that reads maps stands behind.
        (lambda b, x: pooled(b, b.call(aten.permute.default, linear(b, x), CHANNELS_FIRST)), True),
        (lambda b, x: pooled(b, b.call(aten.permute.default, layer_norm(b, x), CHANNELS_FIRST)), True),
        (lambda b, x: pooled(b, linear(b, x)), False),
        (lambda b, x: pooled(b, layer_norm(b, x)), False),
        # Where nothing does, they read channels.
        (linear, True),
        (layer_norm, True),
        (lambda b, x: tokens(b, b.call(aten.relu.default, x)), True),
        (lambda b, x: layer_norm(b, x, 3), False),
        (lambda b, x: linear(b, b.call(aten.transpose.int, x, 2, 3)), False),
        (lambda b, x: b.call(aten.flatten.using_ints, x, 2), False),
        # A value of five dimensions is no map.
        (lambda b, x: b.call(aten.flatten.using_ints, b.call(aten.add.Tensor, x, five(b)), 1), False),
    ],
)
def test_channels_last_is_read_off_layers_over_the_last_dimension(path, is_last) -> None:
    builder = GraphBuilder()
    node = path(builder, builder.picture(spatial=None))
    assert reads_channels_last(data_flow(builder.module(node).graph), "x") is is_last


def test_an_operator_without_anchors_behind_it_is_none() -> None:
    builder = GraphBuilder()
    x = builder.picture(spatial=None)
    y = builder.picture(name="y", spatial=None)
    norm = builder.call(aten.layer_norm.default, x, [4])
    flow = data_flow(builder.module(norm, builder.call(aten.group_norm.default, y, 2)).graph)
    assert not reaches_anchor(flow, "x") and reaches_anchor(flow, "y")


def connected(builder: GraphBuilder) -> dict:
    """One node of each kind of connection."""
    x = builder.picture()
    tokens = builder.tokens(name="tokens")
    conv = builder.call(aten.conv2d.default, x, builder.parameter(6, 6, 2, 2), None, [2, 2], spatial="bchw")
    conv.meta["spatial"] = layout("bchw", Domain(2, 2))
    up = builder.call(aten.upsample_nearest2d.vec, conv, [5, 4], None, spatial="bchw")
    flipped = builder.call(aten.flip.default, x, [3], spatial="bchw")
    flipped.meta["dense_reason"] = "unknown"
    halves = builder.call(aten.chunk.default, x, 2, 1)
    halves.meta["spatial_outputs"] = [layout("bchw")] * 2
    return {
        conv: "stencil",
        up: "stencil",
        builder.call(aten.group_norm.default, x, 2, spatial="bchw"): "statistics",
        builder.call(aten.scaled_dot_product_attention.default, tokens, tokens, tokens, spatial="bsc"): "attention",
        builder.call(aten.relu.default, x, spatial="bchw"): "rows",
        builder.call(aten.linear.default, tokens, builder.parameter(3, 6), spatial="bsc"): "rows",
        halves: "rows",
        flipped: "ends locality",
        builder.call(aten.mean.dim, x, [2, 3]): "ends locality",
    }


def test_kinds_of_connections() -> None:
    builder = GraphBuilder()
    expected = connected(builder)
    assert {node: connection_kind(node) for node in expected} == expected


def test_domain_graph_connects_resolutions() -> None:
    builder = GraphBuilder()
    nodes = list(connected(builder))
    graph = domain_graph(builder.module(*(node for node in nodes if node.target is not aten.chunk.default)).graph)
    coarse = Domain(2, 2)
    assert set(graph.nodes) == {DOMAIN, coarse, NOT_SPATIAL}
    edges = {(source, target, data["kind"]) for source, target, data in graph.edges(data=True)}
    assert (DOMAIN, coarse, "stencil") in edges and (coarse, DOMAIN, "stencil") in edges
    assert (DOMAIN, NOT_SPATIAL, "ends locality") in edges
    down = [data["node"] for _, _, data in graph.out_edges(DOMAIN, data=True) if data["kind"] == "stencil"]
    assert down == [nodes[0].name]
    assert len(graph.edges(DOMAIN, coarse)) >= 1
    assert all(source != NOT_SPATIAL for source, _ in graph.edges())
