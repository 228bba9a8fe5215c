"""Each condition of ``normalise_attention``: a graph that fails it stays as it is, and the report says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.report import Report
from fisedit_compile.passes.normalise.normalise_attention import NAME, normalise_attention
from support.attention_graphs import SDPA, B, Builder, D, H, S, T, aten, folded, plain, run, square_weights
from support.graphs import targets

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


def _outer_product(build: Builder) -> tuple[fx.Node, ...]:
    return (build(aten.einsum.default, "bij,bkl->bijkl", [square_weights(build), build.input(B, T, D)]),)


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
    "2 einsum contracts nothing": (_outer_product, "not a batched matrix product"),
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
    module, report = build.module(out), Report()
    normalise_attention(Compilation(module, report=report))
    assert SDPA not in targets(module)
    assert [miss.reason for miss in report.misses] == ["the attention weights pass a dropout that is not idle"]
