"""Edits are judged by what was asked for, and found in the pictures where they are: held to the renderer."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fisedit_compile.errors import OptionError
from fisedit_compile.scenes import ATTRIBUTES, EDIT_KINDS, EditKind, Scene, all_scenes, caption, check, render
from fisedit_compile.scenes.checker import ASKED, check_edit
from fisedit_compile.scenes.edits import edited, edits_of, true_mask
from fisedit_compile.scenes.regions import asked_region, ground_region, object_region

#: How much larger than the pixels that change a region may be: silhouettes hold doors and roofs, rays have rims.
MOST_AREA = {"recolour": 1.6, "replace": 2.3, "fireworks": 1.8}


def pairs_of(kind: EditKind, count: int) -> list[tuple[Scene, Scene]]:
    generator = random.Random(kind)
    scenes = [scene for scene in all_scenes() if edits_of(scene, kind)]
    return [(scene, edited(scene, kind, generator)) for scene in generator.sample(scenes, count)]


@pytest.mark.parametrize("size", [128, 256])
@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_regions_hold_what_the_renderer_changes_and_little_else(kind: EditKind, size: int) -> None:
    for number, (before, after) in enumerate(pairs_of(kind, 6 if size == 128 else 2)):
        base, dense = render(before, number, size), render(after, number, size)
        region, truth = asked_region(kind, base, dense), true_mask(before, after, number, size)
        assert region.shape == (size, size) and region.dtype == np.bool_
        if kind == "unchanged":
            assert not region.any()
            continue
        assert (region & truth).sum() >= 0.99 * truth.sum()
        assert region.sum() <= MOST_AREA.get(kind, 1.2) * truth.sum()


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_an_edit_is_right_where_the_new_attribute_is_there_and_all_others_are_kept(kind: EditKind) -> None:
    for number, (before, after) in enumerate(pairs_of(kind, 3)):
        base, picture = render(before, number), render(after, number)
        assert check_edit(base, picture, after, kind) == dict.fromkeys(ATTRIBUTES, True)
        assert check_edit(base, Image.fromarray(picture), caption(after), kind) == dict.fromkeys(ATTRIBUTES, True)
        if kind != "unchanged":
            kept = check_edit(base, base, after, kind)
            assert {name for name, right in kept.items() if not right} <= set(ASKED[kind]) and not all(kept.values())


OTHERS = {
    "object": {"object_kind": "house"},
    "colour": {"colour": "blue"},
    "place": {"place": "right"},
    "ground": {"ground": "sand"},
    "time": {"time": "night"},
    "fireworks": {"fireworks": True},
}


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_what_changes_unasked_is_wrong(attribute: str) -> None:
    scene = Scene("ball", "red", "left", "grass", "day")
    other = render(replace(scene, **OTHERS[attribute]), 5)  # type: ignore[arg-type]
    assert check_edit(render(scene, 5), other, scene, "unchanged") == {name: name != attribute for name in ATTRIBUTES}


def test_what_the_base_already_shows_otherwise_is_kept_and_not_blamed_on_the_edit() -> None:
    asked = Scene("ball", "blue", "left", "grass", "day")
    base = render(replace(asked, colour="red", ground="sand"), 3)
    assert all(check_edit(base, render(replace(asked, ground="sand"), 3), asked, "recolour").values())
    assert not check_edit(base, render(asked, 3), asked, "recolour")["ground"]


def test_a_shape_that_is_no_object_is_found_by_its_colour() -> None:
    picture = render(Scene("nothing"), 0).copy()
    assert not object_region(picture).any()
    picture[84:90, 10:118] = (225, 25, 30)
    found = object_region(picture)
    assert found[84:90, 10:118].all() and found.sum() <= 8 * 110


@pytest.mark.parametrize("size", [128, 256])
def test_the_ground_begins_at_the_horizon(size: int) -> None:
    for number, scene in enumerate(random.Random(4).sample(all_scenes(), 6)):
        picture, empty = render(scene, number, size), render(Scene("nothing", ground=scene.ground), number, size)
        horizon = int((empty[:, 0].astype(int) != empty[-1, 0]).any(axis=1).sum())
        assert not ground_region(picture)[: horizon - 1].any() and ground_region(picture)[horizon + 1 :].all()


@pytest.mark.parametrize("size", [160, 256])
def test_larger_drawings_have_the_same_content(size: int) -> None:
    for number, scene in enumerate(random.Random(9).sample(all_scenes(), 8)):
        picture = render(scene, number, size)
        assert picture.shape == (size, size, 3) and all(check(picture, scene).values())
        small = np.asarray(Image.fromarray(picture).resize((128, 128), Image.Resampling.BOX), dtype=np.int16)
        apart = np.abs(small - render(scene, number)).max(axis=2)
        # Rims are mixed in other shares.
        assert (apart > 8).mean() < 0.04


def test_sizes_that_nothing_can_be_drawn_at_are_refused() -> None:
    with pytest.raises(OptionError, match="from 32 to 4096 pixels a side, got 16"):
        render(Scene(), 0, 16)


@pytest.mark.parametrize("shape", [(128, 160, 3), (128, 128), (96, 96, 3)])
def test_other_pictures_are_refused(shape: tuple[int, ...]) -> None:
    picture: NDArray[np.uint8] = np.zeros(shape, dtype=np.uint8)
    with pytest.raises(ValueError, match="side of 128 pixels or more"):
        object_region(picture)


def test_pictures_of_two_sizes_have_no_region() -> None:
    with pytest.raises(ValueError, match="128 and 256 pixels a side"):
        asked_region("time", render(Scene(), 0), render(Scene(), 0, 256))


def test_edits_that_a_scene_does_not_have_are_refused() -> None:
    assert edits_of(Scene("nothing"), "move") == [] == edits_of(Scene(), "add")
    with pytest.raises(ValueError, match="nothing to recolour in the scene: an empty scene"):
        edited(Scene("nothing"), "recolour", random.Random(0))
