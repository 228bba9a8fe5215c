"""``normalise_attention`` on graphs built by hand: targets, arguments, reasons, and numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, fx, nn

from fisedit_compile.passes.canonicalize import canonicalize
from fisedit_compile.passes.normalise_attention import NAME, normalise_attention
from fisedit_compile.passes.report import Report
from fisedit_compile.tracing import capture

from graphs import GraphBuilder, only, targets
from tolerances import assert_near

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
B, H, T, S, D = 2, 3, 5, 7, 4  # samples, heads, queries, keys, channels of a head
STACK = {"layer": ("layer", nn.Module)}


class Builder(GraphBuilder):
    """Calls carry a module stack, as after tracing."""

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.call(target, *args, **kwargs)
        node.meta["nn_module_stack"] = STACK
        return node

    def tensors(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        values = [node.meta["val"] for node in self.graph.nodes if node.op == "placeholder"]
        return [torch.randn(value.shape, generator=generator).to(value.dtype) for value in values]


def run(builder: Builder, *outputs: fx.Node) -> tuple[fx.GraphModule, Report]:
    """Rewrite, and check that the numbers stay what they were."""
    module, inputs, report = builder.module(*outputs), builder.tensors(), Report()
    expected = module(*inputs)
    assert normalise_attention(module, report) is module
    for actual, wanted in zip(module(*inputs), expected, strict=True):
        assert_near(actual, wanted)
    return module, report


def fold(build: Builder, value: fx.Node) -> tuple[fx.Node, fx.Node]:
    """``[B, T, H * D]`` to heads ``[B, H, T, D]`` and on to ``[B * H, T, D]``."""
    length = value.meta["val"].shape[1]
    heads = build(aten.permute.default, build(aten.reshape.default, value, [B, length, H, D]), [0, 2, 1, 3])
    return heads, build(aten.reshape.default, build(aten.clone.default, heads), [B * H, length, D])


def folded(build: Builder, mask: fx.Node | None = None, beta: float = 1, **end: Any) -> dict[str, fx.Node]:
    """Diffusers' eager attention; every value by name."""
    query, key, value = build.input(B, T, H * D), build.input(B, S, H * D), build.input(B, S, H * D)
    (q, a), (k, b), (v, c) = (fold(build, node) for node in (query, key, value))
    added = mask or build(aten.zeros.default, [B * H, T, S])
    scores = build(
        aten.baddbmm.default, added, a, build(aten.transpose.int, b, -1, -2), beta=beta if mask else 0, alpha=0.5
    )
    weights = build(aten.softmax.int, scores, -1)
    out = build(aten.bmm.default, weights, c)
    return {"q": q, "k": k, "v": v, "a": a, "scores": scores, "weights": weights, "out": out}


def unfold(build: Builder, out: fx.Node) -> fx.Node:
    heads = build(aten.reshape.default, out, [B, H, T, D])
    return build(aten.reshape.default, build(aten.permute.default, heads, [0, 2, 1, 3]), [B, T, H * D])


def plain(
    build: Builder,
    *,
    scores: Callable[[fx.Node], fx.Node] = lambda node: node,
    weights: Callable[[fx.Node], fx.Node] = lambda node: node,
    dim: int = -1,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
) -> fx.Node:
    """Product, softmax, product on ``[B, H, T, D]``, with something done to the scores and to the weights."""
    query, key = (build.input(B, H, length, D, dtype=dtypes[0]) for length in (T, S))
    value = build.input(B, H, S, D, dtype=dtypes[1])
    product = build(aten.matmul.default, query, build(aten.transpose.int, key, 2, 3))
    normalised = build(aten.softmax.int, scores(product), dim)
    return build(aten.matmul.default, weights(normalised), value)


