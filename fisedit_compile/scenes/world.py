"""The small world of scenes: its attributes, its captions and which combinations training never sees.

A :class:`Scene` is a handful of named choices.  Every choice has its own word in the caption, so two captions
that differ in one word describe two pictures that differ in one thing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

ObjectKind = Literal["ball", "house", "car", "nothing"]
Colour = Literal["red", "yellow", "blue", "purple"]
Place = Literal["left", "middle", "right"]
Ground = Literal["grass", "sand", "snow"]
TimeOfDay = Literal["day", "sunset", "night"]

OBJECTS: tuple[ObjectKind, ...] = ("ball", "house", "car")
COLOURS: tuple[Colour, ...] = ("red", "yellow", "blue", "purple")
PLACES: tuple[Place, ...] = ("left", "middle", "right")
GROUNDS: tuple[Ground, ...] = ("grass", "sand", "snow")
TIMES: tuple[TimeOfDay, ...] = ("day", "sunset", "night")

HELD_BACK_COUNT = 200
"""How many combinations are kept away from training, to measure the model on captions it has never seen."""

_PLACE_PHRASES: dict[Place, str] = {
    "left": "on the left",
    "middle": "in the middle",
    "right": "on the right",
}
_TIME_PHRASES: dict[TimeOfDay, str] = {"day": "by day", "sunset": "at sunset", "night": "at night"}


@dataclass(frozen=True, order=True)
class Scene:
    """One combination of attributes.

    ``object_kind`` may be ``"nothing"``: the scene is then empty, and ``colour`` and ``place`` hold the first
    of their values so that equal pictures are equal scenes.

    Raises:
        ValueError: an attribute is not one of the values the world knows.
    """

    object_kind: ObjectKind = "ball"
    colour: Colour = "red"
    place: Place = "left"
    ground: Ground = "grass"
    time: TimeOfDay = "day"
    fireworks: bool = False

    def __post_init__(self) -> None:
        """Check every attribute and bring an empty scene to its one spelling."""
        allowed: tuple[tuple[str, str, Sequence[str]], ...] = (
            ("object_kind", self.object_kind, (*OBJECTS, "nothing")),
            ("colour", self.colour, COLOURS),
            ("place", self.place, PLACES),
            ("ground", self.ground, GROUNDS),
            ("time", self.time, TIMES),
        )
        for name, value, values in allowed:
            if value not in values:
                raise ValueError(f"{name} is {value!r}, and has to be one of {', '.join(values)}")
        if self.object_kind == "nothing":
            object.__setattr__(self, "colour", COLOURS[0])
            object.__setattr__(self, "place", PLACES[0])

    @property
    def is_empty(self) -> bool:
        """Whether no object stands in the scene."""
        return self.object_kind == "nothing"


def caption(scene: Scene) -> str:
    """The caption of a scene, such as ``a red ball on the left, on the grass, at night, with fireworks``."""
    if scene.is_empty:
        subject = "an empty scene"
    else:
        subject = f"a {scene.colour} {scene.object_kind} {_PLACE_PHRASES[scene.place]}"
    parts = [subject, f"on the {scene.ground}", _TIME_PHRASES[scene.time]]
    if scene.fireworks:
        parts.append("with fireworks")
    return ", ".join(parts)


def all_scenes() -> list[Scene]:
    """Every combination of attributes, in a fixed order: 648 scenes with an object and 18 empty ones."""
    subjects: list[tuple[ObjectKind, Colour, Place]] = list(product(OBJECTS, COLOURS, PLACES))
    subjects.append(("nothing", COLOURS[0], PLACES[0]))
    return [
        Scene(object_kind, colour, place, ground, time, fireworks)
        for (object_kind, colour, place), ground, time, fireworks in product(subjects, GROUNDS, TIMES, (False, True))
    ]


def _rank(scene: Scene) -> str:
    """A fixed pseudo-random rank, so that the split depends on nothing but the caption."""
    return hashlib.sha256(caption(scene).encode()).hexdigest()


def held_back_scenes() -> list[Scene]:
    """The 200 scenes with an object whose combination of attributes is never shown in training."""
    return sorted((scene for scene in all_scenes() if not scene.is_empty), key=_rank)[:HELD_BACK_COUNT]


def training_scenes() -> list[Scene]:
    """The scenes training draws from: all but the held-back ones."""
    held_back = set(held_back_scenes())
    return [scene for scene in all_scenes() if scene not in held_back]


_CAPTIONS: dict[str, Scene] = {}


def parse_caption(text: str) -> Scene:
    """The scene a caption describes: the inverse of :func:`caption`.

    Raises:
        ValueError: the text is not the caption of any scene.
    """
    if not _CAPTIONS:
        _CAPTIONS.update((caption(scene), scene) for scene in all_scenes())
    try:
        return _CAPTIONS[text]
    except KeyError:
        raise ValueError(f"{text!r} is not the caption of a scene of this world") from None


def vocabulary() -> list[str]:
    """Every word (and punctuation mark) that occurs in a caption, sorted."""
    words: set[str] = set()
    for scene in all_scenes():
        words.update(caption(scene).replace(",", " ,").split())
    return sorted(words)
