"""Numbers of edits: cases, intervals, measures and summaries, against what was computed by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fisedit_compile.bench.quality.cases import EditCase, edit_cases
from fisedit_compile.bench.quality.evaluation import Result, plan
from fisedit_compile.bench.quality.intervals import Estimate, estimate, paired_difference
from fisedit_compile.bench.quality.measures import Measures, Outcome, measure, peak_ratio, similarity
from fisedit_compile.bench.quality.methods import dense
from fisedit_compile.bench.quality.rows import DENSE, ROWS, Row, rows_of
from fisedit_compile.bench.quality.summary import summarise
from fisedit_compile.errors import OptionError
from fisedit_compile.scenes import EDIT_KINDS, held_back_scenes, render
from fisedit_compile.scenes.edits import edits_of, true_mask


def test_cases_are_of_held_back_scenes_and_do_not_depend_on_each_other() -> None:
    cases = edit_cases(EDIT_KINDS, 200)
    assert len({case.name for case in cases}) == 200 == len({(c.before, c.after, c.kind) for c in cases})
    held_back = set(held_back_scenes())
    for case in cases:
        assert case.after in edits_of(case.before, case.kind)
        assert {scene for scene in (case.before, case.after) if not scene.is_empty} <= held_back
        assert not case.before.is_empty or not case.after.is_empty
    assert edit_cases(EDIT_KINDS, 30) == cases[:30] == edit_cases(EDIT_KINDS[::-1], 30)
    assert edit_cases(["move"], 3) == [case for case in cases if case.kind == "move"][:3]


def test_after_the_last_pair_of_scenes_cases_have_other_noise() -> None:
    cases = edit_cases(["fireworks"], 400)
    assert len({(case.before, case.seed) for case in cases}) == 400 > len({case.before for case in cases})


@pytest.mark.parametrize(("kinds", "count"), [(["paint"], 1), ([], 1), (["move"], 0)])
def test_cases_that_do_not_exist_are_refused(kinds: Any, count: int) -> None:
    with pytest.raises(OptionError, match="expected"):
        edit_cases(kinds, count)


def test_every_row_makes_its_own_number_of_edits() -> None:
    work = plan(rows_of(["sdedit"]), EDIT_KINDS, None)
    assert [len(rows) for _, rows in work] == [2] * 40 + [1] * 160
    assert all(rows[0] is DENSE for _, rows in work)
    assert [len(rows) for _, rows in plan(ROWS, EDIT_KINDS, 3)] == [len(ROWS)] * 3
    for names, told in ((["painted", "painting"], "got painting"), ([], "got none")):
        with pytest.raises(OptionError, match=f"expected names of rows out of dense, sdedit, .*; {told}"):
            rows_of(names)


def test_estimates_of_what_does_not_vary() -> None:
    assert estimate([]) is None
    assert estimate([3.0, 3.0, 3.0]) == Estimate(3.0, 3.0, 3.0, 3)
    assert estimate([math.inf, math.inf], "median") == Estimate(math.inf, math.inf, math.inf, 2)
    assert estimate([5.0, 2.0, math.inf], "least") == Estimate(2.0, 2.0, 2.0, 3)


def test_the_interval_of_two_values_is_that_of_their_four_resamples() -> None:
    """A quarter of the resamples holds one value twice, another quarter the other: more than the 2.5 % on each side."""
    assert estimate([0.0, 1.0]) == Estimate(0.5, 0.0, 1.0, 2)
    assert estimate([1.0, math.inf], "median") == Estimate(math.inf, 1.0, math.inf, 2)


def test_the_interval_of_many_values_is_the_binomial_one() -> None:
    """The share of ones among 100, of which 50 are: the 2.5 and 97.5 % quantiles of the binomial are 40 and 60."""
    found = estimate([0.0, 1.0] * 50)
    assert found is not None and found.value == 0.5 and found.count == 100
    assert found.low == pytest.approx(0.40, abs=0.011) and found.high == pytest.approx(0.60, abs=0.011)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12))
@settings(max_examples=20, deadline=None)
def test_intervals_hold_the_median_and_lie_within_the_sample(values: list[float]) -> None:
    found = estimate(values, "median")
    assert found is not None
    assert min(values) <= found.low <= found.value <= found.high <= max(values)
    assert found.value == pytest.approx(float(np.median(values)), abs=1e-9)


def test_paired_differences() -> None:
    found = paired_difference([3.0, 5.0, math.inf, 1.0], [1.0, 3.0, 2.0, math.inf])
    assert found == Estimate(2.0, 2.0, 2.0, 2)
    with pytest.raises(ValueError, match="argument 2 is"):
        paired_difference([1.0], [])


def grey(*levels: int) -> Image.Image:
    """A picture of 32x32 pixels in vertical stripes of equal width."""
    row = np.repeat(np.array(levels, dtype=np.uint8), 32 // len(levels))
    return Image.fromarray(np.broadcast_to(row[None, :, None], (32, 32, 3)).copy())


def test_ratios_are_those_of_the_chosen_pixels() -> None:
    left_half = np.zeros((32, 32), dtype=bool)
    left_half[:, :16] = True
    one, other = grey(100, 100), grey(110, 100)
    assert peak_ratio(one, other, left_half) == pytest.approx(20 * math.log10(255 / 10))
    assert peak_ratio(one, other, ~left_half) == math.inf
    assert peak_ratio(one, other, left_half & ~left_half) is None
    assert similarity(one, other, left_half & ~left_half) is None
    # Without variance, similarity is that of the means, (2ab + c) / (a^2 + b^2 + c); windows at the edge see both.
    flat = similarity(grey(100), grey(110), left_half)
    constant = (0.01 * 255) ** 2
    assert flat == pytest.approx((2 * 100 * 110 + constant) / (100**2 + 110**2 + constant), abs=1e-6)
    seen, beyond = similarity(one, other, left_half), similarity(one, other, ~left_half)
    assert seen is not None and beyond is not None and seen < beyond <= 1


CASE = edit_cases(["recolour"], 1)[0]


def drawn(case: EditCase = CASE) -> tuple[Image.Image, Image.Image, np.ndarray]:
    base, after = (Image.fromarray(render(scene, 0)) for scene in (case.before, case.after))
    return base, after, true_mask(case.before, case.after, 0)


def test_measures_of_the_perfect_edit() -> None:
    base, after, region = drawn()
    found = measure(CASE, base, after, region, Outcome(after, region, 1.5, 2.0))
    assert found.success and found.psnr == math.inf and found.ssim == pytest.approx(1.0)
    # The renderer's rims differ by a few levels more than the region holds.
    assert found.background is not None and found.background > 50
    assert (found.recall, found.area) == (1.0, 1.0) and found.share == pytest.approx(region.mean())
    assert not found.identical and (found.dense_steps, found.seconds) == (1.5, 2.0)


def test_measures_of_an_edit_that_does_nothing() -> None:
    base, after, region = drawn()
    found = measure(CASE, base, after, region, Outcome(base, np.zeros_like(region), 0.0, 1.0))
    assert found.wrong == ("colour",) and found.identical
    assert (found.recall, found.area, found.share) == (0.0, 0.0, 0.0)
    assert found.background == math.inf == found.outside
    assert found.psnr is not None and found.psnr < 15


def test_measures_of_a_mask_that_is_half_right() -> None:
    base, after, region = drawn()
    half = region.copy()
    half[:, : int(np.flatnonzero(region.any(axis=0)).mean())] = False
    found = measure(CASE, base, after, region, Outcome(after, half, 0.0, 1.0))
    assert found.recall == found.area == half.sum() / region.sum()
    assert found.outside is not None and math.isfinite(found.outside)


def test_measures_without_a_mask_or_without_a_change() -> None:
    base, after, region = drawn()
    found = measure(CASE, base, after, region, Outcome(after, None, 4.0, 1.0))
    assert found.recall is found.area is found.share is found.outside is None
    unchanged = edit_cases(["unchanged"], 1)[0]
    nothing = np.zeros_like(region)
    picture = drawn(unchanged)[0]
    found = measure(unchanged, picture, picture, nothing, Outcome(picture, nothing, 0.0, 1.0))
    assert found.success and found.identical
    assert found.psnr is found.ssim is found.recall is found.area is None and found.share == 0.0


def test_measures_survive_json() -> None:
    base, after, region = drawn()
    found = measure(CASE, base, after, region, Outcome(base, region, 1.0, 1.0))
    assert found.outside == math.inf
    assert Measures.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False))) == found
    with pytest.raises(KeyError, match="recall"):
        Measures.from_dict({name: value for name, value in found.to_dict().items() if name != "recall"})


def some_measures(wrong: tuple[str, ...] = (), seconds: float = 1.0, psnr: float | None = 20.0) -> Measures:
    return Measures(wrong, psnr, 0.5, 30.0, math.inf, 1.0, 1.5, 0.1, False, 2.0, seconds)


def test_summaries_are_paired_with_the_dense_row() -> None:
    other = Row("other", "another method", 2, dense)
    cases = edit_cases(["move", "unchanged"], 4)
    numbers = [
        (DENSE, cases[0], some_measures(("place",), 8.0, math.inf)),
        (DENSE, cases[1], some_measures((), 6.0, None)),
        (DENSE, cases[2], some_measures((), 100.0, math.inf)),
        (other, cases[0], some_measures((), 2.0)),
        (other, cases[1], some_measures((), 3.0, None)),
    ]
    first, second = summarise([Result(*one) for one in numbers])
    assert (first.row, first.count, second.row, second.count) == (DENSE, 3, other, 2)
    # Edit by edit, 4 and 2 times as fast; the dense edit that the other row did not make is not counted.
    assert second.columns["speed_up"] is not None and second.columns["speed_up"].value == 3.0
    assert second.differences["dense"]["success"] == Estimate(50.0, 0.0, 100.0, 2)
    assert second.differences["dense"]["psnr"] is None  # the dense row's are infinite
    assert first.columns["success"] is not None and first.columns["success"].value == pytest.approx(200 / 3)
    assert second.columns["psnr"] == Estimate(20.0, 20.0, 20.0, 1)
    assert first.by_kind == {"move": (1, 2), "unchanged": (1, 1)} and second.unchanged == (0, 1)
    values = json.loads(json.dumps([first.to_dict(), second.to_dict()], allow_nan=False))
    assert values[0]["psnr"]["value"] == "inf" and values[1]["outside"]["value"] == "inf"