def test_folded_heads() -> None:
    build = Builder()
    found = folded(build)
    module, report = run(build, unfold(build, found["out"]))
    assert report.matches[NAME] == 1 and not report.misses
    attention = only(module, SDPA)
    assert attention.args == (found["q"], found["k"], found["v"])
    assert attention.kwargs == {"scale": 0.5}
    heads = [aten.reshape.default, aten.permute.default]
    assert targets(module) == heads * 3 + [SDPA, *reversed(heads)]
    assert [user.args for user in attention.users] == [(attention, [0, 2, 1, 3])]
    assert tuple(attention.meta["val"].shape) == (B, H, T, D)
    assert attention.meta["nn_module_stack"] is STACK


@pytest.mark.parametrize("first", [1, B * H])
def test_folded_mask_is_unfolded(first: int) -> None:
    build = Builder()
    mask = build.input(first, 1, S)
    module, report = run(build, unfold(build, folded(build, mask)["out"]))
    assert report.matches[NAME] == 1
    given = only(module, SDPA).args[3]
    assert isinstance(given, fx.Node)
    assert given.args == (mask, [1, 1, 1, S] if first == 1 else [B, H, 1, S])


def test_folded_result_with_another_reader_is_folded_again() -> None:
    build = Builder()
    out = folded(build)["out"]
    module, report = run(build, unfold(build, out), build(aten.relu.default, out))
    assert report.matches[NAME] == 1
    relu = only(module, aten.relu.default)
    (refolded,) = relu.all_input_nodes
    assert (refolded.target, refolded.args) == (aten.reshape.default, (only(module, SDPA), [B * H, T, D]))


def test_one_operand_that_was_not_folded_here_is_reshaped() -> None:
    build = Builder()
    _, a = fold(build, build.input(B, T, H * D))
    key, value = build.input(B * H, S, D), build.input(B * H, S, D)
    weights = build(aten.softmax.int, build(aten.bmm.default, a, build(aten.transpose.int, key, 1, 2)), 2)
    module, report = run(build, unfold(build, build(aten.bmm.default, weights, value)))
    assert report.matches[NAME] == 1
    assert [node.args for node in only(module, SDPA).args[1:]] == [(key, [B, H, S, D]), (value, [B, H, S, D])]  # type: ignore[union-attr]


def test_value_on_the_left_of_transposed_weights() -> None:
    build = Builder()
    query, key, value = build.input(B, T, D), build.input(B, D, S), build.input(B, D, S)
    scores = build(aten.mul.Tensor, build(aten.bmm.default, query, key), 0.25)
    weights = build(aten.permute.default, build(aten.softmax.int, scores, 2), [0, 2, 1])
    module, report = run(build, build(aten.bmm.default, value, weights))
    assert report.matches[NAME] == 1
    attention = only(module, SDPA)
    assert attention.kwargs == {"scale": 0.25}
    assert [tuple(node.meta["val"].shape) for node in attention.args] == [(B, 1, T, D), (B, 1, S, D), (B, 1, S, D)]  # type: ignore[union-attr]
    assert targets(module)[-2:] == [aten.squeeze.dim, aten.permute.default]


def test_einsum_with_heads_behind_positions() -> None:
    build = Builder()
    query, key, value = build.input(B, T, H, D), build.input(B, S, H, D), build.input(B, S, H, D)
    scores = build(aten.div.Tensor, build(aten.einsum.default, "bihd,bjhd->bhij", [query, key]), 2.0)
    out = build(aten.einsum.default, "bhij,bjhd->bihd", [build(aten.softmax.int, scores, 3), value])
    module, report = run(build, out)
    assert report.matches[NAME] == 1
    attention = only(module, SDPA)
    assert [node.args for node in attention.args] == [(node, [0, 2, 1, 3]) for node in (query, key, value)]  # type: ignore[union-attr]
    assert attention.kwargs == {"scale": 0.5}
    assert targets(module) == [aten.permute.default] * 3 + [SDPA, aten.permute.default]


