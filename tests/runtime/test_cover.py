"""cover: which mask cells positions cover where they are not shares of the whole map."""

from __future__ import annotations

import torch

from fisedit_compile.runtime.cover import WHOLE, Cover, Term
from fisedit_compile.runtime.masks import reduce_mask
from fisedit_compile.runtime.plans import build_plan
from fisedit_compile.runtime.spec import Domain, PlanInput, Stencil


def drawn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) < 0.3


def brute_force(terms: list[Term], mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    active = torch.zeros(len(mask), height, width, dtype=torch.bool)
    for sample, y, x in torch.cartesian_prod(torch.arange(len(mask)), torch.arange(height), torch.arange(width)):
        for term in terms:
            cells = mask[sample].T if term.turned else mask[sample]
            active[sample, y, x] |= bool((cells & term.rows[y][:, None] & term.columns[x]).any())
    return active


def test_a_position_is_active_when_a_cell_that_it_covers_is() -> None:
    terms = [
        Term(drawn(4, 6, seed=1), drawn(5, 7, seed=2)),
        Term(drawn(4, 7, seed=3), drawn(5, 6, seed=4), turned=True),
    ]
    mask = drawn(2, 6, 7, seed=5)
    domain = Domain(4, 5, cover=Cover.of(terms))
    assert torch.equal(reduce_mask(mask, domain), brute_force(terms, mask, 4, 5))


def test_terms_tell_covers_apart_in_any_order_and_contained_ones_do_not_count() -> None:
    one, other = Term(drawn(4, 6, seed=1), drawn(5, 7, seed=2)), Term(drawn(4, 6, seed=3), drawn(5, 7, seed=4))
    inside = Term(one.rows & drawn(4, 6, seed=5), one.columns)
    nothing = Term(torch.zeros(4, 6, dtype=torch.bool), one.columns)
    assert Cover.of([one, other]) == Cover.of([other, inside, one, nothing]) != Cover.of([one])
    assert hash(Domain(4, 5, cover=Cover.of([one]))) == hash(Domain(4, 5, cover=Cover.of([one, inside])))
    assert Cover.of([one]) != Cover.of([one._replace(turned=True)])
    assert WHOLE.whole and not Cover.of([one]).whole


def test_domains_of_one_size_at_different_places_differ_and_have_an_order() -> None:
    moved = Domain(4, 5, cover=Cover.of([Term(drawn(4, 6, seed=1), drawn(5, 7, seed=2))]))
    assert moved != Domain(4, 5) == moved.whole
    assert sorted([moved, Domain(4, 5)]) == [Domain(4, 5), moved]
    assert str(Domain(4, 5)) == "4x5" and str(moved).startswith("4x5 moved ")


def test_terms_meet_where_they_have_a_cell_in_common() -> None:
    straight = Term(drawn(4, 6, seed=1), drawn(5, 7, seed=2))
    for other in (
        Term(drawn(4, 6, seed=3), drawn(5, 7, seed=4)),
        Term(drawn(4, 7, seed=5), drawn(5, 6, seed=6), turned=True),
    ):
        expected = torch.zeros(4, 5, dtype=torch.bool)
        for y, x in torch.cartesian_prod(torch.arange(4), torch.arange(5)):
            own = straight.rows[y][:, None] & straight.columns[x]
            its = other.rows[y][:, None] & other.columns[x]
            expected[y, x] = bool((own & (its.T if other.turned else its)).any())
        assert torch.equal(straight.meets(other), expected) and torch.equal(other.meets(straight), expected)


def test_tiles_are_active_with_any_of_their_positions() -> None:
    cover = Cover.of([Term(drawn(4, 6, seed=1), drawn(8, 7, seed=2))])
    mask = drawn(1, 6, 7, seed=3)
    fine, tiles = cover.active(mask), cover.of_tiles(2).active(mask)
    assert bool((fine.unflatten(1, (2, 2)).unflatten(3, (4, 2)).any(4).any(2) <= tiles).all())
    assert WHOLE.of_tiles(2) is WHOLE


def test_plans_of_one_size_at_two_places_have_rows_of_their_own() -> None:
    flipped = Domain(
        3, 4, cover=Cover.of([Term(torch.eye(3, dtype=torch.bool), torch.eye(4, dtype=torch.bool).flip(0))])
    )
    mask = torch.zeros(1, 3, 4, dtype=torch.bool)
    mask[0, 1, :2] = True
    turned = Stencil.of("table", Domain(3, 4), flipped, rows=(0, 1, 2), columns=(3, 2, 1, 0))
    plan = build_plan(mask, [], [turned], "cpu")
    index = plan.tensor(PlanInput("index", flipped))
    assert index is not None and index.tolist() == [[6, 7]]
    table = plan.tensor(PlanInput("table", turned))
    assert table is not None and table.tolist() == [[[1], [0]]]  # both are read from rows, none from the recording


def test_a_transposition_reads_columns_for_rows() -> None:
    stencil = Stencil.of("transposition", Domain(2, 3), Domain(3, 2))
    mask = torch.ones(1, 2, 3, dtype=torch.bool)
    table = build_plan(mask, [], [stencil], "cpu").tensor(PlanInput("table", stencil))
    assert table is not None and table[0, :, 0].tolist() == [0, 3, 1, 4, 2, 5]
