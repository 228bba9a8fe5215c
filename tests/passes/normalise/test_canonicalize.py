"""canonicalize: which copies, casts and dropouts vanish, and which must stay."""

from __future__ import annotations

import pytest
import torch

from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.report import Report
from fisedit_compile.passes.normalise.canonicalize import canonicalize
from support.graphs import GraphBuilder, aten, only, outputs, reasons, targets, text

RELU = aten.relu.default


def run(builder: GraphBuilder, *results):
    module, report = builder.module(*results), Report()
    canonicalize(Compilation(module, report=report))
    module.graph.lint()
    again = text(module)
    canonicalize(Compilation(module))
    assert text(module) == again, "a second run changes the graph"
    return module, report


@pytest.mark.parametrize(
    "copy",
    [
        lambda b, x: b.call(aten.clone.default, x),
        lambda b, x: b.call(aten.clone.default, x, memory_format=torch.channels_last),
        lambda b, x: b.call(aten.contiguous.default, x),
        lambda b, x: b.call(aten.detach.default, x),
        lambda b, x: b.call(aten.alias.default, x),
        lambda b, x: b.call(aten.to.dtype, x, torch.float32),
        lambda b, x: b.call(aten._to_copy.default, x, dtype=torch.float32, memory_format=torch.channels_last),
        lambda b, x: b.call(aten.to.device, x, torch.device("cpu"), torch.float32),
        lambda b, x: b.call(aten.expand.default, x, [2, 6, 5, 4]),
        lambda b, x: b.call(aten.slice.Tensor, x, 2, -5),
        lambda b, x: b.call(aten.dropout.default, x, 0.1, False),
        lambda b, x: b.call(aten.dropout.default, x, 0.0, True),
        lambda b, x: b.call(aten.feature_dropout.default, x, 0.5, False),
        lambda b, x: b.call(aten.clone.default, b.call(aten.detach.default, b.call(aten.clone.default, x))),
    ],
)
def test_what_changes_no_value_is_dropped(copy) -> None:
    builder = GraphBuilder()
    x = builder.picture()
    relu = builder.call(RELU, copy(builder, x))
    before = sum(node.op == "call_function" for node in builder.graph.nodes)
    module, report = run(builder, relu)
    assert targets(module) == [RELU]
    assert only(module, RELU).args == (x,)
    assert report.matches["canonicalize"] == before - 1
    assert reasons(report) == []


def test_a_constant_is_read_without_its_copy() -> None:
    builder = GraphBuilder()
    x = builder.picture()
    constant = builder.constant(torch.ones(4))
    total = builder.call(aten.add.Tensor, x, builder.call(aten.lift_fresh_copy.default, constant))
    module, _ = run(builder, total)
    assert only(module, aten.add.Tensor).args == (x, constant)


def test_type_as_becomes_a_cast_that_is_dropped_when_idle() -> None:
    builder = GraphBuilder()
    x, half = builder.picture(), builder.input(3, name="half", dtype=torch.float16)
    cast = builder.call(aten.type_as.default, x, half)
    idle = builder.call(aten.type_as.default, cast, half)
    module, report = run(builder, builder.call(RELU, idle))
    node = only(module, aten.to.dtype)
    assert node.args == (x, torch.float16) and node.meta["val"].dtype == torch.float16
    assert only(module, RELU).args == (node,)
    assert report.matches["canonicalize"] == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda b, x: b.call(aten.to.dtype, x, torch.float16),
        lambda b, x: b.call(aten._to_copy.default, x, dtype=torch.float64),
        lambda b, x: b.call(aten.expand.default, x, [3, 2, 6, 5, 4]),
    ],
)
def test_what_changes_dtype_or_shape_stays(change) -> None:
    builder = GraphBuilder()
    changed = change(builder, builder.picture())
    module, report = run(builder, builder.call(RELU, changed))
    assert targets(module) == [changed.target, RELU]
    assert report.matches["canonicalize"] == 0


@pytest.mark.parametrize("target", [aten.dropout.default, aten.feature_dropout.default])
def test_dropout_in_training_stays_and_is_reported(target) -> None:
    builder = GraphBuilder()
    dropped = builder.call(target, builder.picture(), 0.1, True)
    module, report = run(builder, builder.call(RELU, dropped))
    assert targets(module) == [target, RELU]
    assert reasons(report, "canonicalize") == ["dropout in training mode is random"]
    assert report.misses[0].node == dropped.name


def test_a_copy_that_is_an_output_stays() -> None:
    """A caller may write into one output; the other must not change with it."""
    builder = GraphBuilder()
    relu = builder.call(RELU, builder.picture())
    inner = builder.call(aten.clone.default, relu)
    copy = builder.call(aten.clone.default, inner)
    module, _ = run(builder, relu, copy)
    assert outputs(module) == (relu, copy)
    assert copy.args == (relu,)


def test_a_view_that_is_an_output_is_dropped() -> None:
    builder = GraphBuilder()
    relu = builder.call(RELU, builder.picture())
    module, _ = run(builder, builder.call(aten.detach.default, relu))
    assert outputs(module) == (relu,)