def test_einsum_that_names_the_keys_first() -> None:
    build = Builder()
    query, key, value = build.input(B, T, D), build.input(B, S, D), build.input(B, S, D)
    weights = build(aten.softmax.int, build(aten.einsum.default, "bjd,bid->bij", [key, query]), -1)
    module, report = run(build, build(aten.einsum.default, "bij,bjd->bid", [weights, value]))
    assert report.matches[NAME] == 1
    assert [node.args[0] for node in only(module, SDPA).args] == [query, key, value]  # type: ignore[union-attr]


def test_mask_and_scale_by_numbers() -> None:
    build = Builder()
    mask = build.input(T, S)

    def scores(node: fx.Node) -> fx.Node:
        node = build(aten.div.Tensor, build(aten.mul.Tensor, node, 3.0), 4.0)
        return build(aten.add.Tensor, mask, node)

    module, report = run(
        build, plain(build, scores=scores, weights=lambda n: build(aten.dropout.default, n, 0.5, False))
    )
    assert report.matches[NAME] == 1
    attention = only(module, SDPA)
    assert attention.args[3] is mask and attention.kwargs == {"scale": 0.75}
    assert targets(module) == [SDPA]


def test_casts_around_the_softmax() -> None:
    build = Builder()
    half = torch.bfloat16
    out = plain(
        build,
        dtypes=(half, half),
        scores=lambda node: build(aten.to.dtype, node, torch.float32),
        weights=lambda node: build(aten.to.dtype, node, half),
    )
    module, report = run(build, out)
    assert report.matches[NAME] == 1 and targets(module) == [SDPA]
    assert only(module, SDPA).meta["val"].dtype == half


def test_query_and_key_that_were_widened_are_read_before_the_cast() -> None:
    build = Builder()
    half = torch.bfloat16
    inputs = [build.input(B, H, length, D, dtype=half) for length in (T, S, S)]
    query, key = (build(aten._to_copy.default, node, dtype=torch.float32) for node in inputs[:2])
    scores = build(aten.matmul.default, query, build(aten.transpose.int, key, -1, -2))
    weights = build(aten.to.dtype, build(aten.softmax.int, scores, -1), half)
    module, report = run(build, build(aten.matmul.default, weights, inputs[2]))
    assert report.matches[NAME] == 1 and targets(module) == [SDPA]
    assert only(module, SDPA).args == tuple(inputs)


def test_a_second_run_changes_nothing() -> None:
    build = Builder()
    module, _ = run(build, unfold(build, folded(build)["out"]))
    before, report = module.code, Report()
    normalise_attention(module, report)
    assert module.code == before
    assert not report.matches and not report.misses


def test_assertions_of_the_trace_do_not_count_as_readers() -> None:
    build = Builder()
    found = folded(build)
    build.graph.call_function(aten._assert_tensor_metadata.default, (found["weights"], None, None, torch.float32))
    module, report = run(build, unfold(build, found["out"]))
    assert report.matches[NAME] == 1 and aten._assert_tensor_metadata.default not in targets(module)


Case = Callable[[Builder], tuple[fx.Node, ...]]


def _scaled_by_a_tensor(build: Builder) -> tuple[fx.Node, ...]:
    scale = build.input(1)
    return (plain(build, scores=lambda node: build(aten.mul.Tensor, node, scale)),)


def _mask_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **options: Any) -> Case:
    def case(build: Builder) -> tuple[fx.Node, ...]:
        mask = build.input(*shape, dtype=dtype)
        return (plain(build, scores=lambda node: build(aten.add.Tensor, node, mask, **options)),)

    return case


def _mask_before_scale(build: Builder) -> tuple[fx.Node, ...]:
    mask = build.input(T, S)
    return (plain(build, scores=lambda n: build(aten.mul.Tensor, build(aten.add.Tensor, n, mask), 2.0)),)


