"""densify: dense operators read mixed maps, and conversions that undo each other vanish."""

from __future__ import annotations

from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.ir import recorded, to_map, to_rows, update
from fisedit_compile.passes.common.report import Report
from fisedit_compile.passes.sparsify.densify import densify
from support.graphs import GraphBuilder, aten, calls, dense_reasons, layout, names, outputs, spell, targets, text

RELU, FLIP = aten.relu.default, aten.flip.default


def run(builder: GraphBuilder, *results):
    module, report = builder.module(*results), Report()
    densify(Compilation(module, report=report))
    before = text(module)
    densify(Compilation(module))
    assert text(module) == before, "a second run changes the graph"
    return module, report


def rewritten(builder: GraphBuilder, x, origin: str = "y"):
    """What a sparsify pass leaves behind: an operator on rows, and the map that stands for its node."""
    rows = builder.marker(RELU, builder.marker(to_rows, x))
    return builder.marker(to_map, rows, like=x, origin=origin)


def test_condition_1_an_input_is_read_through_its_active_rows() -> None:
    builder = GraphBuilder()
    x = builder.picture()
    module, report = run(builder, rewritten(builder, x))
    assert spell(outputs(module)[0]) == ("to_map", ("aten.relu", ("to_rows", "x")))
    assert report.dense_nodes == []


def test_condition_1_a_dense_operator_reads_and_makes_mixed_maps() -> None:
    builder = GraphBuilder()
    x = builder.picture()
    flipped = builder.call(FLIP, x, [3], spatial="bchw")
    flipped.meta["dense_reason"] = "no rule"
    gone = builder.call(aten.mean.dim, flipped, [2, 3])
    module, report = run(builder, rewritten(builder, flipped), gone)
    mixed = ("to_map", ("to_rows", "x"))
    rows = ("to_rows", ("aten.flip", mixed, [3]))
    assert spell(outputs(module)[0]) == ("to_map", ("aten.relu", rows))
    assert spell(outputs(module)[1]) == ("aten.mean.dim", ("to_map", rows), [2, 3])
    assert dense_reasons(report) == {flipped.name: "no rule", gone.name: "its pass is disabled"}
    # One conversion in each direction, however many readers there are.
    assert targets(module).count(to_rows) == 2 and targets(module).count(to_map) == 3


def test_condition_1_mixed_maps_carry_value_layout_and_origin() -> None:
    builder = GraphBuilder()
    x = builder.picture()
    flipped = builder.call(FLIP, x, [3], spatial="bchw")
    module, _ = run(builder, flipped)
    maps = [node for node in calls(module) if node.target is to_map]
    assert [node.meta["origin"] for node in maps] == ["x", flipped.name]
    assert all(node.meta["spatial"] == layout("bchw") for node in maps)
    assert [tuple(node.meta["val"].shape) for node in maps] == [(2, 6, 5, 4)] * 2
    assert outputs(module) == (maps[1],)


def test_condition_1_an_input_that_is_an_output_is_mixed() -> None:
    builder = GraphBuilder()
    module, report = run(builder, builder.picture())
    assert spell(outputs(module)[0]) == ("to_map", ("to_rows", "x"))
    assert report.dense_nodes == []


def test_conversions_stay_behind_the_inputs() -> None:
    builder = GraphBuilder()
    x = builder.picture()
    total = builder.call(FLIP, x, [2])
    builder.picture(name="y")
    module, _ = run(builder, total)
    assert [node.op for node in module.graph.nodes][:2] == ["placeholder", "placeholder"]
    module.graph.lint()


def test_condition_1_pieces_of_a_dense_operator_are_mixed_one_by_one() -> None:
    builder = GraphBuilder()
    cut = builder.call(aten.chunk.default, builder.picture(), 2, 1)
    pieces = [builder.piece(cut, number, spatial="bchw") for number in range(2)]
    module, report = run(builder, *pieces)
    for number, node in enumerate(outputs(module)):
        piece = ("getitem", ("aten.chunk", ("to_map", ("to_rows", "x")), 2, 1), number)
        assert spell(node) == ("to_map", ("to_rows", piece))
    assert list(dense_reasons(report)) == [cut.name]


def test_condition_2_rows_of_a_map_of_rows_are_the_rows() -> None:
    builder = GraphBuilder()
    first = rewritten(builder, builder.picture(), "first")
    second = rewritten(builder, first, "second")
    module, report = run(builder, second)
    assert spell(outputs(module)[0]) == ("to_map", ("aten.relu", ("aten.relu", ("to_rows", "x"))))
    assert targets(module) == [to_rows, RELU, RELU, to_map]
    assert report.matches["densify"] >= 1


def test_condition_3_values_that_are_not_spatial_are_left_alone() -> None:
    builder = GraphBuilder()
    prompt = builder.input(2, 7, 6, name="prompt")
    shifted = builder.call(aten.flip.default, prompt, [1])
    module, report = run(builder, shifted)
    assert targets(module) == [FLIP] and names(shifted.args[:1]) == ["prompt"]
    assert report.dense_nodes == [] and not report.matches


def test_condition_3_updates_live_as_long_as_what_they_update() -> None:
    builder = GraphBuilder()
    x = builder.picture()
    rows = builder.marker(to_rows, x)
    read, unread = (builder.marker(recorded, "x", name) for name in ("rows", "map"))
    builder.marker(update, read, rows)
    builder.marker(update, unread, rows)
    taps = builder.marker(torch_taps(), rows, read)
    module, _ = run(builder, builder.marker(to_map, taps, like=x))
    assert [spell(node)[1] for node in calls(module) if node.target is update] == [("recorded", "x", "rows")]
    assert targets(module).count(recorded) == 1


def torch_taps():
    """Any operator that reads rows and a recorded map."""
    return aten.add.Tensor
