"""The checker on pictures whose scene is known."""

import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from fisedit_compile.scenes import ATTRIBUTES, Scene, all_scenes, caption, check, read_scene, render


def test_checker_agrees_with_the_renderer() -> None:
    scenes = random.Random(1).sample(all_scenes(), 120)
    wrong = [scene for number, scene in enumerate(scenes) if not all(check(render(scene, number), scene).values())]
    assert not wrong


@pytest.mark.parametrize(
    ("attribute", "other"),
    [
        ("object", {"object_kind": "house"}),
        ("colour", {"colour": "blue"}),
        ("place", {"place": "right"}),
        ("ground", {"ground": "sand"}),
        ("time", {"time": "night"}),
        ("fireworks", {"fireworks": True}),
    ],
)
def test_checker_tells_which_attribute_is_wrong(attribute: str, other: dict[str, object]) -> None:
    scene = Scene("ball", "red", "left", "grass", "day")
    verdict = check(render(replace(scene, **other), 5), scene)  # type: ignore[arg-type]
    assert verdict == {name: name != attribute for name in ATTRIBUTES}


def test_checker_takes_captions_and_images() -> None:
    scene = Scene("nothing", ground="snow", time="sunset", fireworks=True)
    assert all(check(Image.fromarray(render(scene, 2)), caption(scene)).values())


def test_checker_knows_a_shape_that_is_none_of_the_objects() -> None:
    picture = render(Scene("nothing"), 0).copy()
    picture[84:90, 10:118] = (225, 25, 30)
    assert read_scene(picture).object_kind is None


def test_checker_refuses_other_pictures() -> None:
    with pytest.raises(ValueError, match=r"uint8 \[64, 64, 3\]"):
        check(np.zeros((64, 64, 3), dtype=np.uint8), Scene())
