"""deferred: a module that makes its code when it is run, and makes it anew when told that its graph changed."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from fisedit_compile.passes.common.deferred import DeferredModule, copy_graph
from support.graphs import GraphBuilder, aten
from support.tolerances import assert_identical


@pytest.fixture
def module() -> DeferredModule:
    builder = GraphBuilder()
    x = builder.input(2, 3)
    shift = builder.constant(torch.ones(3))
    plain = builder.module(builder.call(aten.add.Tensor, builder.call(aten.neg.default, x), shift))
    return DeferredModule(plain, plain.graph)


def negation(module: fx.GraphModule) -> fx.Node:
    return next(node for node in module.graph.nodes if node.target is aten.neg.default)


def test_it_runs_as_often_as_one_likes(module) -> None:
    x = torch.randn(2, 3)
    for _ in range(3):
        assert_identical(module(x)[0], 1 - x, "called")
        assert_identical(module.forward(x)[0], 1 - x, "its forward")


def test_no_code_is_made_before_it_runs(module, monkeypatch) -> None:
    made: list[fx.Graph] = []
    write = fx.Graph.python_code

    def counted(graph: fx.Graph, *arguments, **keywords):
        made.append(graph)
        return write(graph, *arguments, **keywords)

    monkeypatch.setattr(fx.Graph, "python_code", counted)
    other = DeferredModule(module, module.graph)
    other.recompile()
    assert made == []
    other(torch.zeros(2, 3))
    other(torch.zeros(2, 3))
    assert len(made) == 1


@pytest.mark.parametrize("ran", [False, True])
def test_a_changed_graph_is_what_runs_after_recompile(module, ran) -> None:
    x = torch.randn(2, 3)
    if ran:
        module(x)
    negation(module).target = aten.abs.default
    module.recompile()
    assert_identical(module(x)[0], x.abs() + 1, "changed")


def test_modules_do_not_share_their_code(module) -> None:
    x = torch.randn(2, 3)
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    other = DeferredModule(module, graph)
    negation(other).target = aten.abs.default
    assert_identical(module(x)[0], 1 - x, "the first")
    assert_identical(other(x)[0], x.abs() + 1, "the second")


def test_its_code_is_that_of_its_graph(module) -> None:
    assert "aten.neg.default" in module.code
    negation(module).target = aten.abs.default
    assert "aten.abs.default" in module.code and "aten.neg.default" not in module.code


def test_a_copied_graph_can_be_changed(module) -> None:
    x = torch.randn(2, 3)
    copy = copy_graph(module)
    assert copy.code == module.code
    negation(copy).target = aten.abs.default
    copy.recompile()
    assert_identical(module(x)[0], 1 - x, "the first")
    assert_identical(copy(x)[0], x.abs() + 1, "the copy")


def test_a_copy_with_fewer_outputs_computes_no_more_than_these() -> None:
    builder = GraphBuilder()
    x = builder.input(2, 3)
    kept = builder.call(aten.neg.default, x)
    copy = copy_graph(builder.module(kept, builder.call(aten.abs.default, x)), "Fewer", 1)
    assert type(copy).__name__ == "Fewer"
    assert [node.target for node in copy.graph.nodes if node.op == "call_function"] == [aten.neg.default]
    (result,) = copy(torch.ones(2, 3))
    assert_identical(result, -torch.ones(2, 3), "the first output")
