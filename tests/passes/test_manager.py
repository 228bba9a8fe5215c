"""build_program: order, disabled passes, dumps, and what a program says about itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fisedit_compile import passes
from fisedit_compile.errors import GraphError, OptionError
from fisedit_compile.options import Options
from fisedit_compile.passes import DenseProgram, Program, SparseProgram, manager
from fisedit_compile.passes.common.ir import MARKERS
from fisedit_compile.passes.manager import OPTIONAL, PASSES, families
from fisedit_compile.runtime.spec import Domain
from support.execution import Edit, compile_graph, dense_inputs, random_inputs, record, some_mask
from support.graphs import GraphBuilder, aten, calls, targets
from support.small_unet import PICTURE, small_unet
from support.tolerances import assert_near

#: All passes in their order; ``collapse`` runs for opaque graphs only.
ORDER = """
    declare_tokens canonicalize expand_layers join_slices normalise_attention undo_merges unfold_windows split_joined
    propagate_domains collapse copy_record sparsify_conv sparsify_norm sparsify_attention sparsify_linear
    sparsify_layout sparsify_complex sparsify_pointwise resample densify count_macs fold_attention lower_conversions
    insert_cache_ops hoist_invariants choose_convolution pack_weights hoist_parameters convolve_maps multiply_maps
    lift_cache_io stabilise make_program verify
