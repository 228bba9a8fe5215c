"""What is computed slice by slice and written into one tensor becomes one computation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.report import Report
from fisedit_compile.passes.normalise.join_slices import join_slices
from support.attention_graphs import STACK, B, Builder, D, H, S, T
from support.graphs import outputs, reasons, spell, targets
from support.tolerances import assert_near

aten = torch.ops.aten
NAME = "join_slices"
FOLDED = B * H
WHOLE = slice(0, FOLDED)
SLICES = (slice(0, 4), slice(4, 8))  # the last one ends early: there are six heads

#: Makes what is written into a slice, from the slice and where the whole tensors are.
Compute = Callable[[Builder, slice, "Inputs"], fx.Node]


class Inputs:
    """Folded query, key, value and mask."""

    def __init__(self, build: Builder) -> None:
        self.query, self.key = build.input(FOLDED, T, D, name="q"), build.input(FOLDED, S, D, name="k")
        self.value, self.mask = build.input(FOLDED, S, D, name="v"), build.input(FOLDED, T, S, name="m")


def cut(build: Builder, node: fx.Node, part: slice, dim: int = 0, step: int = 1) -> fx.Node:
    return build(aten.slice.Tensor, node, dim, part.start, part.stop, *([step] if step > 1 else []))


def attention(build: Builder, part: slice, inputs: Inputs, mask: bool = False, scale: float = 0.5) -> fx.Node:
    """Diffusers' attention of one slice."""
    query, key = cut(build, inputs.query, part), cut(build, inputs.key, part)
    size = query.meta["val"].shape[0]
    added = cut(build, inputs.mask, part) if mask else build(aten.empty.memory_format, [size, T, S])
    across = build(aten.transpose.int, key, -1, -2)
    scores = build(aten.baddbmm.default, added, query, across, beta=1 if mask else 0, alpha=scale)
    weights = build(aten.softmax.int, scores, -1)
    return build(aten.bmm.default, weights, cut(build, inputs.value, part))


def write(build: Builder, into: fx.Node, part: slice, value: fx.Node) -> fx.Node:
    """What remains of ``into[part] = value``."""
    copied = build(aten.copy.default, cut(build, into, part), value)
    return build(aten.slice_scatter.default, into, copied, 0, part.start, part.stop)


def chain(build: Builder, inputs: Inputs, compute: Compute, parts: Sequence[slice] = SLICES) -> fx.Node:
    """All slices, written into zeros."""
    node = build(aten.zeros.default, [FOLDED, T, D])
    for part in parts:
        node = write(build, node, part, compute(build, part, inputs))
    return node


def run(build: Builder, *results: fx.Node) -> tuple[fx.GraphModule, Report]:
    """Rewrite, and check that the numbers stay what they were."""
    module, values, report = build.module(*results), build.tensors(), Report()
    expected = module(*values)
    join_slices(Compilation(module, report=report))
    module.graph.lint()
    for actual, wanted in zip(module(*values), expected, strict=True):
        assert_near(actual, wanted)
    return module, report


def made(compute: Compute, parts: Sequence[slice] = SLICES) -> tuple[fx.GraphModule, Report]:
    build = Builder()
    return run(build, chain(build, Inputs(build), compute, parts))


def refused(compute: Compute, parts: Sequence[slice] = SLICES) -> str:
    """The one reason for leaving a chain as it is."""
    module, report = made(compute, parts)
    assert not report.matches and targets(module).count(aten.slice_scatter.default) == len(parts)
    (reason,) = reasons(report, NAME)
    return reason


@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_attention_over_slices_of_heads(size: int) -> None:
    parts = [slice(start, start + size) for start in range(0, FOLDED, size)]
    module, report = made(attention, parts)
    assert report.matches[NAME] == 1 and not report.misses
    product = ("aten.transpose.int", "k", -1, -2)
    scores = ("aten.baddbmm", ("aten.empty.memory_format", [FOLDED, T, S]), "q", product, ("beta", 0), ("alpha", 0.5))
    assert spell(outputs(module)[0]) == ("aten.bmm", ("aten.softmax.int", scores, -1), "v")
    assert all(node.meta["nn_module_stack"] == STACK for node in module.graph.nodes if node.op == "call_function")


def test_one_slice_of_everything() -> None:
    module, report = made(lambda build, part, inputs: cut(build, inputs.query, slice(0, FOLDED)), [WHOLE])
    assert report.matches[NAME] == 1
    assert spell(outputs(module)[0]) == ("aten.slice.Tensor", "q", 0, 0, FOLDED)


def test_only_the_last_writer_of_everything_counts() -> None:
    module, report = made(lambda build, part, inputs: cut(build, inputs.query, part), [slice(0, 2), WHOLE])
    assert report.matches[NAME] == 1
    assert spell(outputs(module)[0]) == ("aten.slice.Tensor", "q", 0, 0, FOLDED)


def test_masks_casts_and_the_order_of_writing() -> None:
    def compute(build: Builder, part: slice, inputs: Inputs) -> fx.Node:
        out = build(aten.to.dtype, attention(build, part, inputs, mask=True), torch.float64)
        return build(aten.to.dtype, build(aten.mul.Tensor, out, 2.0), torch.float32)

    module, report = made(compute, SLICES[::-1])
    assert report.matches[NAME] == 1
    assert targets(module) == [
        aten.transpose.int, aten.baddbmm.default, aten.softmax.int, aten.bmm.default,
        aten.to.dtype, aten.mul.Tensor, aten.to.dtype,
    ]  # fmt: skip


