"""sparsify_attention: active queries over all keys, or over the prompt."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fisedit_compile.passes.sparsify.attention import FAMILY, sparsify_attention
from fisedit_compile.runtime.spec import Domain
from support.execution import Edit, compile_graph, mix, random_inputs, record, some_mask
from support.graphs import DOMAIN, GraphBuilder, aten, layout, outputs, spell
from support.sparsifying import refused, sparsify, updates
from support.tolerances import assert_near

SDPA = aten.scaled_dot_product_attention.default
HEADS = (2, 3, 20, 4)


def queries(builder: GraphBuilder, *names: str, shape=HEADS, spatial: str | None = "bcsc"):
    return [builder.input(*shape, name=name, spatial=spatial) for name in names]


def run(builder: GraphBuilder, *results):
    return sparsify(sparsify_attention, FAMILY, builder, *results)


def plan(kind: str, domain: Domain = DOMAIN):
    return ("plan", kind, domain)


def test_self_attention_reads_recorded_keys_and_values() -> None:
    builder = GraphBuilder()
    attention = builder.call(SDPA, *queries(builder, "q", "k", "v"), scale=0.25)
    module, report = run(builder, attention)
    rows = [("to_rows", name) for name in "qkv"]
    kept = [("recorded", name, "rows") for name in "kv"]
    expected = ("fisedit.attention_rows", *rows, *kept, plan("index"), plan("valid"), 0.25)
    assert spell(outputs(module)[0]) == ("to_map", expected)
    assert updates(module) == [(kept[0], rows[1]), (kept[1], rows[2])]
    assert report.matches == {"sparsify_attention": 1}


def test_self_attention_without_heads_gets_one() -> None:
    builder = GraphBuilder()
    attention = builder.call(SDPA, *queries(builder, "q", "k", "v", shape=(2, 20, 4), spatial="bsc"))
    module, _ = run(builder, attention)
    rows = [("aten.unsqueeze", ("to_rows", name), 2) for name in "qkv"]
    kept = [("aten.unsqueeze", ("recorded", name, "rows"), 2) for name in "kv"]
    inner = ("fisedit.attention_rows", *rows, *kept, plan("index"), plan("valid"), None)
    assert spell(outputs(module)[0]) == ("to_map", ("aten.squeeze.dim", inner, 2))
    assert updates(module) == [(("recorded", name, "rows"), ("to_rows", name)) for name in "kv"]


def test_keys_of_another_resolution_are_read_at_theirs() -> None:
    builder = GraphBuilder()
    (query,) = queries(builder, "q")
    key, value = queries(builder, "k", "v", shape=(2, 3, 6, 4), spatial=None)
    coarse = Domain(3, 2)
    key.meta["spatial"] = value.meta["spatial"] = layout("bcsc", coarse)
    module, _ = run(builder, builder.call(SDPA, query, key, value))
    assert spell(outputs(module)[0])[1][-3:-1] == (plan("index", coarse), plan("valid", coarse))


@pytest.mark.parametrize("mask", [None, (2, 1, 1, 7), (1, 7)])
def test_cross_attention_keeps_the_prompt(mask) -> None:
    builder = GraphBuilder()
    (query,) = queries(builder, "q")
    prompt = queries(builder, "k", "v", shape=(2, 3, 7, 4), spatial=None)
    bias = None if mask is None else builder.input(*mask, name="mask")
    module, _ = run(builder, builder.call(SDPA, query, *prompt, bias, scale=0.5))
    inner = ("aten.transpose.int", ("to_rows", "q"), 1, 2)
    inner = (str(SDPA).removesuffix(".default"), inner, "k", "v", None if mask is None else "mask", ("scale", 0.5))
    assert spell(outputs(module)[0]) == ("to_map", ("aten.transpose.int", inner, 1, 2))
    assert updates(module) == []


def test_cross_attention_without_heads_needs_no_transposition() -> None:
    builder = GraphBuilder()
    (query,) = queries(builder, "q", shape=(2, 20, 4), spatial="bsc")
    prompt = queries(builder, "k", "v", shape=(2, 7, 4), spatial=None)
    module, _ = run(builder, builder.call(SDPA, query, *prompt))
    name = str(SDPA).removesuffix(".default")
    assert spell(outputs(module)[0]) == ("to_map", (name, ("to_rows", "q"), "k", "v", None, ("scale", None)))


QUERY = "the query is not a spatial value with dimensions (batch, heads, space, channel)"
RANDOM = "it has dropout, is causal or groups its queries"


def self_attention(query="bcsc", key="bcsc", value="bcsc", key_heads=3, mask=None, **options):
    """A builder, and an attention whose operands have these layouts."""
    builder = GraphBuilder()
    q = builder.input(*HEADS, name="q", spatial=query)
    k, v = (builder.input(2, key_heads, 20, 4, name=name, spatial=dims) for name, dims in (("k", key), ("v", value)))
    bias = None if mask is None else builder.input(*mask, name="mask")
    return builder, builder.call(SDPA, q, k, v, bias, **options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        # 1. The query
        (dict(query=None), QUERY),
        (dict(query="bcss"), QUERY),
        # 2. Key and value
        (dict(key=None), "only one of key and value is a spatial value"),
        (dict(value=None), "only one of key and value is a spatial value"),
        (dict(key="bscc"), "key and value do not have the dimensions of the query"),
        (dict(value="bscc"), "key and value do not have the dimensions of the query"),
        # 3. The mask
        # 4. Dropout, causality, heads
        (dict(dropout_p=0.1), RANDOM),
        (dict(is_causal=True), RANDOM),
        (dict(enable_gqa=True), RANDOM),
        (dict(key_heads=1), "keys have another number of heads"),
    ],
)
def test_conditions(options, reason) -> None:
    builder, attention = self_attention(**options)
    assert refused(sparsify_attention, FAMILY, builder, attention) == [reason]


def test_condition_2_key_and_value_have_one_resolution() -> None:
    builder, attention = self_attention()
    attention.args[2].meta["spatial"] = layout("bcsc", Domain(4, 5))
    assert refused(sparsify_attention, FAMILY, builder, attention) == ["key and value lie on different resolutions"]


def test_condition_3_the_mask_has_no_more_dimensions() -> None:
    builder = GraphBuilder()
    tokens = queries(builder, "q", "k", "v", shape=(2, 20, 4), spatial="bsc")
    attention = builder.call(SDPA, *tokens, builder.input(1, 2, 20, 20, name="mask"))
    assert refused(sparsify_attention, FAMILY, builder, attention) == ["the mask has more dimensions than the query"]


def test_condition_3_the_mask_is_not_spatial() -> None:
    builder, attention = self_attention(key=None, value=None, mask=(2, 1, 1, 20))
    attention.args[3].meta["spatial"] = layout("bccs")
    assert refused(sparsify_attention, FAMILY, builder, attention) == ["the mask is a spatial value"]


def attention_graph(prompt: bool, heads: bool, biased: bool) -> tuple[GraphBuilder, torch.fx.Node]:
    """From a picture to tokens, one projection for each operand, attention, and the tokens of the result."""
    builder = GraphBuilder()
    x = builder.input(2, 6, 5, 4)
    normed = builder.call(aten.group_norm.default, x, 2)  # anchors the input
    tokens = builder.call(aten.flatten.using_ints, builder.call(aten.permute.default, normed, [0, 2, 3, 1]), 1, 2)
    source = builder.input(2, 7, 6, name="prompt") if prompt else tokens

    def project(value, name: str):
        projected = builder.call(aten.linear.default, value, builder.parameter(6, 6, name=name))
        if not heads:
            return projected
        split = builder.call(aten.reshape.default, projected, [2, -1, 3, 2])
        return builder.call(aten.transpose.int, split, 1, 2)

    operands = [project(tokens, "wq"), project(source, "wk"), project(source, "wv")]
    bias = [builder.parameter(*((3,) if heads else ()), 20, 7 if prompt else 20, name="bias")] if biased else []
    attended = builder.call(SDPA, *operands, *bias)
    if heads:
        attended = builder.call(aten.reshape.default, builder.call(aten.transpose.int, attended, 1, 2), [2, 20, 6])
    return builder, attended


def dense_attention(heads: bool, mixed: torch.Tensor, source: torch.Tensor, weights) -> torch.Tensor:
    """Attention of tokens ``mixed`` [B, S, C] over ``source``."""
    projected = [
        functional.linear(value, weight) for value, weight in zip((mixed, source, source), weights[:3], strict=True)
    ]
    if heads:
        projected = [value.unflatten(2, (3, 2)).transpose(1, 2) for value in projected]
    result = functional.scaled_dot_product_attention(*projected, *weights[3:])
    return result.transpose(1, 2).flatten(2) if heads else result


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_attention_computes_the_masked_dense_result(biased, prompt, heads, batch) -> None:
    """With a bias, it differs from query to query."""
    builder, attended = attention_graph(prompt, heads, biased)
    program = compile_graph(builder, attended)
    assert program.report.dense_nodes == [] and program.report.matches["sparsify_attention"] == 1
    first = random_inputs(builder, 1)
    second = random_inputs(builder, 2, fixed=first)
    base = record(program, first)
    mask = some_mask(DOMAIN, batch)
    (result,) = Edit(program, base, second, mask).run()

    def tokens(values):
        return functional.group_norm(values[0], 2).flatten(2).transpose(1, 2)

    mixed_input = mix(second[0], first[0], mask)
    mixed = mix(tokens([mixed_input]), tokens(first), mask, 1, flat=True)
    expected = dense_attention(heads, mixed, second[1] if prompt else mixed, second[1 + prompt :])
    assert_near(result, mix(expected, base.outputs[0], mask, 1, flat=True))
