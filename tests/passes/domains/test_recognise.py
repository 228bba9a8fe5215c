"""recognise, size_probe: which densely computed values are maps again, where shapes alone do not tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import fx

from fisedit_compile.options import Options
from fisedit_compile.passes import DenseProgram, build_program
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.layouts import Spatial
from fisedit_compile.passes.common.report import Report
from fisedit_compile.passes.domains.geometry.size_probe import SizeProbe, Unknown
from fisedit_compile.passes.domains.propagate_domains import propagate_domains
from fisedit_compile.passes.manager import families
from fisedit_compile.runtime.spec import Domain
from support.graphs import GraphBuilder, aten, layout, reasons

SQUARE = Domain(8, 8)
CONV = aten.conv2d.default


def square(dims: str) -> Spatial:
    return layout(dims, SQUARE)


def picture(builder: GraphBuilder, channels: int = 64, size: tuple[int, int] = (8, 8)) -> fx.Node:
    """The output of a 1x1 convolution ``[2, channels, *size]``."""
    return builder.call(CONV, builder.input(2, 3, *size), builder.parameter(channels, 3, 1, 1))


def run(builder: GraphBuilder, *results: fx.Node) -> Report:
    compilation = Compilation(builder.module(*results), tuple(builder.infos), families=families(Options()))
    propagate_domains(compilation)
    return compilation.report


def found(builder: GraphBuilder, node: fx.Node, *results: fx.Node) -> Spatial | None:
    """The layout of ``node``, wherever it lies, in a graph that returns a convolution and ``results``."""
    run(builder, picture(builder, 5), *results)
    return wherever(node)


def wherever(node: fx.Node) -> Spatial | None:
    """The layout of a node, wherever on the mask it lies."""
    spatial = node.meta.get("spatial")
    return None if spatial is None else spatial.at()


PROVEN: list[tuple[str, Callable[[GraphBuilder, fx.Node], fx.Node], str | None]] = [
    ("flip", lambda b, x: b.call(aten.flip.default, x, [1]), "bchw"),
    ("roll", lambda b, x: b.call(aten.roll.default, x, [1], [3]), "bchw"),
    ("sort", lambda b, x: b.piece(b.call(aten.sort.default, x, 1), 0), "bchw"),
    ("places of a sort", lambda b, x: b.piece(b.call(aten.sort.default, x, 1), 1), "bchw"),
    ("scores of positions", lambda b, x: b.call(aten.bmm.default, *rows_and_columns(b, x, False)), "bsc"),
    ("scores of channels", lambda b, x: b.call(aten.bmm.default, *rows_and_columns(b, x, True)), None),
    ("mean of rows", lambda b, x: b.call(aten.mean.dim, x, [2]), None),
    ("half a spectrum", lambda b, x: b.call(aten.fft_rfft2.default, x), None),
]


def rows_and_columns(builder: GraphBuilder, x: fx.Node, channels: bool) -> list[fx.Node]:
    """The channels of a map and their transpose, or the positions and theirs; behind an operator without a rule."""
    flat = builder.call(aten.flip.default, builder.call(aten.flatten.using_ints, x, 2, 3), [1])
    turned = builder.call(aten.transpose.int, flat, 1, 2)
    return [flat, turned] if channels else [turned, flat]


@pytest.mark.parametrize("channels", [64, 8, 5])
@pytest.mark.parametrize(("name", "make", "dims"), PROVEN, ids=[case[0] for case in PROVEN])
def test_sizes_that_follow_the_map_are_proof(name, make, dims, channels) -> None:
    builder = GraphBuilder()
    node = make(builder, picture(builder, channels))
    assert found(builder, node) == (square(dims) if dims else None)


def test_a_transposed_map_has_its_rows_first() -> None:
    builder = GraphBuilder()
    turned = builder.call(aten.transpose.int, picture(builder, size=(8, 6)), 2, 3)
    node = builder.call(aten.flip.default, turned, [3])
    assert found(builder, node) == layout("bchw", Domain(6, 8))


@pytest.mark.parametrize(
    "make",
    [
        lambda b, x: b.call(aten.reshape.default, x, [2, 64, 64]),
        lambda b, x: b.call(aten.fft_irfft2.default, b.call(aten.fft_rfft2.default, x), [8, 8]),
        lambda b, x: b.call(aten.mul.Tensor, b.call(aten.amax.default, x, [2], True), b.parameter(1, 64, 8, 8)),
        lambda b, x: b.call(aten.matmul.default, b.parameter(8, 8), x),
    ],
)
def test_written_sizes_and_tables_prove_nothing(make) -> None:
    builder = GraphBuilder()
    x = picture(builder)
    node = make(builder, x)
    builder.module(node)
    x.meta["spatial"] = square("bchw")
    probe, answers = SizeProbe([x, *(n for n in builder.graph.nodes if x in _sources(n))], 2, {SQUARE}), {}
    for behind in builder.graph.nodes:
        if behind is not x and x in _sources(behind) and behind.op == "call_function":
            answers[behind] = probe.layout(behind)
    assert isinstance(answers[node], Unknown)


def _sources(node: fx.Node) -> set[fx.Node]:
    found = {node}
    for source in node.all_input_nodes:
        found |= _sources(source)
    return found


def test_two_resolutions_of_one_size_prove_nothing() -> None:
    builder = GraphBuilder()
    x = builder.picture(2, 5, 8, 8)
    tokens = builder.call(aten.flatten.using_ints, x, 2, 3, spatial=square("bcs"))
    node = builder.call(aten.flip.default, tokens, [1])
    assert isinstance(SizeProbe([x, tokens, node], 2, {SQUARE, Domain(4, 16)}).layout(node), Unknown)
    assert SizeProbe([x, tokens, node], 2, {SQUARE}).layout(node) == square("bcs")


def test_the_nearest_value_of_the_same_shape_lends_its_layout() -> None:
    builder = GraphBuilder()
    x = picture(builder)
    spectrum = builder.call(aten.fft_rfft2.default, x)
    node = builder.call(aten.fft_irfft2.default, spectrum, [8, 8])
    assert found(builder, node, node) == square("bchw") and "spatial" not in spectrum.meta


def test_a_refused_reshape_is_no_map() -> None:
    """Channels and rows folded into 64 are not the 64 positions."""
    builder = GraphBuilder()
    x = picture(builder, 8)
    folded = builder.call(aten.flatten.using_ints, x, 1, 2)
    scanned = builder.call(aten.cumsum.default, folded, 1)
    back = builder.call(aten.reshape.default, scanned, [2, 8, 8, 8])
    assert found(builder, back, back) == square("bchw")
    assert "spatial" not in folded.meta and "spatial" not in scanned.meta


def spread(builder: GraphBuilder, x: fx.Node, channels: int = 8) -> fx.Node:
    """Other channels, by an operator with their number written into it: nothing tells which dimension they are."""
    return builder.call(aten.fft_fft.default, x, channels, 1)


def real(builder: GraphBuilder, node: fx.Node) -> fx.Node:
    return builder.call(aten.real.default, node)


READERS: list[tuple[str, Callable[[GraphBuilder, fx.Node, fx.Node], Any], str]] = [
    ("convolution", lambda b, y, x: b.call(CONV, y, b.parameter(5, 8, 1, 1)), "bchw"),
    ("group norm", lambda b, y, x: b.call(aten.group_norm.default, y, 2), "bchw"),
    ("behind an activation", lambda b, y, x: b.call(aten.group_norm.default, b.call(aten.silu.default, y), 2), "bchw"),
    ("linear", lambda b, y, x: b.call(aten.linear.default, y, b.parameter(5, 8)), "bhwc"),
    ("sum with a map", lambda b, y, x: b.call(aten.add.Tensor, x, y), "bchw"),
    (
        "moved channels",
        lambda b, y, x: b.call(CONV, b.call(aten.permute.default, y, [0, 3, 1, 2]), b.parameter(5, 8, 1, 1)),
        "bhwc",
    ),
]


@pytest.mark.parametrize(("name", "read", "dims"), READERS, ids=[case[0] for case in READERS])
def test_readers_tell(name, read, dims) -> None:
    builder = GraphBuilder()
    x = picture(builder, 4)
    doubled = builder.call(aten.cat.default, [x, x], 1)
    made = real(builder, spread(builder, x))
    last = read(builder, made, doubled)
    report = run(builder, doubled, last)
    assert wherever(made) == square(dims) and report.dense_reason is None


def test_readers_that_disagree_tell_nothing() -> None:
    builder = GraphBuilder()
    made = real(builder, spread(builder, picture(builder, 4)))
    convolved = builder.call(CONV, made, builder.parameter(5, 8, 1, 1))
    projected = builder.call(aten.linear.default, made, builder.parameter(5, 8))
    report = run(builder, convolved, projected)
    assert "spatial" not in made.meta
    assert "its shape [2, 8, 8, 8] does not tell which dimensions are positions" in reasons(report)


@pytest.mark.parametrize(("channels", "expected"), [(6, "bcchw"), (8, None), (64, "bcchw")])
def test_a_shape_alone_counts_unless_channels_could_be_a_height(channels, expected) -> None:
    builder = GraphBuilder()
    folded = builder.call(aten.reshape.default, picture(builder, channels), [2 * channels, 8, 8])
    shifted = builder.call(aten.roll.default, folded, [1], [0])
    made = builder.call(aten.reshape.default, shifted, [2, 2, channels // 2, 8, 8])
    report = run(builder, made)
    assert wherever(made) == (square(expected) if expected else None)
    assert (report.dense_reason is None) is (expected is not None)


@pytest.mark.parametrize(("channels", "expected"), [(6, "bsc"), (8, None), (64, None)])
def test_flattened_positions_could_also_be_channels_and_rows(channels, expected) -> None:
    builder = GraphBuilder()
    x = picture(builder, channels)
    folded = builder.call(aten.reshape.default, x, [2 * channels, 8, 8])
    shifted = builder.call(aten.roll.default, folded, [1], [0])
    tokens = builder.call(aten.reshape.default, shifted, [2, 64, channels])
    made = builder.call(aten.slice.Tensor, tokens, 2, 0, 5)
    run(builder, made)
    assert wherever(tokens) == (square(expected) if expected else None)


def test_a_graph_that_returns_a_doubtful_value_stays_dense() -> None:
    builder = GraphBuilder()
    x = picture(builder, 4)
    made = real(builder, spread(builder, x))
    module = builder.module(x, made)
    program = build_program(module, builder.infos, Options())
    assert isinstance(program, DenseProgram)
    assert program.report.dense_reason == (
        "its output real_default of shape [2, 8, 8, 8] was made by aten.real.default of what aten.fft_fft.default "
        "made, of which it is not known where its positions are, and its sizes do not tell which of its dimensions are "
        "positions; another resolution or number of channels may"
    )
    assert [site.kind for site in program.sites] == ["value", "value"]


def folded(builder: GraphBuilder, heads: int = 3) -> fx.Node:
    """Positions of a map with heads merged with the samples: ``[2 * heads, 64, 6]``."""
    tokens = builder.call(aten.flip.default, builder.call(aten.flatten.using_ints, picture(builder, 6 * heads), 2), [1])
    split = builder.call(aten.reshape.default, tokens, [2, heads, 6, 64])
    merged = builder.call(aten.reshape.default, split, [2 * heads, 6, 64])
    return builder.call(aten.transpose.int, merged, 1, 2)


def one(builder: GraphBuilder, x: fx.Node, number: int) -> fx.Node:
    return builder.call(aten.slice.Tensor, x, 0, number, number + 1)


CUTS: list[tuple[str, Callable[[GraphBuilder, fx.Node], fx.Node]]] = [
    ("slice", lambda b, x: b.call(aten.slice.Tensor, x, 0, 0, 2)),
    ("piece", lambda b, x: b.piece(b.call(aten.split.Tensor, x, 2, 0), 1)),
    ("behind a product", lambda b, x: b.call(aten.slice.Tensor, b.call(aten.mul.Tensor, x, 2.0), 0, 2, 4)),
    (
        "joined again",
        lambda b, x: b.call(aten.cat.default, [b.call(aten.slice.Tensor, x, 0, n, n + 1) for n in (0, 3)]),
    ),
]


@pytest.mark.parametrize(("name", "make"), CUTS, ids=[case[0] for case in CUTS])
def test_as_many_heads_as_samples_are_no_samples(name, make) -> None:
    """Their positions are those of other samples, which matters where each has its own mask."""
    builder = GraphBuilder()
    node = make(builder, folded(builder))
    read = builder.call(aten.linear.default, node, builder.parameter(4, 6))
    assert node.meta["val"].shape == (2, 64, 6)
    assert found(builder, node, read) is None


def test_samples_taken_apart_from_heads_are_samples_again() -> None:
    builder = GraphBuilder()
    apart = builder.call(aten.reshape.default, folded(builder), [2, 3, 64, 6])
    moved = builder.call(aten.reshape.default, builder.call(aten.transpose.int, apart, 1, 2), [2, 64, 18])
    read = builder.call(aten.linear.default, moved, builder.parameter(4, 18))
    assert found(builder, moved, read) == square("bsc")


def test_samples_computed_twice_are_cut_into_samples() -> None:
    builder = GraphBuilder()
    x = picture(builder, 5)
    doubled = builder.call(CONV, builder.call(aten.cat.default, [x, x]), builder.parameter(4, 5, 1, 1))
    half = builder.call(aten.slice.Tensor, doubled, 0, 2, 4)
    read = builder.call(CONV, half, builder.parameter(4, 4, 1, 1))
    assert found(builder, half, read) == square("bchw")
