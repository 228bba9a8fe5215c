"""hoist_parameters: what depends on parameters only moves into the prologue."""

from __future__ import annotations

import pytest
import torch

from fisedit_compile.passes.caching.hoist_parameters import hoist_parameters
from fisedit_compile.passes.common.compilation import Compilation
from support.graphs import GraphBuilder, aten, outputs, spell

PACK = torch.ops.fisedit.pack_conv_weight.default


def run(builder: GraphBuilder, *results):
    """The prologue's outputs spelled, and the numbers on the nodes of the graph."""
    module = builder.module(*results)
    compilation = Compilation(module, tuple(builder.infos))
    hoist_parameters(compilation)
    report, prologue = compilation.report, compilation.prologue
    numbers = {node.name: node.meta["hoisted"] for node in module.graph.nodes if "hoisted" in node.meta}
    hoist_parameters(Compilation(module, tuple(builder.infos)))
    assert numbers == {node.name: node.meta["hoisted"] for node in module.graph.nodes if "hoisted" in node.meta}
    results = [] if prologue is None else [spell(node) for node in outputs(prologue)]
    assert list(numbers.values()) == list(range(len(results))) and report.matches["hoist_parameters"] == len(results)
    if prologue is not None:
        names = [node.name for node in prologue.graph.nodes if node.op == "placeholder"]
        assert names == [node.name for node in module.graph.nodes if node.op == "placeholder"]
    return results, numbers


def test_condition_1_a_packed_weight_is_hoisted() -> None:
    builder = GraphBuilder()
    x, weight = builder.tokens(), builder.parameter(6, 6, 1, 1)
    packed = builder.call(PACK, weight, False, 1)
    linear = builder.call(aten.linear.default, x, packed)
    results, numbers = run(builder, linear)
    assert results == [("fisedit.pack_conv_weight", "weight", False, 1)] and numbers == {packed.name: 0}
    assert linear.args == (x, packed), "the graph itself is not changed"


def test_condition_1_only_the_last_of_a_chain_is_an_output() -> None:
    builder = GraphBuilder()
    x, weight = builder.tokens(), builder.parameter(6, 6)
    constant = builder.constant(torch.ones(6, 6))
    scaled = builder.call(aten.mul.Tensor, weight, constant)
    moved = builder.call(aten.t.default, scaled)
    first = builder.call(aten.linear.default, x, moved)
    results, numbers = run(builder, builder.call(aten.linear.default, first, builder.call(aten.neg.default, moved)))
    product = ("aten.t", ("aten.mul.Tensor", "weight", "constant"))
    assert results == [product, ("aten.neg", product)]
    assert list(numbers)[0] == moved.name and scaled.name not in numbers


@pytest.mark.parametrize("kind", ["user", "scalar"])
def test_condition_1_inputs_that_are_no_parameters_stay(kind) -> None:
    builder = GraphBuilder()
    x, step = builder.tokens(), builder.input(6, name="step", kind=kind)
    doubled = builder.call(aten.mul.Tensor, step, builder.parameter(6))
    assert run(builder, builder.call(aten.add.Tensor, x, doubled)) == ([], {})


def test_condition_1_parameters_and_made_up_tensors_stay() -> None:
    builder = GraphBuilder()
    x, weight = builder.tokens(), builder.parameter(6, 6)
    ramp = builder.call(aten.arange.default, 6, dtype=torch.float32, device=torch.device("cpu"))
    shifted = builder.call(aten.add.Tensor, builder.call(aten.linear.default, x, weight), ramp)
    assert run(builder, shifted) == ([], {})


def test_condition_1_the_pieces_of_a_parameter_are_hoisted() -> None:
    """Not the list of them: graph inputs are tensors."""
    builder = GraphBuilder()
    x, weight = builder.tokens(), builder.parameter(12, 6)
    halves = builder.call(aten.chunk.default, weight, 2)
    first, second = (builder.piece(halves, number) for number in range(2))
    inner = builder.call(aten.linear.default, x, first)
    results, numbers = run(builder, builder.call(aten.linear.default, inner, second))
    cut = ("aten.chunk", "weight", 2)
    assert results == [("getitem", cut, 0), ("getitem", cut, 1)]
    assert list(numbers) == [first.name, second.name]


def test_condition_2_random_operators_stay() -> None:
    builder = GraphBuilder()
    x, weight = builder.tokens(), builder.parameter(6)
    noise = builder.call(aten.rand_like.default, weight)
    assert run(builder, builder.call(aten.add.Tensor, x, noise)) == ([], {})


def test_what_nothing_reads_is_not_hoisted() -> None:
    builder = GraphBuilder()
    x, weight = builder.tokens(), builder.parameter(6)
    builder.call(aten.neg.default, weight)
    assert run(builder, builder.call(aten.add.Tensor, x, weight)) == ([], {})