def _two_products_summed(build: Builder) -> tuple[fx.Node, ...]:
    def scores(node: fx.Node) -> fx.Node:
        return build(
            aten.add.Tensor, node, build(aten.matmul.default, build.input(B, H, T, D), build.input(B, H, D, S))
        )

    return (plain(build, scores=scores),)


def _baddbmm_scales_mask(build: Builder) -> tuple[fx.Node, ...]:
    return (folded(build, build.input(B * H, 1, S), beta=2)["out"],)


def _weights_returned(build: Builder) -> tuple[fx.Node, ...]:
    found = folded(build)
    return found["out"], found["weights"]


def _scores_returned(build: Builder) -> tuple[fx.Node, ...]:
    found = folded(build)
    return found["out"], found["scores"]


def square_weights(build: Builder) -> fx.Node:
    query, key = build.input(B, T, D), build.input(B, T, D)
    return build(aten.softmax.int, build(aten.bmm.default, query, build(aten.transpose.int, key, 1, 2)), -1)


def _keys_not_contracted(build: Builder) -> tuple[fx.Node, ...]:
    return (build(aten.bmm.default, build(aten.transpose.int, square_weights(build), 1, 2), build.input(B, T, D)),)


def _result_added_to(build: Builder) -> tuple[fx.Node, ...]:
    return (build(aten.baddbmm.default, build.input(B, T, D), square_weights(build), build.input(B, T, D)),)


def _mask_adds_samples(build: Builder) -> tuple[fx.Node, ...]:
    query, key, value = build.input(1, H, T, D), build.input(1, H, S, D), build.input(B, H, S, D)
    scores = build(aten.matmul.default, query, build(aten.transpose.int, key, 2, 3))
    weights = build(aten.softmax.int, build(aten.add.Tensor, scores, build.input(B, H, T, S)), -1)
    return (build(aten.matmul.default, weights, value),)


def _product_of_weights_with_themselves(build: Builder) -> tuple[fx.Node, ...]:
    weights = square_weights(build)
    return (build(aten.bmm.default, weights, weights),)


def _shared_key(build: Builder) -> tuple[fx.Node, ...]:
    query, key, value = build.input(B, H, T, D), build.input(B, 1, S, D), build.input(B, H, S, D)
    scores = build(aten.matmul.default, query, build(aten.transpose.int, key, 2, 3))
    return (build(aten.matmul.default, build(aten.softmax.int, scores, -1), value),)


def _einsum(equation: str, *shapes: tuple[int, ...]) -> Case:
    def case(build: Builder) -> tuple[fx.Node, ...]:
        scores = build(aten.einsum.default, equation, [build.input(*shape) for shape in shapes])
        return (build(aten.bmm.default, build(aten.softmax.int, scores, -1), build.input(B, S, D)),)

    return case


def _value_of_another_dtype(build: Builder) -> tuple[fx.Node, ...]:
    wide = torch.float64
    return (plain(build, dtypes=(torch.float32, wide), weights=lambda node: build(aten.to.dtype, node, wide)),)


def _narrowed_scores(build: Builder) -> tuple[fx.Node, ...]:
    narrow, wide = torch.float32, torch.float64

    def cast(dtype: torch.dtype) -> Callable[[fx.Node], fx.Node]:
        return lambda node: build(aten.to.dtype, node, dtype)

    return (plain(build, dtypes=(wide, wide), scores=cast(narrow), weights=cast(wide)),)