""".split()
USUAL = [name for name in ORDER if name != "collapse"]
FAMILIES = ORDER[ORDER.index("sparsify_conv") : ORDER.index("densify")]
FINE, COARSE = Domain(9, 7), Domain(5, 4)


@pytest.fixture(scope="module")
def program() -> SparseProgram:
    builder, output = small_unet()
    return compile_graph(builder, output)


def test_passes_run_in_their_literal_order(program: Program) -> None:
    assert [step.name for step in PASSES] == ORDER
    assert list(program.report.seconds) == USUAL
    assert all(seconds >= 0 for seconds in program.report.seconds.values())


@pytest.mark.parametrize("step", PASSES, ids=lambda step: step.name)
def test_an_entry_says_what_its_pass_is(step: manager.Pass) -> None:
    assert step.name == step.run.__name__ and (Path(passes.__file__).parent / step.file).is_file()
    assert step.stage in ("normalise", "domains", "sparsify", "caching", "processor")


@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        (Options(lowering="inductor"), {"choose_convolution", "pack_weights"}),
        (Options(convolution="rows"), {"choose_convolution"}),
        (Options(packing=0), {"pack_weights"}),
    ],
)
def test_conditions_of_the_list(options: Options, left_out: set[str]) -> None:
    builder, output = small_unet()
    assert set(USUAL) - set(compile_graph(builder, output, options=options).report.seconds) == left_out


def test_a_list_that_makes_no_program_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager, "PASSES", PASSES[:2])
    builder, output = small_unet()
    with pytest.raises(GraphError, match="make_program is missing"):
        compile_graph(builder, output)


def test_a_pass_in_front_of_what_it_needs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    (early,) = [step for step in PASSES if step.name == "fold_attention"]
    monkeypatch.setattr(manager, "PASSES", (early, *PASSES))
    builder, output = small_unet()
    with pytest.raises(GraphError, match="the graph record is needed, but no pass has made it"):
        compile_graph(builder, output)


def test_families_cover_the_sparsifying_passes_in_order() -> None:
    assert [family.name for family in families(Options())] == FAMILIES


def test_every_node_of_the_small_network_becomes_sparse(program: Program) -> None:
    report = program.report
    assert report.dense_nodes == [] and report.misses == []
    assert report.matches["sparsify_conv"] == 8 and report.matches["sparsify_norm"] == 5
    assert report.matches["sparsify_attention"] == 2 and report.matches["resample"] == 1
    assert report.matches["propagate_domains"] == 1
    sparse = {count.kind for count in report.mac_counts if count.domain is not None}
    assert sparse == {"convolution", "linear", "attention"}
    # Embedding and prompt are all that is left.
    dense = [count for count in report.mac_counts if count.domain is None]
    assert len(dense) == 5 and all(count.kind == "linear" for count in dense)
    assert report.connections["9x7", "5x4", "stencil"] == 1 and report.connections["5x4", "9x7", "stencil"] == 1


def test_a_program_says_what_it_needs(program: Program) -> None:
    assert (program.mask_domain, program.batch, program.output_count) == (FINE, 2, 1)
    assert program.domains == (COARSE, FINE)
    kinds = [(stencil.kind, stencil.source, stencil.target) for stencil in program.stencils]
    assert len(set(program.stencils)) == len(kinds)
    expected = {("window", FINE, FINE), ("window", FINE, COARSE), ("window", COARSE, COARSE), ("nearest", COARSE, FINE)}
    assert set(kinds) == expected
    placeholders = [node.name for node in program.record.graph.nodes if node.op == "placeholder"]
    assert placeholders[:3] == ["x", "embedding", "prompt"]
    given = len(placeholders) - len(program.dense_inputs)
    assert program.parameter_positions == tuple(range(3, given)) and program.scalar_positions == ()
    assert placeholders[given:] == [f"hoisted_{number}" for number in program.dense_inputs] != []
    assert program.sites == program.report.sites and program.report.bytes_stored == sum(s.bytes for s in program.sites)
    kinds = [source.kind for source in program.edit_inputs]
    assert {"argument", "plan", "recorded", "hoisted", "invariant"} == set(kinds)
    assert len(set(program.edit_inputs)) == len(kinds)


def test_nothing_dense_is_left_in_the_edit_graph(program: Program) -> None:
    names = [str(target) for target in targets(program.edit)]
    for name in ("conv2d", "group_norm", "upsample"):
        assert not any(name in target for target in names)
    assert names.count("fisedit.scatter_rows.default") == 1 and names.count("fisedit.gather_rows.default") == 1
    assert not any(target in MARKERS for target in targets(program.edit))


def test_scalars_are_told_from_other_inputs() -> None:
    builder = GraphBuilder()
    x = builder.picture(spatial=None)
    step = builder.input(2, name="step", kind="scalar")
    shift = builder.call(aten.reshape.default, step, [2, 1, 1, 1])
    conv = builder.call(aten.conv2d.default, x, builder.parameter(6, 6, 3, 3))
    built = compile_graph(builder, builder.call(aten.add.Tensor, conv, shift))
    assert built.scalar_positions == (1,) and built.parameter_positions == (2,)


def test_the_mask_refers_to_the_finest_input() -> None:
    builder = GraphBuilder()
    x, hint = builder.picture(spatial=None), builder.picture(2, 3, 10, 8, name="hint", spatial=None)
    pooled = builder.call(aten.conv2d.default, hint, builder.parameter(6, 3, 2, 2), None, [2, 2])
    built = compile_graph(builder, builder.call(aten.add.Tensor, x, pooled))
    assert built.mask_domain == Domain(10, 8) and built.domains == (Domain(5, 4), Domain(10, 8))


def test_a_graph_without_pictures_is_recorded_and_never_edited() -> None:
    builder = GraphBuilder()
    tokens = builder.input(2, 7, 6, name="tokens")
    built = compile_graph(builder, builder.call(aten.linear.default, tokens, builder.parameter(4, 6)))
    assert isinstance(built, DenseProgram) and built.graphs() == {"record": built.record}
    assert [(site.name, site.kind) for site in built.sites] == [("output:0", "value")]
    inputs = random_inputs(builder, 1)
    base = record(built, inputs)
    assert_near(base.outputs[0], inputs[0] @ inputs[1].T)
    assert_near(base.sites["output:0"], base.outputs[0])


TRANSFORMED, PACKED = 64 * 64 * 16 * 4, 64 * 64 * 9 * 4


@pytest.mark.parametrize(
    ("limit", "bytes_taken"),
    [
        (None, TRANSFORMED + PACKED),
        (TRANSFORMED + PACKED, TRANSFORMED + PACKED),
        (TRANSFORMED + PACKED - 1, TRANSFORMED),
        (TRANSFORMED - 1, PACKED),
        (PACKED - 1, 0),
    ],
)
def test_copies_of_weights_share_one_limit(limit: int | None, bytes_taken: int) -> None:
    builder = GraphBuilder()
    x = builder.picture(1, 64, 32, 32, spatial=None)
    result = builder.call(aten.conv2d.default, x, builder.parameter(64, 64, 3, 3), None, [1, 1], [1, 1])
    built = compile_graph(builder, result, options=Options(packing=limit))
    assert built.report.packed_bytes == bytes_taken


def small_edit(program: Program, builder: GraphBuilder):
    """Recorded and edited output of a program of the small network."""
    first = random_inputs(builder, 1)
    second = random_inputs(builder, 2, fixed=first)
    base = record(program, first)
    return base.outputs[0], Edit(program, base, second, some_mask(FINE, batch=2)).run()[0]


@pytest.fixture(scope="module")
def expected(program: Program) -> tuple[torch.Tensor, torch.Tensor]:
    """What every selection of passes must compute."""
    return small_edit(program, small_unet()[0])


def test_the_small_network_has_work_for_most_families(program: Program) -> None:
    names = ("conv", "norm", "attention", "linear", "layout", "pointwise")
    assert (
        all(program.report.matches[f"sparsify_{name}"] > 0 for name in names) and program.report.matches["resample"] > 0
    )


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_disabled_pass_leaves_its_operators_dense_and_results_right(program: Program, expected, name: str) -> None:
    builder, output = small_unet()
    built = compile_graph(builder, output, options=Options(disabled_passes=frozenset({name})))
    assert name not in built.report.seconds and built.report.matches[name] == 0
    faster = ("pack_weights", "hoist_invariants", "choose_convolution", "convolve_maps", "multiply_maps")
    if program.report.matches[name] == 0 and name not in faster:
        return  # The small network has nothing for it to do.
    if name in faster:
        # Its maps are small.
        assert program.report.matches[name] > 0 or name in ("choose_convolution", "convolve_maps")
        assert_near(small_edit(built, builder)[1], expected[1])
        return
    assert built.report.dense_nodes and {miss.reason for miss in built.report.dense_nodes} == {"its pass is disabled"}
    assert len(built.report.dense_nodes) == program.report.matches[name]
    assert built.report.sparse_mac_fraction <= program.report.sparse_mac_fraction
    recorded, edited = small_edit(built, builder)
    assert_near(recorded, expected[0])
    assert_near(edited, expected[1])


def test_all_passes_may_be_disabled(expected) -> None:
    builder, output = small_unet()
    built = compile_graph(builder, output, options=Options(disabled_passes=frozenset(OPTIONAL)))
    assert built.report.sparse_mac_fraction == 0.0
    assert_near(small_edit(built, builder)[1], expected[1])


def test_the_order_of_the_families_does_not_matter(expected, monkeypatch: pytest.MonkeyPatch) -> None:
    backwards, at = families(Options())[::-1], ORDER.index("sparsify_conv")
    rewriting = PASSES[at : at + len(FAMILIES)]
    monkeypatch.setattr(manager, "families", lambda options: backwards)
    monkeypatch.setattr(manager, "PASSES", (*PASSES[:at], *rewriting[::-1], *PASSES[at + len(FAMILIES) :]))
    builder, output = small_unet()
    built = compile_graph(builder, output)
    assert [name for name in built.report.seconds if name in FAMILIES] == FAMILIES[::-1]
    assert built.report.dense_nodes == []
    assert_near(small_edit(built, builder)[1], expected[1])


def test_passes_are_disabled_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FISEDIT_DISABLE_PASSES", " sparsify_conv,,resample ")
    builder, output = small_unet()
    report = compile_graph(builder, output, options=Options(disabled_passes=frozenset({"sparsify_norm"}))).report
    assert set(USUAL) - set(report.seconds) == {"sparsify_conv", "resample", "sparsify_norm"}


@pytest.mark.parametrize("name", ["sparsify_convolution", "densify", "lift_cache_io", "verify"])
def test_other_passes_cannot_be_disabled(name, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = GraphBuilder()
    output = builder.call(aten.relu.default, builder.picture())
    with pytest.raises(OptionError, match=f"cannot disable {name}; passes that can be disabled are expand_layers"):
        compile_graph(builder, output, options=Options(disabled_passes=frozenset({name})))
    monkeypatch.setenv("FISEDIT_DISABLE_PASSES", f"resample,{name}")
    builder = GraphBuilder()
    with pytest.raises(OptionError, match=f"cannot disable {name}"):
        compile_graph(builder, builder.call(aten.relu.default, builder.picture()))


def test_cached_norms_keep_no_partial_sums(program: Program) -> None:
    builder, output = small_unet()
    cached = compile_graph(builder, output, options=Options(norm="cached"))
    partial = [site.name for site in program.sites if "norm_partials" in site.name]
    assert len(partial) == 5
    assert not any("norm_partials" in site.name for site in cached.sites)
    assert cached.report.bytes_stored < program.report.bytes_stored


def test_graphs_are_dumped_behind_every_pass(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FISEDIT_DUMP_DIR", str(tmp_path / "dumps"))
    builder, output = small_unet()
    compile_graph(builder, output, options=Options(disabled_passes=frozenset({"resample"})))
    (folder,) = (tmp_path / "dumps").iterdir()
    files = sorted(folder.iterdir())
    changed = ["traced"]
    for step in PASSES:
        if step.name not in ("resample", "collapse"):
            both = len(step.works_on) == 2
            changed += [f"{step.name}_{graph}" if both else step.name for graph in step.works_on]
    assert changed[-2:] == ["lift_cache_io_record", "lift_cache_io_edit"] and "hoist_invariants_record" in changed
    assert [path.name for path in files] == [f"{number:02d}_{name}.txt" for number, name in enumerate(changed)]
    text = {path.name[3:-4]: path.read_text() for path in files}
    assert "fisedit" not in text["traced"] and "conv2d" in text["traced"]
    assert "conv_rows" in text["sparsify_conv"] and "conv_rows" not in text["propagate_domains"]
    assert "to_rows" in text["densify"] and "ir.to_rows" not in text["lower_conversions"]
    assert "recorded_" in text["lift_cache_io_edit"] and "norm_record" in text["lift_cache_io_record"]


def test_nothing_is_dumped_unasked(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FISEDIT_DUMP_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    builder = GraphBuilder()
    compile_graph(builder, builder.call(aten.relu.default, builder.picture()))
    assert list(tmp_path.iterdir()) == []


def test_the_record_graph_is_the_dense_graph_and_its_stores(program: Program) -> None:
    builder, output = small_unet()
    dense = builder.module(output)
    inputs = random_inputs(builder, 3)
    with torch.no_grad():
        results = program.record(*inputs, *dense_inputs(program, inputs))
        assert_near(results[0], dense(*inputs)[0])
    kept = [node.meta["origin"] for node in calls(program.record) if "origin" in node.meta]
    assert all(node.name in kept for node in calls(dense))
    assert results[0].shape == (PICTURE[0], 4, *PICTURE[2:])
