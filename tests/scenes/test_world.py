"""The world's captions, its split, its pictures and its edits."""

import random
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from fisedit_compile.scenes import (
    Scene,
    all_scenes,
    caption,
    edit_pairs,
    held_back_scenes,
    parse_caption,
    render,
    training_scenes,
)
from fisedit_compile.scenes.world import COLOURS, OBJECTS, PLACES, vocabulary


def changed(before: Scene, after: Scene, seed: int) -> NDArray[np.bool_]:
    """The pixels in which two pictures of the same seed differ at all."""
    mask: NDArray[np.bool_] = (render(before, seed) != render(after, seed)).any(axis=2)
    return mask


def test_caption_names_every_attribute() -> None:
    scene = Scene("ball", "red", "left", "grass", "night", fireworks=True)
    assert caption(scene) == "a red ball on the left, on the grass, at night, with fireworks"


def test_captions_are_unique_and_can_be_read_back() -> None:
    scenes = all_scenes()
    assert len({caption(scene) for scene in scenes}) == len(scenes) == 666
    assert all(parse_caption(caption(scene)) == scene for scene in scenes)
    assert len(vocabulary()) < 50


def test_unknown_captions_and_attributes_are_refused() -> None:
    with pytest.raises(ValueError, match="is not the caption of a scene"):
        parse_caption("a green ball on the left, on the grass, by day")
    with pytest.raises(ValueError, match="colour is 'green'"):
        Scene(colour="green")  # type: ignore[arg-type]


def test_held_back_scenes_are_not_trained_on() -> None:
    held_back, trained = held_back_scenes(), training_scenes()
    assert len(held_back) == 200
    assert not set(held_back) & set(trained)
    assert set(held_back) | set(trained) == set(all_scenes())


def test_training_knows_every_value_of_every_attribute_with_every_object() -> None:
    trained = training_scenes()
    for kind in OBJECTS:
        of_kind = [scene for scene in trained if scene.object_kind == kind]
        assert {(scene.colour, scene.place) for scene in of_kind} == {(c, p) for c in COLOURS for p in PLACES}
        assert len({(scene.ground, scene.time, scene.fireworks) for scene in of_kind}) == 18
    assert sum(scene.is_empty for scene in trained) == 18


def test_rendering_is_deterministic() -> None:
    for scene in random.Random(0).sample(all_scenes(), 20):
        picture = render(scene, 11)
        assert picture.shape == (128, 128, 3)
        assert picture.dtype == np.uint8
        assert np.array_equal(picture, render(scene, 11))
        assert not np.array_equal(picture, render(scene, 12))


@pytest.mark.parametrize("seed", range(5))
def test_recolouring_touches_the_object_alone(seed: int) -> None:
    for kind in OBJECTS:
        scene = Scene(kind, "red", "middle", "sand", "sunset", fireworks=True)
        silhouette = changed(scene, replace(scene, object_kind="nothing"), seed)
        mask = changed(scene, replace(scene, colour="blue"), seed)
        assert mask.any()
        assert not (mask & ~silhouette).any()
        assert 0.02 < mask.mean() < 0.09


@pytest.mark.parametrize("seed", range(5))
def test_fireworks_touch_a_few_percent_of_the_upper_sky(seed: int) -> None:
    scene = Scene("house", "blue", "right", "snow", "day")
    mask = changed(scene, replace(scene, fireworks=True), seed)
    assert not mask[60:].any()
    assert 0.03 < mask.mean() < 0.09


def test_another_ground_leaves_sky_and_object_as_they_are() -> None:
    scene = Scene("car", "purple", "left", "grass", "night", fireworks=True)
    mask = changed(scene, replace(scene, ground="snow"), 4)
    silhouette = changed(scene, replace(scene, object_kind="nothing"), 4)
    assert not mask[:76].any()
    # The object's rim is mixed with what lies behind it.
    assert (mask & silhouette).sum() < 0.2 * silhouette.sum()


def test_edit_pairs_are_deterministic_and_come_with_their_masks() -> None:
    pairs = list(edit_pairs(40, seed=3))
    again = list(edit_pairs(40, seed=3))
    assert [pair[:2] for pair in pairs] == [pair[:2] for pair in again]
    assert all(np.array_equal(one.mask, other.mask) for one, other in zip(pairs, again, strict=True))
    for prompt, edited_prompt, mask in pairs:
        assert parse_caption(prompt) != parse_caption(edited_prompt)
        assert mask.dtype == np.bool_
        assert mask.shape == (128, 128)
        assert 0.01 < mask.mean() < 0.12
    with pytest.raises(ValueError, match="count is -1"):
        next(edit_pairs(-1, seed=0))