def test_einsum_and_operands_that_are_the_same_for_all_slices() -> None:
    build = Builder()
    inputs, bias = Inputs(build), build.input(1, T, S, name="bias")
    scale = build.input(1, name="scale")

    def compute(build: Builder, part: slice, inputs: Inputs) -> fx.Node:
        query, key = cut(build, inputs.query, part), cut(build, inputs.key, part)
        scores = build(aten.add.Tensor, build(aten.einsum.default, "bid,bjd->bij", [query, key]), bias)
        weights = build(aten.softmax.int, build(aten.mul.Tensor, scores, scale), 2)
        return build(aten.matmul.default, weights, cut(build, inputs.value, part))

    module, report = run(build, chain(build, inputs, compute))
    assert report.matches[NAME] == 1
    scores = ("aten.add.Tensor", ("aten.einsum", "bid,bjd->bij", ["q", "k"]), "bias")
    weights = ("aten.softmax.int", ("aten.mul.Tensor", scores, "scale"), 2)
    assert spell(outputs(module)[0]) == ("aten.matmul", weights, "v")


def test_a_second_run_changes_nothing() -> None:
    module, _ = made(attention)
    before, report = module.code, Report()
    join_slices(Compilation(module, report=report))
    assert module.code == before and not report.matches and not report.misses


@pytest.mark.parametrize("parts", [[slice(0, 4)], [slice(0, 4), slice(3, 6)], [slice(0, 6), slice(0, 2)]])
def test_slices_that_overlap_or_do_not_cover(parts: list[slice]) -> None:
    assert "overlap" in refused(attention, parts)


def test_slices_along_another_dimension_or_with_steps() -> None:
    for dim, step in ((1, 1), (0, 2)):
        build = Builder()
        value = cut(build, build.input(FOLDED, T, D), WHOLE, dim, step)
        zeros = build(aten.zeros.default, [FOLDED, T, D])
        module, report = run(build, build(aten.slice_scatter.default, zeros, value, dim, 0, FOLDED, step))
        assert reasons(report, NAME) == ["a slice is written along another dimension than the first, or with steps"]
        assert aten.slice_scatter.default in targets(module)


def test_what_is_cast_on_the_way_into_the_slice() -> None:
    cast = refused(lambda build, part, inputs: build(aten.to.dtype, attention(build, part, inputs), torch.float64))
    assert cast == "what is written into a slice is cast or broadcast to it"


@pytest.mark.parametrize(
    ("compute", "reason"),
    [
        (lambda build, part, inputs: attention(build, part, inputs, scale=part.start + 1.0), "in different ways"),
        (lambda build, part, inputs: attention(build, part, inputs, mask=part.start > 0), "in different ways"),
    ],
)
def test_slices_that_are_computed_in_different_ways(compute: Compute, reason: str) -> None:
    assert reason in refused(compute)


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        (aten.softmax.int, (0,)),
        (aten.cumsum.default, (0,)),
        (aten.roll.default, ([1], [0])),
        (aten.flip.default, ([0],)),
    ],
)
def test_operators_that_mix_the_first_dimension(operator: Any, arguments: tuple[Any, ...]) -> None:
    reason = refused(lambda build, part, inputs: build(operator, cut(build, inputs.query, part), *arguments))
    assert reason == f"a slice is computed by {operator}, which may mix the indices of the first dimension"


def test_permutations_and_products_that_mix_the_first_dimension() -> None:
    def permuted(build: Builder, part: slice, inputs: Inputs) -> fx.Node:
        return build(
            aten.permute.default, build(aten.permute.default, cut(build, inputs.query, part), [1, 0, 2]), [1, 0, 2]
        )

    def product(build: Builder, part: slice, inputs: Inputs) -> fx.Node:
        return build(aten.einsum.default, "bid,cid->bid", [cut(build, inputs.query, part)] * 2)

    assert "aten.permute.default, which may mix" in refused(permuted)
    assert "aten.einsum.default, which may mix" in refused(product)


def test_slices_of_other_tensors_or_from_other_places() -> None:
    def several(build: Builder, part: slice, inputs: Inputs) -> fx.Node:
        return cut(build, build(aten.neg.default, inputs.query), part)

    def elsewhere(build: Builder, part: slice, inputs: Inputs) -> fx.Node:
        start = 2 if part.start == 0 else 0
        return cut(build, inputs.query, slice(start, start + min(part.stop, FOLDED) - part.start))

    assert "several tensors" in refused(several)
    assert "another place" in refused(elsewhere)


def test_a_tensor_of_the_size_of_one_slice() -> None:
    build = Builder()
    inputs, other = Inputs(build), build.input(3, T, D, name="other")

    def compute(build: Builder, part: slice, inputs: Inputs) -> fx.Node:
        return build(aten.add.Tensor, cut(build, inputs.query, part), other)

    module, report = run(build, chain(build, inputs, compute, (slice(0, 3), slice(3, 6))))
    assert reasons(report, NAME) == ["a slice is computed from other, which is no slice"]
    assert aten.slice_scatter.default in targets(module)


def test_numbers_of_random_tensors_are_those_of_the_slices() -> None:
    """The check of every test above can fail."""
    build = Builder()
    module = build.module(chain(build, Inputs(build), attention))
    values: list[Tensor] = build.tensors()
    whole = module(*values)[0]
    values[0] = -values[0]
    with pytest.raises(AssertionError):
        assert_near(module(*values)[0], whole)
