"""collapse: a graph that runs as a whole is one operator without a rule."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fisedit_compile.errors import GraphError
from fisedit_compile.options import Options
from fisedit_compile.passes import DenseProgram, build_program
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.ir import to_map, to_rows, unknown
from fisedit_compile.passes.common.opaque import Opaque
from fisedit_compile.passes.common.program import InputInfo
from fisedit_compile.passes.common.report import Miss, Report
from fisedit_compile.passes.domains.collapse import collapse
from fisedit_compile.passes.domains.propagate_domains import NO_INPUT
from fisedit_compile.passes.sparsify.densify import densify
from fisedit_compile.runtime.spec import Domain
from support.graphs import (
    BATCH_SIZE,
    DOMAIN,
    PICTURE,
    GraphBuilder,
    aten,
    calls,
    layout,
    only,
    outputs,
    targets,
    text,
)
from support.tolerances import assert_identical


class Ran:
    """Stands for the graph: keeps its arguments."""

    def __init__(self, *results: Tensor) -> None:
        self.results, self.given = results, ()

    def __call__(self, *arguments: Any) -> tuple[Tensor, ...]:
        self.given = arguments
        return self.results


def opaque(*strides: tuple[int, ...] | None, run: Any = None, changed: tuple[int, ...] = ()) -> Opaque:
    return Opaque(run or Ran(), "it is random", strides or (None,), changed)


def run(builder: GraphBuilder, whole: Opaque, *results: fx.Node, report: Report | None = None) -> fx.GraphModule:
    module = builder.module(*results)
    collapse(Compilation(module, opaque=whole, report=report or Report()))
    before = text(module)
    collapse(Compilation(module, opaque=whole))
    assert text(module) == before, "a second run changes the graph"
    return module


def traced(builder: GraphBuilder) -> tuple[fx.Node, fx.Node]:
    """A map behind an operator, and a vector made of it."""
    flipped = builder.call(aten.flip.default, builder.picture(), [3], spatial="bchw")
    return flipped, builder.call(aten.mean.dim, flipped, [2, 3])


def test_condition_1_one_call_makes_all_outputs() -> None:
    builder, whole = GraphBuilder(), opaque()
    module = run(builder, whole, *traced(builder))
    assert targets(module) == [whole, operator.getitem, operator.getitem]
    call, (image, vector) = only(module, whole), outputs(module)
    assert [node.name for node in call.args] == ["x"]
    assert image.args == (call, 0) and vector.args == (call, 1)
    assert tuple(image.meta["val"].shape) == PICTURE and tuple(vector.meta["val"].shape) == PICTURE[:2]
    assert image.meta["spatial"] == layout("bchw") and "spatial" not in vector.meta
    assert [node.meta["origin"] for node in calls(module)] == [node.name for node in calls(module)]


def test_condition_3_a_reason_why_nothing_is_masked_is_appended() -> None:
    builder, report = GraphBuilder(), Report(dense_reason="no picture")
    run(builder, opaque(), *traced(builder), report=report)
    assert report.dense_reason == "it is random; moreover no picture" and report.dense_nodes == []


def test_condition_1_it_is_dense_and_its_borders_are_mixed() -> None:
    builder, whole, report = GraphBuilder(), opaque(), Report()
    module = run(builder, whole, *traced(builder), report=report)
    densify(Compilation(module, report=report))
    (given,) = only(module, whole).args
    assert given.target is to_map and given.args[0].target is to_rows
    image, vector = outputs(module)
    assert image.target is to_map and image.args[0].args[0].args == (only(module, whole), 0)
    assert vector.args == (only(module, whole), 1)
    assert report.dense_nodes == [Miss("trace", "opaque", "the whole graph", "it is random")]


def test_condition_2_an_input_changed_in_place_is_given_as_it_is() -> None:
    builder, whole = GraphBuilder(), opaque(None, None, changed=(0,))
    x, y = builder.picture(), builder.picture()
    module = run(builder, whole, builder.call(aten.add.Tensor, x, y, spatial="bchw"))
    densify(Compilation(module))
    first, second = only(module, whole).args
    assert first.op == "placeholder" and second.target is to_map


def test_condition_3_what_is_gone_leaves_the_report() -> None:
    builder, report = GraphBuilder(), Report()
    made = traced(builder)
    report.match("canonicalize")
    report.miss("propagate_domains", made[0], "no rule")
    report.flow.add_edge("a", "b", kind="rows")
    run(builder, opaque(), *made, report=report)
    assert dict(report.matches) == {"collapse": 1} and not report.misses and not report.connections


@pytest.mark.parametrize(
    ("strides", "expected"),
    [
        ((120, 20, 4, 1), (120, 20, 4, 1)),
        ((120, 1, 24, 6), (120, 1, 24, 6)),
        ((960, 120, 12, 2), (960, 120, 12, 2)),
        ((0, 20, 4, 1), (120, 20, 4, 1)),
    ],
)
def test_the_graph_gets_tensors_that_lie_as_it_knows_them(strides: tuple[int, ...], expected: tuple[int, ...]) -> None:
    ran = Ran()
    values = [torch.randn(PICTURE), torch.randn(PICTURE).contiguous(memory_format=torch.channels_last), 3]
    opaque(strides, strides, None, run=ran)(*values)
    for given, value in zip(ran.given[:2], values, strict=False):
        assert given.stride() == expected or given is value
        assert_identical(given, value)
    assert ran.given[2] == 3


def test_a_tensor_that_lies_right_is_the_very_tensor() -> None:
    ran, x = Ran(), torch.randn(PICTURE)
    opaque(x.stride(), run=ran)(x)
    assert ran.given[0] is x


def test_an_input_changed_in_place_is_the_very_tensor() -> None:
    ran, x = Ran(), torch.randn(PICTURE)
    opaque((120, 1, 24, 6), run=ran, changed=(0,))(x)
    assert ran.given[0] is x


def outline(*shapes: tuple[int, ...]) -> tuple[GraphBuilder, list[fx.Node]]:
    """A picture, and outputs of which nothing else is known."""
    builder = GraphBuilder()
    x = builder.input(*PICTURE)
    return builder, [builder.marker(unknown, x, val=torch.empty(shape, device="meta")) for shape in shapes]


def program_of(*shapes: tuple[int, ...]) -> Any:
    builder, results = outline(*shapes)
    return build_program(builder.module(*results), builder.infos, Options(), opaque())


def test_an_outline_tells_maps_by_their_shapes() -> None:
    tokens = (BATCH_SIZE, DOMAIN.size, 7)
    program = program_of((BATCH_SIZE, 7, 3, 2), (BATCH_SIZE, 7), tokens, (1, 7, 3, 2), (BATCH_SIZE, 7, 1, 1))
    sites = {site.name: (site.kind, site.domain) for site in program.sites}
    assert sites == {
        "output:0": ("spatial", Domain(3, 2)),
        "output:1": ("value", None),
        "output:2": ("spatial", DOMAIN),
        "output:3": ("value", None),
        "output:4": ("value", None),
        "x:map": ("spatial", DOMAIN),
    }
    assert program.report.dense_reason is None and program.mask_domain == DOMAIN


def test_an_outline_whose_shapes_do_not_tell_is_not_masked() -> None:
    size = DOMAIN.height
    program = program_of((BATCH_SIZE, size, DOMAIN.width, DOMAIN.height, DOMAIN.width))
    assert isinstance(program, DenseProgram)
    assert "an unknown operator" in program.report.dense_reason and "it is random" in program.report.dense_reason


def test_an_outline_without_a_picture_is_not_masked() -> None:
    builder = GraphBuilder()
    tokens = builder.input(2, 20, 6)
    module = builder.module(builder.marker(unknown, tokens, val=torch.empty(2, 20, 6, device="meta")))
    program = build_program(module, builder.infos, Options(), opaque())
    hint = "option tokens makes one of tokens [B, H * W, C], here of x"
    assert isinstance(program, DenseProgram)
    assert program.report.dense_reason == f"it is random; moreover {NO_INPUT}; {hint}"


def test_only_the_graph_itself_is_run() -> None:
    """No pass may call it: it may have effects."""

    def refuse(*arguments: Any) -> None:
        raise AssertionError("the graph was run")

    builder, results = outline(PICTURE)
    program = build_program(builder.module(*results), builder.infos, Options(), opaque(run=refuse))
    for graph_module in (program.record, program.edit, program.edit_save):
        found = [node for node in graph_module.graph.nodes if isinstance(node.target, Opaque)]
        assert len(found) == 1
    assert program.prologue is None and program.invariants is None


def test_state_is_neither_hoisted_nor_compared() -> None:
    builder, results = outline(PICTURE)
    builder.infos.append(InputInfo("state", "count"))
    builder._placeholder("count").meta["val"] = torch.empty(3, device="meta")
    program = build_program(builder.module(*results), builder.infos, Options(), opaque(None, None))
    assert program.parameter_positions == program.scalar_positions == ()


def test_the_stand_in_of_an_outline_cannot_run() -> None:
    builder, results = outline(PICTURE)
    with pytest.raises(GraphError, match="unknown"):
        builder.module(*results)(torch.zeros(PICTURE))
