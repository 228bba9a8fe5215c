"""unfold_windows: what was merged with the samples stays a dimension of its own, or what cannot be is left as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.nn import functional

from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.program import InputInfo
from fisedit_compile.passes.common.report import Report
from fisedit_compile.passes.normalise.unfold_windows import unfold_windows
from support.graphs import GraphBuilder, aten, outputs, spell, targets, text
from support.tolerances import assert_near

BATCH, WINDOWS, TOKENS, CHANNELS = 2, 6, 5, 8
FOLDED = [BATCH * WINDOWS, TOKENS, CHANNELS]
APART = [BATCH, WINDOWS, TOKENS, CHANNELS]


def run(builder: GraphBuilder, *results: fx.Node) -> tuple[fx.GraphModule, Report]:
    module, report = builder.module(*results), Report()
    unfold_windows(Compilation(module, tuple(builder.infos), report=report))
    again = text(module)
    unfold_windows(Compilation(module, tuple(builder.infos)))
    assert text(module) == again, "a second run changes the graph"
    return module, report


def fold(builder: GraphBuilder) -> fx.Node:
    return builder.call(aten.reshape.default, builder.input(*APART), FOLDED)


X = ("aten.reshape", "x", APART)


def test_layers_run_on_windows_that_stand_apart() -> None:
    builder = GraphBuilder()
    hidden = builder.call(aten.linear.default, fold(builder), builder.parameter(12, CHANNELS))
    heads = builder.call(aten.transpose.int, builder.call(aten.reshape.default, hidden, [12, TOKENS, 3, 4]), 1, 2)
    scores = builder.call(aten.matmul.default, heads, builder.call(aten.transpose.int, heads, 2, 3))
    total = builder.call(aten.add.Tensor, scores, builder.parameter(1, 3, TOKENS, TOKENS, name="bias"))
    apart = builder.call(aten.reshape.default, total, [BATCH, WINDOWS, 3, TOKENS, TOKENS])
    module, report = run(builder, apart)
    linear = ("aten.linear", X, "weight", None)
    inner = ("aten.permute", ("aten.reshape", linear, [2, 6, TOKENS, 3, 4]), [0, 1, 3, 2, 4])
    product = ("aten.matmul", inner, ("aten.permute", inner, [0, 1, 2, 4, 3]))
    bias = ("aten.reshape", "bias", [1, 1, 3, TOKENS, TOKENS])
    expected = ("aten.reshape", ("aten.add.Tensor", product, bias), [BATCH, WINDOWS, 3, TOKENS, TOKENS])
    assert spell(outputs(module)[0]) == expected
    assert report.matches == {"unfold_windows": 1}


def test_a_mask_for_each_window_is_unfolded() -> None:
    builder = GraphBuilder()
    tokens = fold(builder)
    mask = builder.input(12, TOKENS, TOKENS, name="mask")
    module, _ = run(
        builder, builder.call(aten.scaled_dot_product_attention.default, tokens, tokens, tokens, mask, scale=0.5)
    )
    masks = ("aten.reshape", "mask", [BATCH, WINDOWS, TOKENS, TOKENS])
    attended = ("aten.scaled_dot_product_attention", X, X, X, masks, ("scale", 0.5))
    assert spell(outputs(module)[0]) == ("aten.reshape", attended, FOLDED)


def test_samples_behind_another_dimension() -> None:
    builder = GraphBuilder()
    pairs = builder.call(aten.permute.default, builder.input(BATCH, 3, WINDOWS, TOKENS, CHANNELS), [1, 0, 2, 3, 4])
    folded = builder.call(aten.reshape.default, pairs, [3, *FOLDED])
    module, _ = run(builder, builder.call(aten.reshape.default, builder.call(aten.select.int, folded, 0, 1), APART))
    inner = ("aten.reshape", ("aten.permute", "x", [1, 0, 2, 3, 4]), [3, *APART])
    assert spell(outputs(module)[0]) == ("aten.reshape", ("aten.select.int", inner, 0, 1), APART)


def test_what_no_rule_knows_reads_folded_values() -> None:
    builder = GraphBuilder()
    hidden = builder.call(aten.relu.default, fold(builder))
    module, _ = run(builder, builder.call(aten.flip.default, hidden, [0]))
    assert spell(outputs(module)[0]) == ("aten.flip", ("aten.reshape", ("aten.relu", X), FOLDED), [0])


UNTOUCHED: dict[str, Callable[[GraphBuilder], fx.Node]] = {
    "not the samples": lambda b: b.call(aten.reshape.default, b.input(*APART), [BATCH, WINDOWS * TOKENS, CHANNELS]),
    "half of what is behind them": lambda b: b.call(aten.reshape.default, b.input(*APART), [4, 3, TOKENS, CHANNELS]),
    "a parameter": lambda b: b.call(aten.relu.default, b.call(aten.reshape.default, b.parameter(*APART), FOLDED)),
    "everything": lambda b: b.call(aten.reshape.default, b.input(*APART), [480]),
}


@pytest.mark.parametrize("name", UNTOUCHED)
def test_condition_1(name: str) -> None:
    builder = GraphBuilder()
    result = UNTOUCHED[name](builder)
    before = targets(fx.GraphModule(builder.root, builder.graph))
    module, report = run(builder, result)
    assert targets(module) == before and report.matches == {}


def every_operator(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Windows ``[B, n, T, C]`` through everything that has a rule, and through some that have none."""
    windows = functional.layer_norm(x.reshape(FOLDED), [CHANNELS])
    query, key, value = functional.linear(windows, weight).reshape(12, TOKENS, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    query = functional.normalize(query, dim=-1) * query.mean((1, 2), keepdim=True)
    attended = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    scores = torch.bmm(attended, windows.transpose(1, 2)).softmax(-1)
    joined = torch.stack([scores @ attended, windows.unsqueeze(1).expand(-1, 2, -1, -1)[:, 0]], 0).sum(0)
    joined = torch.cat([joined, joined.amax(1, keepdim=True)], 1)[:, 1:]
    ones = torch.where(joined > 0, joined, joined.cumsum(0))
    back = joined.reshape(x.shape[0], -1, TOKENS, CHANNELS).permute(0, 3, 1, 2)
    again = back.permute(0, 2, 3, 1).reshape(FOLDED).reshape(-1, CHANNELS)
    return back, ones, again, key.chunk(2, 1)[1], joined.reshape(4, 3, TOKENS, CHANNELS)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_result_is_the_same(batch: int) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator) for shape in (APART, (3 * CHANNELS, CHANNELS))]
    infos = [InputInfo("user", "x"), InputInfo("parameter", "weight")]
    if batch == 1:  # samples that are one are merged with all windows
        inputs[0] = inputs[0].view(1, -1, TOKENS, CHANNELS)
    with torch.no_grad():
        module = make_fx(every_operator, pre_dispatch=True)(*inputs)
        FakeTensorProp(module).propagate(*inputs)  # values of one mode
        expected = every_operator(*inputs)
        report = Report()
        unfold_windows(Compilation(module, tuple(infos), report=report))
        for output, wanted in zip(module(*inputs), expected, strict=True):
            assert_near(output, wanted, "apart")
    assert report.matches["unfold_windows"] == 2
