"""Overlays, sheets and distances of pictures."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from fisedit_compile.cli.pictures import SHOWN_SIDE, greatest_difference, overlay, peak_ratio, sheet


@pytest.fixture
def mask() -> Image.Image:
    mask = Image.new("L", (6, 4), 0)
    mask.paste(255, (0, 0, 3, 4))
    return mask


def test_the_overlay_tints_inside_and_darkens_outside(mask: Image.Image) -> None:
    shown = np.asarray(overlay(Image.new("RGB", (6, 4), (100, 100, 100)), mask))
    assert (shown[:, :3] == (170, 82, 82)).all() and (shown[:, 3:] == 60).all()


def test_the_sheet_shows_every_picture_enlarged() -> None:
    rows = [[("first", Image.new("RGB", (32, 16), (200, 0, 0))), ("second", Image.new("RGB", (32, 16), (0, 0, 200)))]]
    shown = np.asarray(sheet(rows))
    factor = SHOWN_SIDE // 16
    assert shown.shape[1] > 2 * 32 * factor
    assert (shown == (200, 0, 0)).all(axis=2).sum() == 32 * 16 * factor**2
    assert (shown == (0, 0, 200)).all(axis=2).sum() == 32 * 16 * factor**2


def test_large_pictures_are_not_enlarged() -> None:
    assert sheet([[("large", Image.new("RGB", (600, 500)))]]).width < 700


def test_distances_are_of_their_side_of_the_mask(mask: Image.Image) -> None:
    left = Image.new("RGB", (6, 4), (100, 100, 100))
    right = left.copy()
    right.paste((151, 151, 151), (0, 0, 3, 4))
    right.putpixel((5, 3), (100, 93, 100))
    assert peak_ratio(left, right, mask) == pytest.approx(-20 * math.log10(51 / 255))
    assert greatest_difference(left, right, mask) == 7
    assert peak_ratio(left, left, mask) == math.inf and greatest_difference(left, left, mask) == 0


def test_masks_without_an_inside_or_an_outside() -> None:
    left, right = Image.new("RGB", (2, 2), 0), Image.new("RGB", (2, 2), (9, 9, 9))
    assert peak_ratio(left, right, Image.new("L", (2, 2), 0)) is None
    assert greatest_difference(left, right, Image.new("L", (2, 2), 255)) == 0
