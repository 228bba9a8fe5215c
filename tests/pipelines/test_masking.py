"""Finding masks, and carrying them between latents and pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fisedit_compile.errors import MaskError, OptionError
from fisedit_compile.pipelines.masks.cells import grow_mask, same_aspect, to_latents, to_pixels
from fisedit_compile.pipelines.masks.finding import MaskFinder
from fisedit_compile.pipelines.masks.pasting import paste_pixels
from fisedit_compile.pipelines.masks.regions import find_region, grow_region, open_region, otsu_threshold
from fisedit_compile.pipelines.masks.settings import PROBE_GROWTH_PIXELS, AutomaticMask

LEVELS = 257
levels = st.integers(0, 64).map(lambda level: level / 64)
maps = arrays(np.float64, st.tuples(st.integers(2, 9), st.integers(2, 9)), elements=levels)
samples = arrays(bool, st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 5)))


def between_variance(values: np.ndarray, threshold: float) -> float:
    """Variance between the two classes of the values' bin centres, by its definition; 0 when one is empty."""
    bins = (np.minimum(np.floor(values * 256), 255) + 0.5) / 256
    upper = bins[values > threshold]
    lower = bins[values <= threshold]
    if not len(upper) or not len(lower):
        return 0.0
    share = len(upper) / values.size
    return share * (1 - share) * (upper.mean() - lower.mean()) ** 2


@given(maps)
def test_otsu_is_as_good_as_the_best_of_all_thresholds(values: np.ndarray) -> None:
    best = max(between_variance(values, level / 256 - 1e-9) for level in range(LEVELS))
    assert between_variance(values, otsu_threshold(values)) == pytest.approx(best, rel=1e-9)


def test_otsu_splits_two_clusters_in_the_middle() -> None:
    values = np.concatenate([np.full(90, 0.1), np.full(10, 0.9)])
    assert otsu_threshold(values) == pytest.approx(0.5, abs=0.01)


def test_otsu_of_one_value_has_no_upper_class() -> None:
    assert not (np.zeros((3, 3)) > otsu_threshold(np.zeros((3, 3)))).any()


@given(arrays(bool, st.tuples(st.integers(2, 8), st.integers(2, 8))))
def test_opening_keeps_exactly_the_union_of_fitting_squares(region: np.ndarray) -> None:
    expected = np.zeros_like(region)
    for row in range(region.shape[0] - 1):
        for column in range(region.shape[1] - 1):
            if region[row : row + 2, column : column + 2].all():
                expected[row : row + 2, column : column + 2] = True
    assert np.array_equal(open_region(region, 2), expected)


def test_opening_removes_single_cells_and_growth_adds_a_border() -> None:
    difference = np.zeros((8, 8))
    difference[1, 1] = 1.0
    difference[4:6, 4:6] = 1.0
    found = find_region(difference, AutomaticMask(growth=0))
    assert found.sum() == 4 and found[4:6, 4:6].all()
    assert find_region(difference, AutomaticMask(opening=0, growth=0)).sum() == 5
    grown = find_region(difference, AutomaticMask(growth=1))
    assert grown.sum() == 16 and grown[3:7, 3:7].all()


def test_growth_in_pixels_adds_all_cells_that_have_a_pixel_so_near() -> None:
    difference = np.zeros((11, 11))
    difference[5, 5] = 1.0
    found = {
        pixels: find_region(difference, AutomaticMask(growth_pixels=pixels, opening=0), pixels_per_cell=8)
        for pixels in (0, 1, 8, 9, 12, 16)
    }
    assert [int(region.sum()) for region in found.values()] == [1, 9, 9, 21, 25, 25]
    assert found[9][3].tolist() == [False] * 4 + [True] * 3 + [False] * 4, "corners are round"
    # Coarser cells hold more pixels each.
    assert find_region(difference, AutomaticMask(growth_pixels=16, opening=0), pixels_per_cell=16).sum() == 9


