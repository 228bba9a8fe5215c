"""count_macs: multiply-accumulates of dense nodes, and which of them run on rows."""

from __future__ import annotations

import pytest

from fisedit_compile.passes.common.report import MacCount, Report
from fisedit_compile.passes.sparsify.count_macs import counts, macs_of
from fisedit_compile.runtime.spec import Domain
from support.execution import compile_graph
from support.graphs import DOMAIN, GraphBuilder, aten

SDPA = aten.scaled_dot_product_attention.default


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda b: b.call(aten.conv2d.default, b.picture(), b.parameter(8, 3, 3, 2), None, [1], [1], [1], 2),
            ("convolution", 2 * 8 * 5 * 5 * 3 * 3 * 2),
        ),
        (
            lambda b: b.call(aten.conv_transpose2d.input, b.picture(), b.parameter(6, 4, 3, 3), None, [2], [0], [0], 2),
            ("convolution", 2 * 6 * 5 * 4 * 4 * 3 * 3),
        ),
        (
            lambda b: b.call(
                aten.convolution.default, b.picture(), b.parameter(6, 8, 2, 2), None, [1], [0], [1], True, [0], 1
            ),
            ("convolution", 2 * 6 * 5 * 4 * 8 * 2 * 2),
        ),
        (lambda b: b.call(aten.linear.default, b.tokens(), b.parameter(9, 6)), ("linear", 2 * 20 * 9 * 6)),
        (lambda b: b.call(aten.matmul.default, b.tokens(), b.parameter(6, 9)), ("product", 2 * 20 * 6 * 9)),
        (lambda b: b.call(aten.bmm.default, b.tokens(), b.input(2, 6, 7)), ("product", 2 * 20 * 6 * 7)),
        (
            lambda b: b.call(aten.baddbmm.default, b.input(2, 20, 7), b.tokens(), b.input(2, 6, 7)),
            ("product", 2 * 20 * 6 * 7),
        ),
        (
            lambda b: b.call(aten.addmm.default, b.input(7), b.input(20, 6), b.parameter(6, 7)),
            ("product", 20 * 6 * 7),
        ),
        (
            lambda b: b.call(SDPA, b.input(2, 3, 20, 4), b.input(2, 3, 7, 4), b.input(2, 3, 7, 5)),
            ("attention", 2 * 3 * 20 * 7 * (4 + 5)),
        ),
        (lambda b: b.call(aten.relu.default, b.picture()), None),
        (lambda b: b.picture(), None),
    ],
)
def test_counts(make, expected) -> None:
    assert macs_of(make(GraphBuilder())) == expected


def test_nodes_that_are_still_there_run_densely() -> None:
    dense = GraphBuilder()
    x = dense.tokens()
    first = dense.call(aten.linear.default, x, dense.parameter(6, 6), spatial="bsc")
    second = dense.call(aten.linear.default, first, dense.parameter(6, 6), spatial="bsc")
    prompt = dense.call(aten.linear.default, dense.input(2, 7, 6, name="prompt"), dense.parameter(6, 6))
    edit = GraphBuilder()
    edit.graph.create_node("call_function", aten.linear.default, (edit.tokens(),), name=second.name)
    counted = list(counts(dense.module(second, prompt).graph, edit.graph))
    assert counted == [
        MacCount(first.name, "linear", 2 * 20 * 36, DOMAIN),
        MacCount(second.name, "linear", 2 * 20 * 36, None),
        MacCount(prompt.name, "linear", 2 * 7 * 36, None),
    ]


def test_a_rewritten_node_of_the_same_kind_is_not_taken_for_a_dense_one() -> None:
    """A linear layer on rows is again a linear layer."""
    builder = GraphBuilder()
    x = builder.call(aten.group_norm.default, builder.picture(), 2)
    tokens = builder.call(aten.permute.default, x, [0, 2, 3, 1])
    first = builder.call(aten.linear.default, tokens, builder.parameter(6, 6))
    second = builder.call(aten.linear.default, first, builder.parameter(6, 6))
    report = compile_graph(builder, second).report
    assert [count.domain for count in report.mac_counts] == [DOMAIN, DOMAIN]
    assert report.sparse_mac_fraction == 1.0


def test_a_report_adds_them_up() -> None:
    coarse = Domain(2, 2)
    report = Report(
        mac_counts=[
            MacCount("a", "linear", 600, DOMAIN),
            MacCount("b", "linear", 300, coarse),
            MacCount("c", "product", 100, None),
        ]
    )
    assert (report.total_macs, report.sparse_macs, report.sparse_mac_fraction) == (1000, 900, 0.9)
    assert report.macs_at({DOMAIN: 0.1, coarse: 0.5}) == pytest.approx(60 + 150 + 100)
    assert Report().sparse_mac_fraction == 0.0


def test_a_layer_of_a_transformer_in_one_operator() -> None:
    """It counts what the linear layers and the attention count that it consists of."""
    builder = GraphBuilder()
    x, width, inner = builder.tokens(), 6, 16
    shapes = [(3 * width, width), (3 * width,), (width, width), (width,)]
    norms = [builder.parameter(width) for _ in range(4)]
    feed = [(inner, width), (inner,), (width, inner), (width,)]
    weights = [builder.parameter(*shape) for shape in shapes]
    target = aten._transformer_encoder_layer_fwd.default
    fed = [builder.parameter(*shape) for shape in feed]
    node = builder.call(target, x, width, 2, *weights, True, True, 1e-5, *norms, *fed)
    products = 20 * (3 * width * width + width * width + 2 * width * inner)
    assert macs_of(node) == ("transformer layer", 2 * (products + 2 * 20 * 20 * width))


def test_attention_with_its_linear_layers_in_one_operator() -> None:
    builder = GraphBuilder()
    x, width = builder.tokens(), 6
    weights = [builder.parameter(*shape) for shape in [(3 * width, width), (3 * width,), (width, width), (width,)]]
    node = builder.call(aten._native_multi_head_attention.default, x, x, x, width, 2, *weights)
    assert macs_of(node) == ("attention layer", 2 * (20 * (3 * width * width + width * width) + 2 * 20 * 20 * width))
