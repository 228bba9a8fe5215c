"""stabilise: cross-attention whose maps are kept, or taken from the recorded call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fisedit_compile.errors import GraphError
from fisedit_compile.passes.caching.stabilise import stabilise
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.program import Stabilisation, StabilisedGraphs
from support.graphs import BATCH_SIZE, COLUMNS, ROWS, GraphBuilder, aten, names, only, outputs, reasons, targets, text
from support.tolerances import assert_identical, assert_near

SDPA = aten.scaled_dot_product_attention.default
HEADS, WIDTH, WORDS, POSITIONS = 3, 8, 7, ROWS * COLUMNS
QUERY, KEY = (BATCH_SIZE, HEADS, POSITIONS, WIDTH), (BATCH_SIZE, HEADS, WORDS, WIDTH)


def run(builder: GraphBuilder, *results: fx.Node) -> Compilation:
    """The pass on a lifted record graph, which it must not change."""
    module = builder.module(*results)
    compilation = Compilation(module, tuple(builder.infos), record=module)
    before = text(module)
    stabilise(compilation)
    assert text(module) == before
    return compilation


def attention(query: Any = QUERY, key: Any = KEY, spatial: str | None = "bcsc", **options: Any) -> Compilation:
    """One attention between a layout change and an addition, as networks have it."""
    builder = GraphBuilder()
    q = builder.input(*query, name="q", spatial=spatial)
    k, v = (builder.input(*key, name=name) for name in "kv")
    node = builder.call(SDPA, q, k, v, spatial=spatial, **options)
    return run(builder, builder.call(aten.add.Tensor, node, q, spatial=spatial))


def graphs(compilation: Compilation) -> StabilisedGraphs:
    assert compilation.stabilisation is not None
    for graph in vars(compilation.stabilisation.graphs).values():
        text(graph)
    return compilation.stabilisation.graphs


def values(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def test_maps_are_kept_beside_the_attention() -> None:
    compilation = attention(scale=0.3)
    made, (site,) = graphs(compilation), compilation.report.attention_sites
    assert (site.name, site.kind, site.shape) == (
        "attention:scaled_dot_product_attention_default",
        "value",
        (*QUERY[:-1], WORDS),
    )
    assert compilation.report.matches["stabilise"] == 1 and not compilation.report.misses
    q, k, v = values(QUERY, KEY, KEY)
    output, maps = made.record_maps(q, k, v)
    assert_identical(output, compilation.module("record")(q, k, v)[0])
    assert_near(maps, (0.3 * q @ k.transpose(2, 3)).softmax(-1))
    assert targets(made.record_maps).count(SDPA) == 1


def test_columns_of_shared_words_are_the_recorded_ones() -> None:
    compilation = attention()
    made = graphs(compilation)
    q, k, v, *others = values(QUERY, KEY, KEY, QUERY, KEY)
    recorded = made.record_maps(*others, v)[1]
    alignment = torch.tensor([[0, -1, 1, 2, 2, -1, 6], [-1, 0, 0, 5, -1, -1, 3]])
    maps = (q @ k.transpose(2, 3) / WIDTH**0.5).softmax(-1)
    for sample, tokens in enumerate(alignment.tolist()):
        for new, before in enumerate(tokens):
            if before >= 0:
                maps[sample, :, :, new] = recorded[sample, :, :, before]
    output, kept = made.stabilised_save(q, k, v, alignment, recorded)
    assert_near(output, maps @ v + q)
    assert_near(kept, maps)
    assert_identical(made.stabilised(q, k, v, alignment, recorded)[0], output)
    assert SDPA not in targets(made.stabilised) and len(outputs(made.stabilised)) == 1


def test_tokens_without_heads() -> None:
    compilation = attention((BATCH_SIZE, POSITIONS, WIDTH), (BATCH_SIZE, WORDS, WIDTH), "bsc")
    made = graphs(compilation)
    q, k, v = values((BATCH_SIZE, POSITIONS, WIDTH), (BATCH_SIZE, WORDS, WIDTH), (BATCH_SIZE, WORDS, WIDTH))
    output, recorded = made.record_maps(q, k, v)
    same = torch.arange(WORDS).expand(BATCH_SIZE, -1)
    assert_near(made.stabilised(q, k, v, same, recorded)[0], output)


def test_the_result_lies_in_memory_as_that_of_the_attention() -> None:
    builder = GraphBuilder()
    tokens = builder.input(BATCH_SIZE, POSITIONS, HEADS, WIDTH, name="q", spatial="bscc")
    q = builder.call(aten.transpose.int, tokens, 1, 2, spatial="bcsc")
    k, v = (builder.input(*KEY, name=name) for name in "kv")
    node = builder.call(SDPA, q, k, v, spatial="bcsc")
    # The view relies on it: the heads of a position lie side by side.
    turned = builder.call(aten.transpose.int, node, 1, 2, spatial="bscc")
    assert turned.meta["val"].is_contiguous()
    made = graphs(run(builder, builder.call(aten.view.default, turned, [BATCH_SIZE, POSITIONS, -1], spatial="bsc")))
    arguments = values((BATCH_SIZE, POSITIONS, HEADS, WIDTH), KEY, KEY)
    output, recorded = made.record_maps(*arguments)
    same = torch.arange(WORDS).expand(BATCH_SIZE, -1)
    assert_near(made.stabilised(*arguments, same, recorded)[0], output)


def test_narrow_types_are_normalised_in_float32() -> None:
    builder = GraphBuilder()
    q = builder.input(*QUERY, name="q", spatial="bcsc", dtype=torch.bfloat16)
    k, v = (builder.input(*KEY, name=name, dtype=torch.bfloat16) for name in "kv")
    compilation = run(builder, builder.call(SDPA, q, k, v, spatial="bcsc"))
    softmax = only(graphs(compilation).record_maps, aten.softmax.int)
    assert softmax.args[2] is torch.float32
    assert compilation.report.attention_sites[0].dtype is torch.bfloat16


def test_numbers_of_tokens_have_an_alignment_each() -> None:
    builder = GraphBuilder()
    q = builder.input(*QUERY, name="q", spatial="bcsc")
    first, second = (builder.input(BATCH_SIZE, HEADS, size, WIDTH, name="k") for size in (WORDS, 4))
    found = [builder.call(SDPA, q, key, key, spatial="bcsc") for key in (first, second, first)]
    compilation = run(builder, *found)
    assert compilation.stabilisation is not None and compilation.stabilisation.tokens == (4, WORDS)
    inputs = [node for node in graphs(compilation).stabilised.graph.nodes if node.op == "placeholder"]
    assert names(inputs[3:]) == ["alignment_4", "alignment_7", *(f"recorded_maps_{number}" for number in range(3))]


def test_inputs_of_as_many_tokens_are_not_told_apart() -> None:
    builder = GraphBuilder()
    q = builder.input(*QUERY, name="q", spatial="bcsc")
    words, image = (builder.input(BATCH_SIZE, WORDS, WIDTH, name="words") for _ in range(2))
    keys = [builder.call(aten.unsqueeze.default, value, 1) for value in (words, image)]
    keys = [builder.call(aten.expand.default, key, [-1, HEADS, -1, -1]) for key in keys]
    compilation = run(builder, *(builder.call(SDPA, q, key, key, spatial="bcsc") for key in keys))
    assert compilation.stabilisation is None
    expected = "the keys of several attentions are 7 tokens of different inputs"
    assert reasons(compilation.report, "stabilise") == [expected] * 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"is_causal": True}, "it has dropout, is causal or groups its queries"),
        ({"dropout_p": 0.5}, "it has dropout, is causal or groups its queries"),
        ({"key": (1, HEADS, WORDS, WIDTH)}, "keys have another batch or number of heads than queries"),
        ({"key": (BATCH_SIZE, 1, WORDS, WIDTH)}, "keys have another batch or number of heads than queries"),
    ],
)
def test_attention_that_is_left_alone_has_a_reason(options: dict[str, Any], reason: str) -> None:
    compilation = attention(**options)
    assert compilation.stabilisation is None and reasons(compilation.report) == [reason]


def test_a_mask_is_a_reason() -> None:
    builder = GraphBuilder()
    q = builder.input(*QUERY, name="q", spatial="bcsc")
    k, v = (builder.input(*KEY, name=name) for name in "kv")
    mask = builder.input(BATCH_SIZE, 1, 1, WORDS, name="mask")
    compilation = run(builder, builder.call(SDPA, q, k, v, mask, spatial="bcsc"))
    assert compilation.stabilisation is None and reasons(compilation.report) == ["it has a mask"]


def test_words_joined_with_the_picture_are_a_reason() -> None:
    builder = GraphBuilder()
    q = builder.input(*QUERY, name="q", spatial="bcsc")
    words = builder.input(*KEY, name="k")
    joined = builder.call(aten.cat.default, [words, q], 2)
    compilation = run(builder, builder.call(SDPA, q, joined, joined, spatial="bcsc"))
    assert compilation.stabilisation is None
    assert [reason.partition(":")[0] for reason in reasons(compilation.report)] == ["its keys are no words alone"]


@pytest.mark.parametrize("layout", ["bcsc", "bscc"])
def test_attention_between_positions_and_within_them_is_none_of_its_concern(layout: str) -> None:
    builder = GraphBuilder()
    shape = QUERY if layout == "bcsc" else (BATCH_SIZE, POSITIONS, WORDS, WIDTH)
    x = builder.input(*shape, name="q", spatial=layout)
    compilation = run(builder, builder.call(SDPA, x, x, x, spatial=layout))
    assert compilation.stabilisation is None and not compilation.report.misses
    compilation = attention(spatial=None)  # of words to words
    assert compilation.stabilisation is None and not compilation.report.misses


def test_graphs_are_made_once_and_when_they_are_asked_for() -> None:
    made: list[int] = []

    def make() -> StabilisedGraphs:
        made.append(1)
        module = fx.GraphModule({}, fx.Graph())
        return StabilisedGraphs(record_maps=module, stabilised=module, stabilised_save=module)

    stabilisation = Stabilisation(sites=(), tokens=(), make=make)
    assert not made
    assert stabilisation.graphs is stabilisation.graphs and made == [1]


def test_a_broken_copy_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    compilation = attention()
    monkeypatch.setattr("fisedit_compile.passes.caching.stabilise._return_too", lambda *_: None)
    with pytest.raises(GraphError, match="misses an output or an attention map"):
        graphs(compilation)
