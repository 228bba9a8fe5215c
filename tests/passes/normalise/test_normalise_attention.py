"""``normalise_attention`` on graphs built by hand: targets, arguments, reasons, and numbers."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import fx

from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.report import Report
from fisedit_compile.passes.normalise.canonicalize import canonicalize
from fisedit_compile.passes.normalise.normalise_attention import NAME, normalise_attention
from fisedit_compile.tracing.trace import capture
from support.attention_graphs import SDPA, STACK, B, Builder, D, H, S, T, aten, fold, folded, plain, run, unfold
from support.graphs import only, targets
from support.tolerances import assert_near


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


def test_key_that_was_folded_transposed() -> None:
    build = Builder()
    (q, a), (v, c) = fold(build, build.input(B, T, H * D)), fold(build, build.input(B, S, H * D))
    key = build(aten.permute.default, build.input(B, S, H, D), [0, 2, 3, 1])
    scores = build(aten.bmm.default, a, build(aten.reshape.default, key, [B * H, D, S]))
    out = build(aten.bmm.default, build(aten.softmax.int, scores, -1), c)
    module, report = run(build, unfold(build, out))
    assert report.matches[NAME] == 1
    assert only(module, SDPA).args[::2] == (q, v)
    assert tuple(only(module, SDPA).args[1].meta["val"].shape) == (B, H, S, D)  # type: ignore[union-attr]


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


def test_numbers_that_scale_query_and_key() -> None:
    build = Builder()
    query, key, value = (build.input(B, H, length, D, name=name) for name, length in (("q", T), ("k", S), ("v", S)))
    scaled = build(aten.mul.Tensor, query, 0.5)
    across = build(aten.permute.default, build(aten.div.Tensor, build(aten.mul.Tensor, key, 3.0), 4.0), [0, 1, 3, 2])
    weights = build(aten.softmax.int, build(aten.matmul.default, scaled, across), -1)
    module, report = run(build, build(aten.matmul.default, weights, value))
    assert report.matches[NAME] == 1 and targets(module) == [SDPA]
    assert only(module, SDPA).args == (query, key, value) and only(module, SDPA).kwargs == {"scale": 0.375}


def test_scales_that_are_tensors_stay() -> None:
    build = Builder()
    query, key, value = build.input(B, T, D, name="q"), build.input(B, S, D), build.input(B, S, D)
    scaled = build(aten.mul.Tensor, query, build.input(1, name="scale"))
    weights = build(aten.softmax.int, build(aten.bmm.default, scaled, build(aten.transpose.int, key, 1, 2)), -1)
    module, report = run(build, build(aten.bmm.default, weights, value))
    assert report.matches[NAME] == 1 and only(module, SDPA).kwargs == {"scale": 1.0}
    assert only(module, SDPA).args[0].args[0].target is aten.mul.Tensor  # type: ignore[union-attr]


def test_samples_and_heads_that_were_merged_behind_positions() -> None:
    """As in nn.MultiheadAttention."""
    build = Builder()
    operands = []
    for length in (T, S, S):
        merged = build(aten.reshape.default, build.input(length, B, H * D), [length, B * H, D])
        operands.append(build(aten.transpose.int, merged, 0, 1))
    query, key, value = operands
    weights = build(aten.softmax.int, build(aten.bmm.default, query, build(aten.transpose.int, key, 1, 2)), -1)
    module, report = run(build, build(aten.bmm.default, weights, value))
    assert report.matches[NAME] == 1
    shapes = [tuple(node.meta["val"].shape) for node in only(module, SDPA).args]  # type: ignore[union-attr]
    assert shapes == [(B, H, T, D), (B, H, S, D), (B, H, S, D)]


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
    normalise_attention(Compilation(module, report=report))
    assert module.code == before
    assert not report.matches and not report.misses


def test_assertions_of_the_trace_do_not_count_as_readers() -> None:
    build = Builder()
    found = folded(build)
    build.graph.call_function(aten._assert_tensor_metadata.default, (found["weights"], None, None, torch.float32))
    module, report = run(build, unfold(build, found["out"]))
    assert report.matches[NAME] == 1 and aten._assert_tensor_metadata.default not in targets(module)


@pytest.mark.parametrize("cross", [False, True])
def test_traced_diffusers_attention(cross: bool) -> None:
    torch.manual_seed(0)
    layer = Attention(query_dim=H * D, heads=H, dim_head=D, cross_attention_dim=6 if cross else None).eval()
    layer.set_processor(AttnProcessor())
    inputs = [torch.randn(B, T, H * D), *([torch.randn(B, S, 6)] if cross else [])]
    (traced,), report = capture(layer, *inputs), Report()
    canonicalize(Compilation(traced.gm, report=report))
    normalise_attention(Compilation(traced.gm, report=report))
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