@pytest.mark.parametrize("target", [aten.clone.default, aten.detach.default, aten.alias.default])
def test_what_stands_between_an_input_and_an_output_stays(target) -> None:
    builder = GraphBuilder()
    x = builder.picture()
    copy = builder.call(target, x)
    module, _ = run(builder, copy)
    assert outputs(module) == (copy,) and copy.args == (x,)


def test_a_constant_that_is_an_output_is_copied() -> None:
    builder = GraphBuilder()
    fresh = builder.call(aten.lift_fresh_copy.default, builder.constant(torch.ones(4)))
    module, _ = run(builder, builder.call(aten.detach.default, fresh))
    assert outputs(module) == (fresh,)


def test_a_copy_over_another_value_is_what_was_copied() -> None:
    builder = GraphBuilder()
    x, y = builder.picture(), builder.picture(name="y")
    module, report = run(builder, builder.call(RELU, builder.call(aten.copy.default, x, y)))
    assert targets(module) == [RELU] and only(module, RELU).args == (y,)
    assert report.matches == {"canonicalize": 1}


@pytest.mark.parametrize("other", [(6, 1, 1), (2, 6, 5, 4)])
def test_a_copy_that_broadcasts_or_casts_stays(other) -> None:
    builder = GraphBuilder()
    x, y = builder.picture(), builder.input(*other, name="y", dtype=torch.float64)
    module, _ = run(builder, builder.call(RELU, builder.call(aten.copy.default, x, y)))
    assert targets(module) == [aten.copy.default, RELU]


def test_a_copy_over_another_value_that_is_an_output_stays() -> None:
    builder = GraphBuilder()
    x, y = builder.picture(), builder.call(RELU, builder.picture(name="y"))
    copy = builder.call(aten.copy.default, x, y)
    module, _ = run(builder, y, copy)
    assert outputs(module) == (y, copy)


def test_unused_nodes_vanish_and_inputs_stay() -> None:
    builder = GraphBuilder()
    x, y = builder.picture(), builder.picture(name="y")
    builder.call(RELU, y)
    kept = builder.call(aten.neg.default, x)
    module, _ = run(builder, kept)
    assert targets(module) == [aten.neg.default]
    assert [node.name for node in module.graph.nodes if node.op == "placeholder"] == ["x", "y"]


def test_an_einsum_of_one_operand_is_a_permutation() -> None:
    builder = GraphBuilder()
    x = builder.picture()
    moved = builder.call(aten.einsum.default, "nchw -> nhwc", [x])
    module, _ = run(builder, builder.call(RELU, moved))
    assert only(module, aten.permute.default).args == (x, [0, 2, 3, 1])
    assert aten.einsum.default not in targets(module)


@pytest.mark.parametrize("equation", ["nchw->nhw", "nchw", "n...->...n", "nchw,cd->ndhw"])
def test_other_einsums_stay(equation) -> None:
    builder = GraphBuilder()
    x, weight = builder.picture(), builder.parameter(6, 3)
    node = builder.call(aten.einsum.default, equation, [x, weight] if "," in equation else [x])
    module, _ = run(builder, builder.call(RELU, node))
    assert targets(module) == [aten.einsum.default, RELU]


@pytest.mark.parametrize(
    ("target", "arguments", "number"),
    [(aten.new_zeros.default, (), 0), (aten.new_ones.default, (), 1), (aten.new_full.default, (0.5,), 0.5)],
)
@pytest.mark.parametrize("options", [{}, {"dtype": torch.int64}])
def test_a_new_tensor_reads_no_map(target, arguments, number, options) -> None:
    builder = GraphBuilder()
    node = builder.call(target, builder.picture(), [3, 4], *arguments, **options)
    module, _ = run(builder, builder.call(RELU, node))
    full = only(module, aten.full.default)
    assert targets(module) == [aten.full.default, RELU]
    assert full.args == ([3, 4], number) and full.meta["val"].shape == (3, 4)
    assert full.kwargs == {"dtype": options.get("dtype", torch.float32), "device": torch.device("cpu")}


def test_a_new_tensor_without_a_number_stays() -> None:
    builder = GraphBuilder()
    node = builder.call(aten.new_empty.default, builder.picture(), [3, 4])
    module, _ = run(builder, builder.call(RELU, node))
    assert targets(module) == [aten.new_empty.default, RELU]


@pytest.mark.parametrize("others", [False, True])
def test_a_batch_norm_of_running_statistics_has_one_spelling(others) -> None:
    builder = GraphBuilder()
    x = builder.picture()
    parameters = [builder.parameter(6, name=f"p{number}") for number in range(4)]
    norm = builder.call(aten._native_batch_norm_legit_no_training.default, x, *parameters, 0.1, 1e-5)
    results = [builder.call(RELU, builder.piece(norm, number)) for number in ((0, 1) if others else (0,))]
    module, _ = run(builder, *results)
    if others:  # what else it returns is read
        assert aten.batch_norm.default not in targets(module)
        return
    assert targets(module) == [aten.batch_norm.default, RELU]
    assert only(module, aten.batch_norm.default).args == (x, *parameters, False, 0.1, 1e-5, False)