@given(arrays(bool, st.tuples(st.integers(2, 7), st.integers(2, 7))), st.integers(0, 20), st.integers(1, 9))
def test_growth_in_pixels_by_its_definition(region: np.ndarray, pixels: int, per_cell: int) -> None:
    def apart(first: int, second: int) -> int:
        return max(abs(first - second) - 1, 0) * per_cell

    cells = list(np.ndindex(region.shape))
    expected = [
        region[cell]
        or any(
            region[other] and np.hypot(apart(cell[0], other[0]), apart(cell[1], other[1])) < pixels for other in cells
        )
        for cell in cells
    ]
    grown = grow_region(region, AutomaticMask(growth_pixels=pixels), per_cell)
    assert grown.flatten().tolist() == [bool(one) for one in expected]


def test_a_mask_grows_as_its_method_does_unless_said_otherwise() -> None:
    difference = np.zeros((40, 40))
    difference[20:22, 20:22] = 1.0
    fisedit = AutomaticMask(method="fisedit")
    assert np.array_equal(find_region(difference, fisedit), find_region(difference, AutomaticMask(growth=1)))
    pixels = AutomaticMask(growth_pixels=PROBE_GROWTH_PIXELS)
    assert np.array_equal(find_region(difference, AutomaticMask()), find_region(difference, pixels))
    assert find_region(difference, AutomaticMask()).sum() > 4


def test_holes_are_filled_and_a_lonely_speck_is_kept() -> None:
    ring = np.zeros((9, 9))
    ring[2:7, 2:7] = 1.0
    ring[4, 4] = 0.0
    assert find_region(ring, AutomaticMask(growth=0, opening=0)).sum() == 25
    assert find_region(ring, AutomaticMask(growth=0, opening=0, fill_holes=False)).sum() == 24
    assert find_region(ring, AutomaticMask(method="fisedit", growth=0, opening=0)).sum() == 24
    speck = np.zeros((9, 9))
    speck[3, 3] = 1.0
    assert find_region(speck, AutomaticMask(growth=0)).sum() == 1
    assert find_region(speck, AutomaticMask(method="fisedit", growth=0)).sum() == 0


def test_hysteresis_takes_what_is_connected_with_the_certain() -> None:
    values = np.array([[1.0, 0.3, 0.3, 0.0, 0.3]])
    found = find_region(values, AutomaticMask(threshold=0.5, hysteresis=0.5, opening=0, growth=0))
    assert found.tolist() == [[True, True, True, False, False]]
    assert find_region(values, AutomaticMask(threshold=0.5, opening=0, growth=0)).sum() == 1


def test_growing_a_mask_reaches_diagonal_cells_and_each_sample_alone() -> None:
    mask = torch.zeros(2, 5, 6, dtype=torch.bool)
    mask[0, 1, 1] = True
    grown = grow_mask(mask, 1)
    assert grown.dtype == torch.bool and grown[0].sum() == 9 and grown[0, :3, :3].all() and not grown[1].any()
    assert grow_mask(mask, 0) is mask and grow_mask(mask, 2)[0].sum() == 16


def test_differences_are_measured_where_it_is_said() -> None:
    base, edited = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    edited[..., 0, 0], edited[..., 0, 1], edited[..., 3, 3] = 1.0, 0.5, 0.25
    mask, near = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    mask[:, 0, 0] = True
    near[:, 0] = True
    pasted, (greatest, mean) = paste_pixels(edited, base, mask, near)
    assert (greatest, mean) == (0.5, pytest.approx(0.5 / 3)) and float(pasted.sum()) == 3.0
    assert paste_pixels(edited, base, mask)[1] == (0.5, pytest.approx(0.75 / 15))


def test_a_given_threshold_is_used() -> None:
    difference = np.array([[0.0, 0.2], [0.6, 1.0]])
    settings = AutomaticMask(threshold=0.1, opening=0, growth=0)
    assert find_region(difference, settings).tolist() == [[False, True], [True, True]]


