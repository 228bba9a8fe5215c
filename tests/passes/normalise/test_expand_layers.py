"""Layers that are one operator become linear layers, norms and attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.report import Report
from fisedit_compile.passes.normalise.expand_layers import expand_layers
from support.attention_graphs import STACK, Builder
from support.graphs import outputs, reasons, spell, targets
from support.tolerances import assert_near

aten = torch.ops.aten
NAME = "expand_layers"
LAYER = aten._transformer_encoder_layer_fwd.default
MULTI_HEAD = aten._native_multi_head_attention.default
B, T, E, H, F = 2, 5, 8, 4, 12  # samples, tokens, width, heads, width within


def run(build: Builder, *results: fx.Node) -> tuple[fx.GraphModule, Report]:
    """Rewrite, and check that the numbers stay what they were."""
    module, values, report = build.module(*results), build.tensors(), Report()
    expected = module(*values)
    expand_layers(Compilation(module, report=report))
    module.graph.lint()
    for actual, wanted in zip(module(*values), expected, strict=True):
        assert_near(actual, wanted)
    return module, report


def projections(build: Builder) -> list[fx.Node]:
    shapes = {"w_in": (3 * E, E), "b_in": (3 * E,), "w_out": (E, E), "b_out": (E,)}
    return [build.parameter(*shape, name=name) for name, shape in shapes.items()]


def layer(build: Builder, x: fx.Node, gelu: bool, first: bool, *mask: Any, heads: int = H) -> fx.Node:
    """An encoder layer of random weights."""
    weights = projections(build)
    norms = [build.parameter(E, name=name) for name in ("n1", "c1", "n2", "c2")]
    within = [(F, E), (F,), (E, F), (E,)]
    fed = [build.parameter(*shape, name=name) for name, shape in zip(("f1", "d1", "f2", "d2"), within, strict=True)]
    return build(LAYER, x, E, heads, *weights, gelu, first, 1e-5, *norms, *fed, *mask)


def attention_of(x: Any) -> Any:
    """What attention becomes, in words."""
    packed = ("aten.reshape", ("aten.linear", x, "w_in", "b_in"), [B, T, 3, H, E // H])
    parts = [("aten.select.int", ("aten.permute", packed, [2, 0, 3, 1, 4]), 0, number) for number in range(3)]
    attended = ("aten.permute", ("aten.scaled_dot_product_attention", *parts), [0, 2, 1, 3])
    return ("aten.linear", ("aten.reshape", attended, [B, T, E]), "w_out", "b_out")


def norm_of(x: Any, number: int) -> Any:
    return ("aten.layer_norm", x, [E], f"n{number}", f"c{number}", 1e-5)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_an_encoder_layer(gelu: bool, first: bool) -> None:
    build = Builder()
    module, report = run(build, layer(build, build.input(B, T, E), gelu, first))
    assert report.matches[NAME] == 1 and not report.misses

    def fed_forward(x: Any) -> Any:
        hidden = ("aten.gelu" if gelu else "aten.relu", ("aten.linear", x, "f1", "d1"))
        return ("aten.linear", hidden, "f2", "d2")

    if first:
        middle = ("aten.add.Tensor", "x", attention_of(norm_of("x", 1)))
        end = ("aten.add.Tensor", middle, fed_forward(norm_of(middle, 2)))
    else:
        middle = norm_of(("aten.add.Tensor", "x", attention_of("x")), 1)
        end = norm_of(("aten.add.Tensor", middle, fed_forward(middle)), 2)
    assert spell(outputs(module)[0]) == end
    assert all(node.meta["nn_module_stack"] == STACK for node in module.graph.nodes if node.op == "call_function")


def test_multi_head_attention() -> None:
    build = Builder()
    x = build.input(B, T, E)
    both = build(MULTI_HEAD, x, x, x, E, H, *projections(build))
    build.piece(both, 1)  # which nothing reads
    module, report = run(build, build.piece(both, 0))
    assert report.matches[NAME] == 1 and not report.misses
    assert spell(outputs(module)[0]) == attention_of("x") and MULTI_HEAD not in targets(module)


def test_a_second_run_changes_nothing() -> None:
    build = Builder()
    module, _ = run(build, layer(build, build.input(B, T, E), True, True))
    before, report = module.code, Report()
    expand_layers(Compilation(module, report=report))
    assert module.code == before and not report.matches and not report.misses


def test_an_encoder_layer_with_a_mask() -> None:
    build = Builder()
    x = build.input(B, T, E)
    mask = build(aten.ge.Scalar, build.input(T, T, name="mask"), 100.0)
    module, report = run(build, layer(build, x, False, False, mask, 0))
    assert reasons(report, NAME) == ["it has a mask"] and LAYER in targets(module)


def test_multi_head_attention_with_a_mask() -> None:
    build = Builder()
    x = build.input(B, T, E)
    mask = build(aten.ge.Scalar, build.input(B, T, name="mask"), 100.0)
    both = build(MULTI_HEAD, x, x, x, E, H, *projections(build), mask, True, True, 1)
    module, report = run(build, build.piece(both, 0))
    assert reasons(report, NAME) == ["it has a mask"] and MULTI_HEAD in targets(module)


def test_attention_to_something_else() -> None:
    build = Builder()
    x, prompt = build.input(B, T, E), build.input(B, T, E, name="prompt")
    both = build(MULTI_HEAD, x, prompt, prompt, E, H, *projections(build))
    module, report = run(build, build.piece(both, 0))
    assert reasons(report, NAME) == ["query, key and value are not one tensor"] and MULTI_HEAD in targets(module)


def test_attention_whose_weights_are_read() -> None:
    build = Builder()
    x = build.input(B, T, E)
    both = build(MULTI_HEAD, x, x, x, E, H, *projections(build))
    module, report = run(build, build.piece(both, 0), build.piece(both, 1))
    assert reasons(report, NAME) == ["its attention weights are read"] and MULTI_HEAD in targets(module)


def test_inputs_and_heads_that_do_not_fit() -> None:
    build = Builder()
    node = layer(build, build.input(B, T, E), False, False)
    module, report = build.module(node), Report()
    node.args = (node.args[0], E, 3, *node.args[3:])  # tracing refuses it as well
    expand_layers(Compilation(module, report=report))
    assert reasons(report, NAME) == [
        f"its input [{B}, {T}, {E}] is not [B, T, {E}], or 3 heads do not divide the width"
    ]
    assert LAYER in targets(module)
