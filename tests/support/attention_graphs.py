"""Eager attention in many spellings, for the tests of ``normalise_attention``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.report import Report
from fisedit_compile.passes.normalise.normalise_attention import normalise_attention
from support.graphs import GraphBuilder
from support.tolerances import assert_near

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
    normalise_attention(Compilation(module, report=report))
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


def square_weights(build: Builder) -> fx.Node:
    query, key = build.input(B, T, D), build.input(B, T, D)
    return build(aten.softmax.int, build(aten.bmm.default, query, build(aten.transpose.int, key, 1, 2)), -1)