def test_the_finder_weighs_every_step_alike() -> None:
    # The second step's differences are a thousand times greater, in another place; both places count.
    recorded = torch.zeros(1, 4, 6, 6)
    first, second = recorded.clone(), recorded.clone()
    first[:, :, 0:2, 0:2] = 0.01
    second[:, :, 4:6, 4:6] = 10.0
    finder = MaskFinder(AutomaticMask(growth=0))
    finder.add(first, recorded)
    finder.add(second, recorded)
    mask = finder.mask()
    assert mask.shape == (1, 6, 6) and mask.dtype == torch.bool
    assert mask.sum() == 8 and bool(mask[0, 0:2, 0:2].all()) and bool(mask[0, 4:6, 4:6].all())


def test_the_finder_treats_samples_apart() -> None:
    recorded = torch.zeros(2, 4, 6, 6)
    latents = recorded.clone()
    latents[0, :, 0:2, 0:2] = 1e-3
    latents[1, :, 2:6, 2:6] = 1e3
    finder = MaskFinder(AutomaticMask(growth=0))
    finder.add(latents, recorded)
    assert finder.mask().sum(dim=(1, 2)).tolist() == [4, 16]


def test_equal_latents_give_an_empty_mask() -> None:
    finder = MaskFinder(AutomaticMask(growth=0))
    finder.add(torch.ones(1, 4, 5, 5), torch.ones(1, 4, 5, 5))
    assert not finder.mask().any()


def test_the_finder_refuses_nan_and_no_steps() -> None:
    with pytest.raises(MaskError, match="at least one"):
        MaskFinder(AutomaticMask(growth=0)).mask()
    finder = MaskFinder(AutomaticMask(growth=0))
    finder.add(torch.full((1, 4, 5, 5), float("nan")), torch.ones(1, 4, 5, 5))
    with pytest.raises(MaskError, match="NaN"):
        finder.mask()


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "fisedit", "steps": 0},
        {"method": "fisedit", "steps": 51},
        {"method": "fisedit", "out_of": 0},
        {"steps": 10},
        {"out_of": 50},
        {"method": "fisedit", "global_share": 0.5},
        {"method": "guess"},
        {"growth": 1, "growth_pixels": 8},
        {"growth_pixels": -8},
        {"hysteresis": 0.0},
        {"hysteresis": 1.5},
        {"global_share": 0.0},
        {"threshold": 1.0},
        {"threshold": -0.1},
        {"opening": -1},
        {"growth": -1},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="automatic mask"):
        AutomaticMask(**settings)


@pytest.mark.parametrize(("steps", "expected"), [(50, 10), (20, 4), (19, 4), (4, 1), (1, 1), (100, 20)])
def test_steps_are_scaled_to_the_run(steps: int, expected: int) -> None:
    assert AutomaticMask(method="fisedit").scaled_steps(steps) == expected


@given(samples, st.integers(1, 3), st.integers(1, 3))
def test_pixels_of_a_latent_mask_reduce_to_it_again(mask: np.ndarray, down: int, across: int) -> None:
    cells = torch.from_numpy(mask)
    height, width = cells.shape[1] * down, cells.shape[2] * across
    pixels = to_pixels(cells, height, width)
    assert pixels.shape == (cells.shape[0], height, width)
    assert int(pixels.sum()) == int(cells.sum()) * down * across
    latents = torch.zeros(cells.shape[0], 4, *cells.shape[1:])
    assert torch.equal(to_latents(pixels, latents), cells)


def test_one_white_pixel_makes_its_cell_active() -> None:
    mask = torch.zeros(8, 8)
    mask[5, 2] = 1
    cells = to_latents(mask, torch.zeros(3, 4, 4, 4))
    assert cells.shape == (1, 4, 4) and cells.nonzero().tolist() == [[0, 2, 1]]


def test_masks_must_be_as_many_as_pictures() -> None:
    with pytest.raises(MaskError, match="3 pictures and the mask has 2"):
        to_latents(torch.ones(2, 8, 8), torch.zeros(3, 4, 4, 4))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 16), st.integers(1, 900), st.data())
