"""Pairs of captions that differ in one thing, with the pixels that the difference touches."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from .render import SIZE, render
from .world import COLOURS, GROUNDS, OBJECTS, PLACES, TIMES, Scene, all_scenes, caption

EditKind = Literal["add", "remove", "recolour", "replace", "move", "ground", "time", "fireworks", "unchanged"]
EDIT_KINDS: tuple[EditKind, ...] = get_args(EditKind)
SMALL_KINDS: tuple[EditKind, ...] = ("recolour", "replace", "remove", "fireworks")
"""Kinds that touch a few percent of the picture."""

MASK_THRESHOLD = 8
"""Difference of a channel (of 255) above which a pixel counts as changed."""


class EditPair(NamedTuple):
    """A caption, the caption after an edit, and the true mask: ``bool`` of shape ``[size, size]``."""

    prompt: str
    edited_prompt: str
    mask: NDArray[np.bool_]


def edits_of(scene: Scene, kind: EditKind) -> list[Scene]:
    """All scenes that an edit of a kind makes of a scene, in a fixed order.

    Kinds are ``add`` (any object to an empty scene), ``remove``, ``recolour``, ``replace`` (by another object),
    ``move``, ``ground``, ``time``, ``fireworks`` (lit or put out) and ``unchanged``.  The list is empty where the scene
    has no object that the edit needs, or has one where an object is to be added.
    """
    if kind == "unchanged":
        return [scene]
    if kind == "fireworks":
        return [replace(scene, fireworks=not scene.fireworks)]
    if kind == "ground":
        return [replace(scene, ground=ground) for ground in GROUNDS if ground != scene.ground]
    if kind == "time":
        return [replace(scene, time=time) for time in TIMES if time != scene.time]
    if scene.is_empty:
        objects = [(o, c, p) for o in OBJECTS for c in COLOURS for p in PLACES] if kind == "add" else []
        return [replace(scene, object_kind=o, colour=c, place=p) for o, c, p in objects]
    if kind == "remove":
        return [replace(scene, object_kind="nothing")]
    if kind == "recolour":
        return [replace(scene, colour=colour) for colour in COLOURS if colour != scene.colour]
    if kind == "replace":
        return [replace(scene, object_kind=other) for other in OBJECTS if other != scene.object_kind]
    if kind == "move":
        return [replace(scene, place=place) for place in PLACES if place != scene.place]
    return []


def edited(scene: Scene, kind: EditKind, generator: random.Random) -> Scene:
    """The scene after an edit of a kind, one of :func:`edits_of`.

    Raises:
        ValueError: the edit is not one of this scene: there is no object, or already one.
    """
    found = edits_of(scene, kind)
    if not found:
        raise ValueError(f"there is nothing to {kind} in the scene: {caption(scene)}")
    return found[0] if len(found) == 1 else generator.choice(found)


def true_mask(before: Scene, after: Scene, seed: int, size: int = SIZE) -> NDArray[np.bool_]:
    """The pixels in which two scenes' pictures of one seed differ, ``bool`` of shape ``[size, size]``."""
    difference = np.abs(render(before, seed, size).astype(np.int16) - render(after, seed, size).astype(np.int16))
    mask: NDArray[np.bool_] = difference.max(axis=2) > MASK_THRESHOLD
    return mask


def edit_pairs(count: int, seed: int, size: int = SIZE) -> Iterator[EditPair]:
    """Yield edits of scenes, the four kinds of :data:`SMALL_KINDS` in turn.

    Args:
        count: how many pairs.
        seed: chooses them; the same seed gives the same pairs.
        size: width and height of the masks in pixels.

    Raises:
        ValueError: ``count`` is negative.
    """
    if count < 0:
        raise ValueError(f"count is {count}, and has to be 0 or more")
    generator = random.Random(seed)
    scenes = [scene for scene in all_scenes() if not scene.is_empty]
    for number in range(count):
        scene = generator.choice(scenes)
        after = edited(scene, SMALL_KINDS[number % len(SMALL_KINDS)], generator)
        mask = true_mask(scene, after, generator.randrange(2**31), size)
        yield EditPair(caption(scene), caption(after), mask)
