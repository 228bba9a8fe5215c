"""Layouts: which dimension of a value is what, and what a reshape or permutation makes of it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fisedit_compile.passes.common.layouts import (
    BATCH,
    CHANNEL,
    HEIGHT,
    SPACE,
    WIDTH,
    Spatial,
    candidate_layouts,
    check_dims,
    reshape_layout,
)
from fisedit_compile.passes.common.reading.permutations import permutation
from fisedit_compile.runtime.spec import Domain
from support.graphs import DOMAIN, GraphBuilder, layout

aten = torch.ops.aten
SIZES = st.sampled_from([1, 2, 3, 4, 6])


@st.composite
def spatial_values(draw: st.DrawFn) -> tuple[Spatial, tuple[int, ...]]:
    """Any layout, and a shape that fits it; sizes repeat, and many are 1."""
    domain = Domain(draw(SIZES), draw(SIZES))
    channels = draw(st.lists(SIZES, max_size=3))
    space = [SPACE] if draw(st.booleans()) else [HEIGHT, WIDTH]
    dims = draw(st.permutations([BATCH, *space, *[CHANNEL] * len(channels)]))
    known = {BATCH: draw(SIZES), SPACE: domain.size, HEIGHT: domain.height, WIDTH: domain.width}
    return Spatial(domain, tuple(dims)), tuple(known[name] if name in known else channels.pop() for name in dims)


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[Spatial, tuple[int, ...], tuple[int, ...]]:
    """A spatial value and a shape of as many elements; most often one that only merges, splits or adds ones."""
    spatial, before = draw(spatial_values())
    factors = [factor for size in before for factor in _primes(size)]
    if draw(st.integers(0, 9)) == 0:
        factors = draw(st.permutations(factors))
    ends = set(itertools.accumulate(len(_primes(size)) for size in before))
    after, current = [], 1
    for count, factor in enumerate(factors, 1):
        current *= factor
        # Cut where a dimension ended before, more often than within one.
        if draw(st.integers(0, 4)) > (1 if count in ends else 3):
            after.append(current)
            current = 1
        if draw(st.integers(0, 9)) == 0:
            after.append(1)
    return spatial, before, tuple([*after, current] if current > 1 or not after else after)


def _primes(number: int) -> list[int]:
    factors, prime = [], 2
    while number > 1:
        while number % prime == 0:
            factors.append(prime)
            number //= prime
        prime += 1
    return factors


def rows_of(value: Tensor, spatial: Spatial, index: Tensor) -> Tensor:
    """The definition of rows: [B, N, *C]."""
    moved = value.permute(spatial.order)
    return (moved.flatten(1, 2) if spatial.space_rank == 2 else moved)[:, index]


@settings(max_examples=250)
@given(reshapes(), st.randoms(use_true_random=False))
def test_rows_of_a_reshaped_value_are_its_rows_reshaped(case, random) -> None:
    spatial, before, after = case
    found = reshape_layout(spatial, before, after)
    event("not spatial" if isinstance(found, str) else "spatial")
    if isinstance(found, str):
        assert found
        return
    value = torch.arange(math.prod(before)).view(before)
    index = torch.tensor(random.sample(range(spatial.domain.size), (spatial.domain.size + 1) // 2))
    assert check_dims(found) is found and len(found.dims) == len(after)
    assert after[found.batch_dim] == before[spatial.batch_dim]
    rows, expected = rows_of(value.view(after), found, index), rows_of(value, spatial, index)
    assert rows.shape[:2] == expected.shape[:2]
    assert torch.equal(rows, expected.reshape(rows.shape))


@settings(max_examples=50)
@given(spatial_values())
def test_a_reshape_to_the_same_shape_keeps_the_layout(case) -> None:
    spatial, shape = case
    found = reshape_layout(spatial, shape, shape)
    # Space that is split as the domain is, beside a dimension that happens to fit, may be renamed; rows are the same.
    assert isinstance(found, Spatial)
    value, index = torch.arange(math.prod(shape)).view(shape), torch.arange(spatial.domain.size)
    assert torch.equal(rows_of(value, found, index), rows_of(value, spatial, index))


@pytest.mark.parametrize(
    ("before", "shape", "after", "expected"),
    [
        ("bchw", (2, 6, 5, 4), (2, 6, 20), "bcs"),
        ("bcs", (2, 6, 20), (2, 6, 5, 4), "bchw"),
        ("bchw", (2, 6, 5, 4), (2, 3, 2, 5, 4), "bcchw"),
        ("bhwc", (2, 5, 4, 6), (2, 20, 6), "bsc"),
        ("bhwc", (2, 5, 4, 6), (2, 20, 3, 2), "bscc"),
        ("bscc", (2, 20, 3, 2), (2, 20, 6), "bsc"),
        ("bsc", (2, 20, 6), (2, 5, 4, 6), "bhwc"),
        ("bcs", (2, 1, 20), (2, 20), "bs"),
        ("bs", (2, 20), (2, 20, 1), "bsc"),
        ("bchw", (1, 6, 5, 4), (1, 1, 6, 5, 4), "bcchw"),
    ],
)
def test_reshapes_between_pictures_tokens_and_heads(before, shape, after, expected) -> None:
    assert reshape_layout(layout(before), shape, after) == layout(expected)


@pytest.mark.parametrize(
    ("before", "shape", "after", "reason"),
    [
        ("bscc", (2, 20, 3, 2), (40, 3, 2), "the batch is folded with another dimension"),
        ("bcsc", (2, 3, 20, 2), (6, 20, 2), "the batch is folded with another dimension"),
        ("bcsc", (1, 3, 20, 2), (3, 20, 2), "the batch is folded with another dimension"),
        ("bchw", (2, 6, 5, 4), (2, 30, 4), "positions are mixed with channels or split unevenly"),
        ("bhwc", (2, 5, 4, 6), (2, 5, 24), "positions are mixed with channels or split unevenly"),
        ("bsc", (2, 20, 6), (2, 4, 5, 6), "positions are mixed with channels or split unevenly"),
        ("bchw", (2, 6, 5, 4), (2, 6, 4, 5), "positions are mixed with channels or split unevenly"),
        ("bcwh", (2, 6, 4, 5), (2, 6, 20), "positions are mixed with channels or split unevenly"),
        ("bs", (2, 20), (2, 20, 2), "a dimension appears or vanishes"),
        ("bsc", (2, 20, 6), (2, 20, 3), "element counts do not match"),
        ("bsc", (2, 20, 6), (2, 20, 12), "element counts do not match"),
    ],
)
def test_reshapes_that_end_locality_say_why(before, shape, after, reason) -> None:
    assert reshape_layout(layout(before), shape, after) == reason


def test_a_domain_of_one_row_is_not_confused_with_added_dimensions() -> None:
    spatial = layout("bcs", Domain(1, 4))
    assert reshape_layout(spatial, (2, 6, 4), (2, 6, 1, 4)) == layout("bchw", Domain(1, 4))
    gone = reshape_layout(layout("bchw", Domain(1, 1)), (2, 6, 1, 1), (2, 6))
    assert gone == "a dimension appears or vanishes"


@pytest.mark.parametrize(
    ("dims", "reason"),
    [
        ((CHANNEL, HEIGHT, WIDTH), "the batch dimension is lost"),
        ((BATCH, BATCH, HEIGHT, WIDTH), "the batch dimension is lost"),
        ((BATCH, CHANNEL, WIDTH), "the positions are no longer whole dimensions"),
        ((BATCH, SPACE, SPACE), "the positions are no longer whole dimensions"),
        ((BATCH, SPACE, HEIGHT, WIDTH), "the positions are no longer whole dimensions"),
        ((BATCH, CHANNEL), "the positions are no longer whole dimensions"),
    ],
)
def test_dimensions_that_are_not_those_of_a_spatial_value(dims, reason) -> None:
    assert check_dims(Spatial(DOMAIN, dims)) == reason


def test_orders_and_row_dimensions() -> None:
    heads = layout("csbc")
    assert (heads.batch_dim, heads.space_dims, heads.channel_dims) == (2, (1,), (0, 3))
    assert heads.order == (2, 1, 0, 3)
    assert (heads.row_dim(0), heads.row_dim(3)) == (2, 3)
    assert layout("bcwh").order == (0, 3, 2, 1)


@settings(max_examples=80)
@given(spatial_values(), st.data())
def test_permutations_as_the_operators_define_them(case, data) -> None:
    """``permutation`` names the input dimension of each output dimension, negative numbers included."""
    spatial, shape = case
    rank = len(shape)
    number = st.integers(-rank, rank - 1)

    def several() -> list[int]:
        chosen = data.draw(st.lists(st.integers(0, rank - 1), unique=True, min_size=1))
        return [dim - rank * data.draw(st.integers(0, 1)) for dim in chosen]

    sources = several()
    moved = data.draw(st.permutations(range(rank)))[: len(sources)]
    target, arguments = data.draw(
        st.sampled_from(
            [
                (aten.permute.default, ([dim - rank for dim in data.draw(st.permutations(range(rank)))],)),
                (aten.transpose.int, (data.draw(number), data.draw(number))),
                (aten.movedim.int, (data.draw(number), data.draw(number))),
                (aten.movedim.intlist, (sources, list(moved))),
            ]
        )
    )
    builder = GraphBuilder()
    node = builder.call(target, builder.input(*shape), *arguments)
    order = permutation(node, rank)
    value = torch.arange(math.prod(shape)).view(shape)
    assert torch.equal(value.permute(order), target(value, *arguments))
    permuted = spatial.with_dims(tuple(spatial.dims[dim] for dim in order))
    index = torch.arange(spatial.domain.size)
    rows, expected = rows_of(value.permute(order), permuted, index), rows_of(value, spatial, index)
    place = [2 + spatial.channel_dims.index(order[dim]) for dim in permuted.channel_dims]
    assert torch.equal(rows, expected.permute(0, 1, *place))


DOMAINS = {Domain(5, 4), Domain(3, 2)}


COARSE = Domain(3, 2)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 7, 5, 4), [layout("bchw")]),
        ((2, 5, 4, 7), [layout("bhwc")]),
        ((2, 20, 7), [layout("bsc")]),
        ((2, 7, 20), [layout("bcs")]),
        ((2, 7, 6), [layout("bcs", COARSE)]),
        ((2, 8, 3, 2), [layout("bchw", COARSE)]),
        ((3, 7, 5, 4), []),  # another batch
        ((2, 20), []),  # no channels
        ((2, 20, 20), [layout("bsc"), layout("bcs")]),
        ((2, 20, 5, 4), [layout("bchw"), layout("bscc")]),
        ((2, 6, 5, 4), [layout("bchw"), layout("bscc", COARSE)]),
        ((2, 3, 2, 5, 4), [layout("bhwcc", COARSE), layout("bcchw")]),
        ((2, 7, 4, 5), []),  # transposed
        ((2, 7, 9), []),
    ],
)
def test_all_layouts_that_a_shape_allows_pairs_first(shape, expected) -> None:
    assert candidate_layouts(shape, 2, DOMAINS) == expected


def test_a_single_position_shows_nothing() -> None:
    assert candidate_layouts((2, 7, 1, 1), 2, {Domain(1, 1)}) == []


@settings(max_examples=200)
@given(st.lists(st.sampled_from([2, 3, 4, 5, 6, 7, 12, 20]), min_size=3, max_size=5))
def test_candidates_fit_their_shape(shape) -> None:
    for found in candidate_layouts(tuple(shape), 2, DOMAINS):
        assert check_dims(found) is found and len(found.dims) == len(shape) and found.batch_dim == 0
        assert math.prod(shape[dim] for dim in found.space_dims) == found.domain.size
        assert shape[0] == 2


@pytest.mark.parametrize(
    ("dims", "before", "after", "expected"),
    [
        ("bsc", (2, 20, 6), (2, 1, 5, 4, 6), "bchwc"),
        ("bcs", (2, 6, 20), (2, 6, 1, 5, 4), "bcchw"),
        ("bsc", (2, 20, 6), (2, 1, 20, 6), "bcsc"),
        ("bsc", (2, 20, 6), (2, 1, 1, 20, 6), "bccsc"),
    ],
)
def test_a_single_frame_in_front_of_positions(dims, before, after, expected) -> None:
    assert reshape_layout(layout(dims), before, after) == layout(expected)
