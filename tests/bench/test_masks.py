"""Masks of the benchmark: exact density, and the statistics that the ragged ones are made for."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fisedit_compile.bench.masks import SHAPES, make_mask
from fisedit_compile.errors import OptionError


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("height", "width"), [(64, 64), (24, 40), (7, 5), (1, 1)])
@pytest.mark.parametrize("density", [0.01, 0.1, 0.37, 1.0])
def test_density_is_exact(shape: str, height: int, width: int, density: float) -> None:
    mask = make_mask(shape, density, height, width, seed=3)
    assert mask.dtype == torch.bool and mask.shape == (height, width)
    assert int(mask.sum()) == max(1, round(density * height * width))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_seed_names_a_mask(shape: str) -> None:
    first, again, other = (make_mask(shape, 0.1, 32, 48, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def _extent(mask: torch.Tensor) -> tuple[int, int]:
    rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
    return int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1


@pytest.mark.parametrize("seed", range(5))
def test_a_square_is_square(seed: int) -> None:
    height, width = _extent(make_mask("square", 0.0625, 64, 96, seed))
    assert abs(height - width) <= 1
    assert height * width <= 1.15 * 0.0625 * 64 * 96


@pytest.mark.parametrize("seed", range(5))
def test_a_disc_is_round(seed: int) -> None:
    mask = make_mask("disc", 0.0625, 64, 96, seed)
    height, width = _extent(mask)
    assert abs(height - width) <= 1
    assert int(mask.sum()) / (height * width) == pytest.approx(torch.pi / 4, abs=0.06)


def test_ragged_masks_have_the_statistics_of_released_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    # The mean and the deciles of the areas of the released masks, as a normal distribution cut at 2 %.
    areas = (0.23 + 0.1 * torch.randn(200, generator=generator)).clamp(0.02, 0.6)
    areas += 0.23 - areas.mean()
    active = []
    for seed, area in enumerate(areas.tolist()):
        mask = make_mask("ragged", area, 64, 64, seed).float()[None]
        active.append([float(functional.max_pool2d(mask, window).mean()) for window in (1, 2, 4, 8)])
    found = torch.tensor(active).mean(dim=0)
    torch.testing.assert_close(found, torch.tensor([0.23, 0.28, 0.35, 0.49]), atol=0.015, rtol=0.0)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(OptionError, match="unknown mask shape 'star'; expected one of square, disc, ragged"):
        make_mask("star", 0.1, 8, 8)
    for density in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(OptionError, match="above 0 and at most 1"):
            make_mask("disc", density, 8, 8)
    with pytest.raises(OptionError, match="got 0x8"):
        make_mask("disc", 0.1, 0, 8)
