"""Dimensions that are merged and taken apart again stay apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.report import Report
from fisedit_compile.passes.normalise.canonicalize import canonicalize
from fisedit_compile.passes.normalise.normalise_attention import normalise_attention
from fisedit_compile.passes.normalise.undo_merges import undo_merges
from fisedit_compile.tracing.trace import capture
from support.attention_graphs import SDPA, STACK, B, Builder, D, H, T
from support.graphs import only, outputs, spell, targets
from support.tolerances import assert_near

aten = torch.ops.aten
NAME = "undo_merges"
E = H * D


def run(build: Builder, *results: fx.Node) -> tuple[fx.GraphModule, Report]:
    """Rewrite, and check that the numbers stay what they were."""
    module, values, report = build.module(*results), build.tensors(), Report()
    expected = module(*values)
    undo_merges(Compilation(module, report=report))
    module.graph.lint()
    for actual, wanted in zip(module(*values), expected, strict=True):
        assert_near(actual, wanted)
    return module, report


def view(build: Builder, value: fx.Node, *sizes: int) -> fx.Node:
    return build(aten.reshape.default, value, list(sizes))


def moved(build: Builder, value: fx.Node, *order: int) -> fx.Node:
    return build(aten.permute.default, value, list(order))


def kept(build: Builder, result: fx.Node) -> None:
    """Nothing is rewritten."""
    before = build.module(result)
    code, report = before.code, Report()
    undo_merges(Compilation(before, report=report))
    assert before.code == code and not report.matches


def test_samples_and_heads_of_positions_first() -> None:
    build = Builder()
    merged = view(build, build.input(T, B, E), T, B * H, D)
    module, report = run(build, view(build, build(aten.transpose.int, merged, 0, 1), B, H, T, D))
    assert report.matches[NAME] == 1
    assert spell(outputs(module)[0]) == ("aten.permute", ("aten.reshape", "x", [T, B, H, D]), [1, 2, 0, 3])
    assert all(node.meta["nn_module_stack"] == STACK for node in module.graph.nodes if node.op == "call_function")


def test_heads_back_to_positions_first() -> None:
    build = Builder()
    merged = view(build, build.input(B, H, T, D), B * H, T, D)
    module, report = run(build, view(build, moved(build, merged, 1, 0, 2), T, B, E))
    assert report.matches[NAME] == 1
    assert spell(outputs(module)[0]) == ("aten.reshape", ("aten.permute", "x", [2, 0, 1, 3]), [T, B, E])


def test_what_has_its_final_shape_is_not_reshaped() -> None:
    build = Builder()
    x = build.input(T, B, H, D)
    module, _ = run(build, view(build, moved(build, view(build, x, T, B * H, D), 1, 0, 2), B, H, T, D))
    assert spell(outputs(module)[0]) == ("aten.permute", "x", [1, 2, 0, 3])
    build = Builder()
    merged = view(build, build.input(B, H, T, D), B * H, T, D)
    module, _ = run(build, view(build, moved(build, merged, 1, 2, 0), T, D, B, H))
    assert spell(outputs(module)[0]) == ("aten.permute", "x", [2, 3, 0, 1])


def test_a_linear_layer_over_a_matrix() -> None:
    build = Builder()
    weight, bias = build.parameter(6, E, name="w"), build.parameter(6, name="b")
    matrix = view(build, build.input(T, B, H, D), T * B, E)
    module, report = run(build, view(build, build(aten.linear.default, matrix, weight, bias), T, B, 6))
    assert report.matches[NAME] == 1
    assert spell(outputs(module)[0]) == ("aten.linear", ("aten.reshape", "x", [T, B, E]), "w", "b")


def test_all_three_behind_each_other() -> None:
    """The end of multi-head attention."""
    build = Builder()
    merged = view(build, build.input(B, H, T, D), B * H, T, D)
    matrix = view(build, moved(build, merged, 1, 0, 2), T * B, E)
    module, report = run(
        build, view(build, build(aten.linear.default, matrix, build.parameter(6, E, name="w")), T, B, 6)
    )
    assert report.matches[NAME] == 2
    apart = ("aten.reshape", ("aten.permute", "x", [2, 0, 1, 3]), [T, B, E])
    assert spell(outputs(module)[0]) == ("aten.linear", apart, "w")


def test_a_second_run_changes_nothing() -> None:
    build = Builder()
    merged = view(build, build.input(B, H, T, D), B * H, T, D)
    module, _ = run(build, view(build, moved(build, merged, 1, 0, 2), T, B, E))
    code, report = module.code, Report()
    undo_merges(Compilation(module, report=report))
    assert module.code == code and not report.matches


def test_a_split_at_another_place_than_the_merge() -> None:
    build = Builder()
    merged = view(build, build.input(T, B, E), T, B * H, D)
    kept(build, view(build, moved(build, merged, 1, 0, 2), H, B, T, D))


def test_two_dimensions_that_are_split() -> None:
    build = Builder()
    merged = view(build, build.input(T, B, E), T, B * H, D)
    kept(build, view(build, moved(build, merged, 1, 0, 2), B, H, T, 2, D // 2))


def test_a_merge_that_stays() -> None:
    build = Builder()
    merged = view(build, build.input(B, H, T, D), B * H, T, D)
    kept(build, view(build, moved(build, merged, 1, 0, 2), T, B * H * D))


def test_merges_without_permutations() -> None:
    build = Builder()
    kept(build, view(build, view(build, build.input(B, H, T, D), B * H, T, D), B, H, T * D))


def linear(build: Builder, *sizes: int) -> fx.Node:
    return build(aten.linear.default, view(build, build.input(T, B, E), *sizes), build.parameter(6, sizes[-1]))


@pytest.mark.parametrize("sizes", [(T, B, 3, 2), (T * B * 2, 3)])
def test_linear_layers_whose_channels_are_split_or_that_are_not_taken_apart(sizes: tuple[int, ...]) -> None:
    build = Builder()
    kept(build, view(build, linear(build, T * B, E), *sizes))


def test_linear_layers_that_read_no_matrix_or_are_read_twice() -> None:
    build = Builder()
    kept(build, view(build, linear(build, B * T, H, D), T, B, H, 6))
    build = Builder()
    matrix = linear(build, T * B, E)
    kept(
        build,
        build(aten.add.Tensor, view(build, matrix, T, B, 6), view(build, build(aten.neg.default, matrix), T, B, 6)),
    )


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("heads", [2, 3])
def test_traced_multi_head_attention(weights: bool, heads: int) -> None:
    """Behind the other passes, nothing of it merges samples with anything."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(E, heads, batch_first=True).eval().requires_grad_(False)
    x = torch.randn(B, T, E)

    def attend(x: torch.Tensor) -> torch.Tensor:
        attended: torch.Tensor = layer(x, x, x, need_weights=weights)[0]
        return attended

    (traced,), report = capture(attend, x), Report()
    for rewrite in (canonicalize, normalise_attention, undo_merges):
        rewrite(Compilation(traced.gm, report=report))
    assert not report.misses and report.matches[NAME] >= 4
    only(traced.gm, SDPA)
    sizes: list[Any] = [set(node.meta["val"].shape) for node in traced.gm.graph.nodes if node.op == "call_function"]
    assert not any({B * heads, B * T} & shape for shape in sizes) and aten.bmm.default not in targets(traced.gm)
    parameters = {tuple(value.shape): value for value in layer.parameters()}
    flat = [
        parameters[tuple(node.meta["val"].shape)] if info.kind == "parameter" else x
        for node, info in zip(traced.gm.graph.nodes, traced.input_infos, strict=False)
    ]
    assert_near(traced.gm(*flat)[0], attend(x))
