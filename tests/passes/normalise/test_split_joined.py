"""split_joined: what lies between a join and a cut is computed part by part, or stays as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.nn import functional

from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.report import Report
from fisedit_compile.passes.normalise.split_joined import split_joined
from support.graphs import GraphBuilder, aten, outputs, spell, targets, text
from support.tolerances import assert_near

PROMPT, POSITIONS, CHANNELS = 7, 20, 6
Make = Callable[[GraphBuilder, fx.Node], fx.Node]


def run(builder: GraphBuilder, *results: fx.Node) -> tuple[fx.GraphModule, Report]:
    module, report = builder.module(*results), Report()
    split_joined(Compilation(module, report=report))
    again = text(module)
    split_joined(Compilation(module))
    assert text(module) == again, "a second run changes the graph"
    return module, report


def tokens(builder: GraphBuilder) -> tuple[fx.Node, fx.Node, fx.Node]:
    """A prompt, positions, and both joined."""
    prompt, x = builder.input(2, PROMPT, CHANNELS, name="t"), builder.input(2, POSITIONS, CHANNELS)
    return prompt, x, builder.call(aten.cat.default, [prompt, x], 1)


def cut(builder: GraphBuilder, joined: fx.Node, dim: int = 1) -> fx.Node:
    """The positions of a joined value."""
    return builder.call(aten.slice.Tensor, joined, dim, PROMPT, PROMPT + POSITIONS)


def attend(builder: GraphBuilder, joined: fx.Node) -> fx.Node:
    return builder.call(aten.scaled_dot_product_attention.default, joined, joined, joined)


def test_operators_run_on_the_part_that_is_cut_out() -> None:
    builder = GraphBuilder()
    prompt, x, joined = tokens(builder)
    weight, scale = builder.parameter(12, CHANNELS), builder.input(2, 1, 12, name="scale")
    hidden = builder.call(aten.mul.Tensor, builder.call(aten.linear.default, joined, weight), scale)
    heads = builder.call(aten.reshape.default, hidden, [2, PROMPT + POSITIONS, 3, 4])
    moved = builder.call(aten.transpose.int, heads, 1, 2)
    module, report = run(builder, cut(builder, moved, 2))
    linear = ("aten.mul.Tensor", ("aten.linear", "x", "weight"), "scale")
    expected = ("aten.transpose.int", ("aten.reshape", linear, [2, POSITIONS, 3, 4]), 1, 2)
    assert spell(outputs(module)[0]) == expected
    assert report.matches == {"split_joined": 1}


def test_attention_reads_the_parts_of_keys_and_values_joined() -> None:
    builder = GraphBuilder()
    _, _, joined = tokens(builder)
    weight = builder.parameter(CHANNELS, CHANNELS)
    attended = attend(builder, builder.call(aten.linear.default, joined, weight))
    module, report = run(builder, cut(builder, attended), builder.call(aten.select.int, attended, 1, 3))
    parts = [("aten.linear", name, "weight") for name in ("t", "x")]
    whole = ("aten.cat", parts, 1)
    results = [("aten.scaled_dot_product_attention", part, whole, whole, ("scale", None)) for part in parts]
    assert spell(outputs(module)[0]) == results[1]
    assert spell(outputs(module)[1]) == ("aten.select.int", results[0], 1, 3)
    assert targets(module).count(aten.linear.default) == 2, "both parts once, and nothing joined"
    assert report.matches == {"split_joined": 2}


def test_an_operand_of_full_length_is_cut_for_each_part() -> None:
    builder = GraphBuilder()
    _, _, joined = tokens(builder)
    places = builder.parameter(1, PROMPT + POSITIONS, CHANNELS, name="places")
    module, _ = run(builder, cut(builder, builder.call(aten.add.Tensor, joined, places)))
    share = ("aten.slice.Tensor", "places", 1, PROMPT, PROMPT + POSITIONS)
    assert spell(outputs(module)[0]) == ("aten.add.Tensor", "x", share)


def test_other_readers_read_the_parts_joined() -> None:
    builder = GraphBuilder()
    _, _, joined = tokens(builder)
    hidden = builder.call(aten.relu.default, joined)
    module, _ = run(builder, cut(builder, hidden), builder.call(aten.flip.default, hidden, [1]))
    parts = [("aten.relu", "t"), ("aten.relu", "x")]
    assert spell(outputs(module)[0]) == parts[1]
    assert spell(outputs(module)[1]) == ("aten.flip", ("aten.cat", parts, 1), [1])
    assert targets(module).count(aten.relu.default) == 2


def test_a_mask_of_the_keys_is_read_whole() -> None:
    builder = GraphBuilder()
    _, _, joined = tokens(builder)
    shapes = ((2, 1, PROMPT), (2, 1, POSITIONS))
    parts = [builder.input(*shape, name="mask") for shape in shapes]
    mask = builder.call(aten.cat.default, parts, 2)
    attended = builder.call(aten.scaled_dot_product_attention.default, joined, joined, joined, mask)
    module, report = run(builder, cut(builder, attended))
    keys = ("aten.cat", ["t", "x"], 1)
    masks = ("aten.cat", ["mask", "mask_1"], 2)
    assert spell(outputs(module)[0]) == ("aten.scaled_dot_product_attention", "x", keys, keys, masks, ("scale", None))
    assert report.matches == {"split_joined": 1}


def test_pairs_of_channels_as_complex_numbers() -> None:
    builder = GraphBuilder()
    _, _, joined = tokens(builder)
    pairs = builder.call(aten.reshape.default, joined, [2, PROMPT + POSITIONS, CHANNELS // 2, 2])
    numbers = builder.call(torch.ops.fisedit.complex_of_pairs.default, pairs)
    real = builder.call(aten.view_as_real.default, numbers)
    module, _ = run(builder, cut(builder, real))
    inner = ("fisedit.complex_of_pairs", ("aten.reshape", "x", [2, POSITIONS, CHANNELS // 2, 2]))
    assert spell(outputs(module)[0]) == ("aten.view_as_real", inner)


def test_values_that_are_joined_in_other_dimensions_as_well() -> None:
    """Angles of rotary embeddings are joined along the channels, and multiply what is joined along the tokens."""
    builder = GraphBuilder()
    _, _, joined = tokens(builder)
    sizes = (2, 4)
    angles = [builder.parameter(PROMPT + POSITIONS, size, name=f"angles_{size}") for size in sizes]
    turns = builder.call(aten.cat.default, angles, 1)
    module, report = run(builder, cut(builder, builder.call(aten.mul.Tensor, joined, turns)))
    share = ("aten.slice.Tensor", ("aten.cat", ["angles_2", "angles_4"], 1), 0, PROMPT, PROMPT + POSITIONS)
    assert spell(outputs(module)[0]) == ("aten.mul.Tensor", "x", share)
    assert report.matches == {"split_joined": 1}


def test_a_cut_across_parts_takes_elements_of_each() -> None:
    builder = GraphBuilder()
    _, _, joined = tokens(builder)
    module, _ = run(builder, builder.call(aten.slice.Tensor, builder.call(aten.relu.default, joined), 1, 2, 20))
    prompt = ("aten.slice.Tensor", ("aten.relu", "t"), 1, 2, PROMPT)
    picture = ("aten.slice.Tensor", ("aten.relu", "x"), 1, 0, 20 - PROMPT)
    assert spell(outputs(module)[0]) == ("aten.cat", [prompt, picture], 1)


def test_a_mask_that_differs_from_query_to_query_is_cut() -> None:
    builder = GraphBuilder()
    _, _, joined = tokens(builder)
    mask = builder.input(PROMPT + POSITIONS, PROMPT + POSITIONS, name="mask")
    attended = builder.call(aten.scaled_dot_product_attention.default, joined, joined, joined, mask)
    module, _ = run(builder, cut(builder, attended))
    keys, share = ("aten.cat", ["t", "x"], 1), ("aten.slice.Tensor", "mask", 0, PROMPT, PROMPT + POSITIONS)
    assert spell(outputs(module)[0]) == ("aten.scaled_dot_product_attention", "x", keys, keys, share, ("scale", None))


def test_returned_tokens_are_computed_part_by_part() -> None:
    builder = GraphBuilder()
    _, _, joined = tokens(builder)
    module, report = run(builder, builder.call(aten.relu.default, builder.call(aten.neg.default, joined)))
    parts = [("aten.relu", ("aten.neg", name)) for name in ("t", "x")]
    assert spell(outputs(module)[0]) == ("aten.cat", parts, 1)
    assert report.matches == {"split_joined": 1}


def test_what_mixes_the_parts_behind_attention_reads_them_joined() -> None:
    builder = GraphBuilder()
    _, _, joined = tokens(builder)
    module, _ = run(builder, builder.call(aten.mean.dim, attend(builder, joined), [1]))
    parts = [("aten.scaled_dot_product_attention", name, "cat", "cat") for name in ("t", "x")]
    mean, (cat, found, dim), dims = spell(outputs(module)[0])
    assert (mean, cat, dim, dims) == ("aten.mean.dim", "aten.cat", 1, [1])
    assert [part[:2] for part in found] == [part[:2] for part in parts]


def test_two_ways_of_joining_are_both_split() -> None:
    builder = GraphBuilder()
    _, x, joined = tokens(builder)
    first = cut(builder, builder.call(aten.relu.default, joined))
    other = builder.call(aten.tanh.default, builder.call(aten.cat.default, [first, x], 2))
    module, report = run(builder, builder.call(aten.slice.Tensor, other, 2, 0, CHANNELS))
    assert spell(outputs(module)[0]) == ("aten.tanh", ("aten.relu", "x"))
    assert report.matches == {"split_joined": 2}


MIXING: dict[str, Make] = {
    "every second element": lambda b, x: b.call(aten.slice.Tensor, x, 1, 0, 6, 2),
    "a norm over the dimension": lambda b, x: cut(
        b, b.call(aten.layer_norm.default, x, [PROMPT + POSITIONS, CHANNELS])
    ),
    "a sum over the dimension": lambda b, x: b.call(aten.sum.dim_IntList, x, [1]),
    "a scan along the dimension": lambda b, x: cut(b, b.call(aten.cumsum.default, x, 1)),
    "a reshape that mixes it": lambda b, x: b.call(
        aten.slice.Tensor, b.call(aten.reshape.default, x, [2, 3, 54]), 1, 0, 1
    ),
    "channels of another product": lambda b, x: cut(
        b, b.call(aten.linear.default, b.call(aten.transpose.int, x, 1, 2), b.parameter(27, 27)), 2
    ),
    "causal attention": lambda b, x: cut(
        b, b.call(aten.scaled_dot_product_attention.default, x, x, x, None, 0.0, True)
    ),
    "no cut": lambda b, x: b.call(aten.flip.default, b.call(aten.relu.default, x), [1]),
}


@pytest.mark.parametrize("name", MIXING)
def test_conditions_2_and_3(name: str) -> None:
    builder = GraphBuilder()
    result = MIXING[name](builder, tokens(builder)[2])
    before = targets(fx.GraphModule(builder.root, builder.graph))
    module, report = run(builder, result)
    assert targets(module) == before and report.matches == {}


def test_condition_1_samples_are_not_split() -> None:
    builder = GraphBuilder()
    x = builder.picture()
    doubled = builder.call(aten.relu.default, builder.call(aten.cat.default, [x, x], 0))
    module, report = run(builder, builder.call(aten.slice.Tensor, doubled, 0, 0, 2))
    assert aten.cat.default in targets(module) and report.matches == {}


def test_a_write_over_one_part_is_that_part() -> None:
    """``joined[:, PROMPT:] = turned``: rotary positions for the picture, not for the prompt."""
    builder = GraphBuilder()
    prompt, x, joined = tokens(builder)
    turned = builder.call(aten.cat.default, [builder.call(aten.neg.default, cut(builder, joined))] * 2, 2)
    turned = builder.call(aten.slice.Tensor, turned, 2, 3, 3 + CHANNELS)  # of both parts of another join
    written = builder.call(aten.slice_scatter.default, joined, turned, 1, PROMPT, 2**63 - 1)
    module, report = run(builder, cut(builder, attend(builder, written)))
    negated = ("aten.neg", "x")
    new = ("aten.slice.Tensor", ("aten.cat", [negated, negated], 2), 2, 3, 3 + CHANNELS)
    whole = ("aten.cat", ["t", new], 1)
    expected = ("aten.scaled_dot_product_attention", new, whole, whole)
    assert spell(outputs(module)[0])[:4] == expected
    assert report.matches == {"split_joined": 2}


@pytest.mark.parametrize(
    ("shape", "place"),
    [
        ((2, POSITIONS + 1, CHANNELS), (1, PROMPT - 1, PROMPT + POSITIONS)),  # of both parts
        ((2, POSITIONS - 1, CHANNELS), (1, PROMPT + 1, PROMPT + POSITIONS)),  # not the whole part
        ((2, POSITIONS // 2, CHANNELS), (1, PROMPT, PROMPT + POSITIONS, 2)),  # every second
        ((2, PROMPT + POSITIONS, 2), (2, 0, 2)),  # along another dimension
    ],
)
def test_other_writes_stay(shape, place) -> None:
    builder = GraphBuilder()
    _, _, joined = tokens(builder)
    written = builder.call(aten.slice_scatter.default, joined, builder.input(*shape, name="new"), *place)
    module, report = run(builder, cut(builder, builder.call(aten.relu.default, written)))
    assert targets(module) == [aten.cat.default, aten.slice_scatter.default, aten.relu.default, aten.slice.Tensor]
    assert report.matches == {}


def block(joined: Tensor, weight: Tensor) -> Tensor:
    packed = functional.linear(functional.layer_norm(joined, [CHANNELS]), weight)
    query, key, value = packed.unflatten(2, (3, 2, CHANNELS // 2)).permute(2, 0, 3, 1, 4).unbind(0)
    attended = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    return joined + attended / attended.norm(dim=-1, keepdim=True)


def test_the_result_is_the_same() -> None:
    """Blocks of a transformer as torch writes them, traced, with every reader of the parts."""

    def network(prompt: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        joined = block(block(torch.cat([prompt, x], 1), weight), weight)
        first, second = joined.split([PROMPT, POSITIONS], 1)
        return first, second * 2, joined.mean(1), joined[:, 0]

    generator = torch.Generator().manual_seed(0)
    shapes = ((2, PROMPT, CHANNELS), (2, POSITIONS, CHANNELS), (3 * CHANNELS, CHANNELS))
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    with torch.no_grad():
        module = make_fx(network, pre_dispatch=True)(*inputs)
        FakeTensorProp(module).propagate(*inputs)  # values of one mode
        expected = network(*inputs)
        report = Report()
        split_joined(Compilation(module, report=report))
        for output, wanted in zip(module(*inputs), expected, strict=True):
            assert_near(output, wanted, "part by part")
    assert report.matches["split_joined"] == 4