NEGATIVE: dict[str, tuple[Case, str]] = {
    "1 other dimension": (lambda b: (plain(b, dim=2),), "does not normalise the last dimension"),
    "1 weights returned": (_weights_returned, "attention weights have 2 readers"),
    "1 weights changed": (lambda b: (plain(b, weights=lambda n: b(aten.relu.default, n)),), "are read by aten.relu"),
    "1 weights twice": (_product_of_weights_with_themselves, "not one operand"),
    "1 scores returned": (_scores_returned, "attention scores have 2 readers"),
    "2 not a product": (lambda b: (b(aten.softmax.int, b(aten.relu.default, b.input(B, T)), -1),), "reads aten.relu"),
    "2 broadcast heads": (_shared_key, "of a product broadcast"),
    "2 einsum of sums": (_einsum("...id,...jd->...ij", (B, T, D), (B, S, D)), "not a plain product"),
    "2 einsum contracts two": (_einsum("bihd,bjhd->bij", (B, T, H, D), (B, S, H, D)), "not a batched matrix product"),
    "2 scores transposed": (
        lambda b: (plain(b, scores=lambda n: b(aten.transpose.int, b(aten.transpose.int, n, 2, 3), 2, 3)),),
        "reads aten.transpose",
    ),
    "3 tensor scale": (_scaled_by_a_tensor, "not a Python number"),
    "3 scaled mask": (_mask_before_scale, "one that is scaled"),
    "3 mask with alpha": (_mask_of((T, S), alpha=2), "one that is scaled"),
    "3 baddbmm scales mask": (_baddbmm_scales_mask, "one that is scaled"),
    "3 two products": (_two_products_summed, "neither or both operands"),
    "4 narrowed scores": (_narrowed_scores, "are narrowed to torch.float32"),
    "4 value dtype": (_value_of_another_dtype, "differ in dtype: torch.float32, torch.float32, torch.float64"),
    "5 mask dtype": (_mask_of((T, S), torch.bfloat16), "the mask is torch.bfloat16"),
    "5 mask grows scores": (_mask_adds_samples, "does not broadcast"),
    "6 keys not contracted": (_keys_not_contracted, "does not contract the keys"),
    "6 result added to": (_result_added_to, "scaled, or something is added"),
}


@pytest.mark.parametrize("name", NEGATIVE)
def test_a_condition_that_fails_leaves_the_graph_and_a_reason(name: str) -> None:
    case, reason = NEGATIVE[name]
    build = Builder()
    outputs = case(build)
    module, report = run(build, *outputs)
    assert not report.matches and SDPA not in targets(module)
    assert len(report.misses) == 1
    miss = report.misses[0]
    assert miss.pass_name == NAME and reason in miss.reason


def test_dropout_in_training_is_left_alone() -> None:
    build = Builder()
    out = plain(build, weights=lambda node: build(aten.dropout.default, node, 0.5, True))
    module = normalise_attention(build.module(out), report := Report())
    assert SDPA not in targets(module)
    assert [miss.reason for miss in report.misses] == ["the attention weights pass a dropout that is not idle"]


@pytest.mark.parametrize("cross", [False, True])
def test_traced_diffusers_attention(cross: bool) -> None:
    torch.manual_seed(0)
    layer = Attention(query_dim=H * D, heads=H, dim_head=D, cross_attention_dim=6 if cross else None).eval()
    layer.set_processor(AttnProcessor())
    inputs = [torch.randn(B, T, H * D), *([torch.randn(B, S, 6)] if cross else [])]
    (traced,), report = capture(layer, *inputs), Report()
    canonicalize(traced.gm, report)
    normalise_attention(traced.gm, report)
    assert report.matches[NAME] == 1 and not report.misses
    query, key, value = only(traced.gm, SDPA).args
    for operand, length in ((query, T), (key, S if cross else T), (value, S if cross else T)):
        assert isinstance(operand, fx.Node) and tuple(operand.meta["val"].shape) == (B, H, length, D)
        view = operand.args[0]
        assert isinstance(view, fx.Node) and view.args[1] == [B, length, H, D]
        (projected,) = view.all_input_nodes
        assert projected.target is aten.linear.default
    parameters, users = dict(layer.named_parameters()), iter(inputs)
    flat = [parameters[info.name] if info.kind == "parameter" else next(users) for info in traced.input_infos]
    with torch.no_grad():
        assert_near(traced.gm(*flat)[0], layer(*inputs))
