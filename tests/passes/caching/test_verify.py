"""verify: every invariant of a finished program, broken once."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import fx

from fisedit_compile.errors import GraphError
from fisedit_compile.passes import DenseProgram, GraphInput, Program
from fisedit_compile.passes.caching.verify import check_program, verify
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.ir import MARKERS
from support.execution import compile_graph
from support.graphs import GraphBuilder, aten, outputs


def program() -> Program:
    """A convolution and a norm: a prologue, plans, several sites."""
    builder = GraphBuilder()
    conv = builder.call(aten.conv2d.default, builder.picture(), builder.parameter(6, 6, 3, 3), None, [1, 1], [1, 1])
    return compile_graph(builder, builder.call(aten.group_norm.default, conv, 2))


def returning(module: fx.GraphModule, values: tuple) -> fx.GraphModule:
    """The module with other outputs."""
    output = next(iter(reversed(module.graph.nodes)))
    output.args = (values,)
    module.recompile()
    return module


def test_a_finished_program_passes_as_often_as_one_likes() -> None:
    built = program()
    assert built.prologue is not None
    compilation = Compilation(built.record, program=built)
    verify(compilation)
    verify(compilation)
    assert compilation.program is built


def test_without_a_program_there_is_nothing_to_verify() -> None:
    with pytest.raises(GraphError, match="make_program has to run first"):
        verify(Compilation(program().record))


def test_a_program_without_edit_graphs_passes() -> None:
    built = program()
    check_program(DenseProgram(**{field.name: getattr(built, field.name) for field in fields(Program)}))


@pytest.mark.parametrize("marker", MARKERS)
@pytest.mark.parametrize("graph", ["record", "edit", "edit_save", "prologue"])
def test_condition_1_no_marker_is_left(graph, marker) -> None:
    built = program()
    module = getattr(built, graph)
    with module.graph.inserting_before(next(iter(reversed(module.graph.nodes)))):
        left = module.graph.call_function(marker, ())
    with pytest.raises(GraphError, match=f"marker nodes are left: {left.name}"):
        check_program(built)


def test_condition_2_the_record_graph_returns_every_store() -> None:
    built = program()
    returning(built.record, outputs(built.record)[:-1])
    with pytest.raises(GraphError, match="the record graph misses a store"):
        check_program(built)


def test_condition_3_there_is_a_placeholder_for_each_input() -> None:
    built = program()
    count = len(built.edit_inputs)
    with pytest.raises(GraphError, match=f"{count} placeholders for {count - 1} edit inputs"):
        check_program(replace(built, edit_inputs=built.edit_inputs[:-1]))


@pytest.mark.parametrize(
    ("graph", "text"),
    [("edit", "the edit graph misses an output"), ("edit_save", "the saving edit graph misses an update")],
)
def test_condition_3_edit_graphs_return_outputs_and_updates(graph, text) -> None:
    built = program()
    module = getattr(built, graph)
    returning(module, outputs(module)[:-1])
    with pytest.raises(GraphError, match=text):
        check_program(built)


def test_condition_4_recorded_inputs_name_sites() -> None:
    built = program()
    inputs = tuple(
        GraphInput("recorded", "elsewhere") if source.kind == "recorded" else source for source in built.edit_inputs
    )
    with pytest.raises(GraphError, match=r"inputs read unknown sites: \['elsewhere'\]"):
        check_program(replace(built, edit_inputs=inputs))


def test_condition_5_site_names_are_unique() -> None:
    built = program()
    with pytest.raises(GraphError, match="two cache sites share a name"):
        check_program(replace(built, sites=(*built.sites[:-1], built.sites[0])))


def test_markers_cannot_be_run() -> None:
    for marker in MARKERS:
        with pytest.raises(GraphError, match=f"marker node {marker.__name__} was executed"):
            marker(torch.ones(1))


@pytest.mark.parametrize("graph", ["record", "edit", "edit_save", "prologue"])
def test_condition_6_a_graph_that_reads_a_value_before_it_is_made(graph) -> None:
    built = program()
    module = getattr(built, graph)
    node = next(node for node in module.graph.nodes if node.op == "call_function")
    first = next(iter(module.graph.nodes))
    first.append(module.graph.call_function(aten.neg.default, (node,)))
    with pytest.raises(GraphError, match="a lifted graph is broken"):
        check_program(built)