def test_masks_of_the_whole_picture_have_its_aspect_ratio(
    height: int, width: int, side: int, percent: int, data: st.DataObject
) -> None:
    """Whatever the scale of the mask, and however both were rounded: cells of ``side`` pixels, masks of whole ones."""
    pixels = [side * cells + data.draw(st.integers(0, side - 1)) for cells in (height, width)]
    cut = data.draw(st.booleans())
    cells = (height, width) if cut else tuple(-(-length // side) for length in pixels)
    for rounded in (lambda n: n // 100, lambda n: -(-n // 100), lambda n: (n + 50) // 100):
        mask = tuple(max(1, rounded(percent * length)) for length in pixels)
        if all(rounded(percent * length) for length in pixels):
            assert same_aspect(mask, cells)
    assert same_aspect(cells, cells)


@pytest.mark.parametrize(
    ("mask", "fits"),
    [
        ((512, 512), True),
        ((517, 519), True),
        ((64, 64), True),
        ((1024, 1024), True),
        ((512, 520), True),
        ((512, 528), False),
        ((1024, 1056), False),
        ((512, 768), False),
        ((768, 512), False),
        ((63, 66), False),
        ((1, 2), True),
        ((1, 4), False),
    ],
)
def test_another_aspect_ratio_is_refused(mask: tuple[int, int], fits: bool) -> None:
    latents = torch.zeros(1, 1, 64, 64)
    if fits:
        assert to_latents(torch.ones(mask), latents).all()
    else:
        with pytest.raises(MaskError, match=rf"64:64 = 1 .* got one of {mask[0]}x{mask[1]} .* Crop or pad it"):
            to_latents(torch.ones(mask), latents)


def test_a_turned_mask_is_told_from_a_cut_one() -> None:
    with pytest.raises(MaskError, match=r"32:48 = 0\.667 .* got one of 96x64 .* 1\.5\. Turn it"):
        to_latents(torch.ones(96, 64), torch.zeros(1, 1, 32, 48))


def test_thresholds_and_channels_reach_the_latents() -> None:
    mask = torch.zeros(8, 8)
    mask[5, 2] = 0.3
    latents = torch.zeros(3, 4, 4, 4)
    assert not to_latents(mask, latents).any() and to_latents(mask, latents, 0.3).sum() == 1
    assert to_latents(mask.expand(3, 8, 8), latents[:1], 0.3).shape == (1, 4, 4)


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(MaskError, match="multiple"):
        to_pixels(torch.ones(1, 4, 4, dtype=torch.bool), 10, 8)


def test_pasting_keeps_the_inside_and_measures_the_outside() -> None:
    base = torch.zeros(1, 3, 2, 2)
    edited = torch.tensor([[0.5, 0.25], [0.0, 1.0]]).expand(1, 3, 2, 2)
    mask = torch.tensor([[[False, False], [True, True]]])
    pasted, (greatest, mean) = paste_pixels(edited, base, mask)
    assert pasted[0, 0].tolist() == [[0.0, 0.0], [0.0, 1.0]]
    assert (greatest, mean) == (0.5, 0.375)
    everything, error = paste_pixels(edited, base, torch.ones_like(mask))
    assert torch.equal(everything, edited) and error == (0.0, 0.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"growth_pixels": 1.5},
        {"growth_pixels": "a"},
        {"growth": float("nan")},
        {"opening": None},
        {"opening": 2.5},
        {"threshold": "a"},
        {"hysteresis": None},
        {"global_share": True},
    ],
    ids=str,
)
def test_settings_of_other_types_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(wrong))} must be a"):
        AutomaticMask(**wrong)


def test_numbers_of_numpy_are_numbers() -> None:
    settings = AutomaticMask(growth_pixels=np.int64(3), threshold=np.float32(0.5))
    assert settings.grown_pixels == 3
