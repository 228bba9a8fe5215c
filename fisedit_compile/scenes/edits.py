"""Pairs of captions that differ in one thing, with the pixels that the difference touches."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .render import render
from .world import COLOURS, OBJECTS, Scene, all_scenes, caption

EditKind = Literal["recolour", "replace", "remove", "fireworks"]
EDIT_KINDS: tuple[EditKind, ...] = ("recolour", "replace", "remove", "fireworks")

MASK_THRESHOLD = 8
"""Difference of a channel (of 255) above which a pixel counts as changed."""


class EditPair(NamedTuple):
    """A caption, the caption after an edit, and the true mask: ``bool`` of shape ``[128, 128]``."""

    prompt: str
    edited_prompt: str
    mask: NDArray[np.bool_]


def edited(scene: Scene, kind: EditKind, generator: random.Random) -> Scene:
    """The scene after an edit: another colour, another object, no object, or fireworks lit or put out.

    Raises:
        ValueError: the scene is empty, and the edit is one of an object.
    """
    if kind == "fireworks":
        return replace(scene, fireworks=not scene.fireworks)
    if scene.is_empty:
        raise ValueError(f"an empty scene has no object to {kind}")
    if kind == "recolour":
        return replace(scene, colour=generator.choice([c for c in COLOURS if c != scene.colour]))
    if kind == "replace":
        return replace(scene, object_kind=generator.choice([o for o in OBJECTS if o != scene.object_kind]))
    return replace(scene, object_kind="nothing")


def true_mask(before: Scene, after: Scene, seed: int) -> NDArray[np.bool_]:
    """The pixels in which two scenes' pictures of one seed differ, ``bool`` of shape ``[128, 128]``."""
    difference = np.abs(render(before, seed).astype(np.int16) - render(after, seed).astype(np.int16))
    mask: NDArray[np.bool_] = difference.max(axis=2) > MASK_THRESHOLD
    return mask


def edit_pairs(count: int, seed: int) -> Iterator[EditPair]:
    """Yield edits of scenes, the four kinds in turn.

    Args:
        count: how many pairs.
        seed: chooses them; the same seed gives the same pairs.

    Raises:
        ValueError: ``count`` is negative.
    """
    if count < 0:
        raise ValueError(f"count is {count}, and has to be 0 or more")
    generator = random.Random(seed)
    scenes = [scene for scene in all_scenes() if not scene.is_empty]
    for number in range(count):
        scene = generator.choice(scenes)
        after = edited(scene, EDIT_KINDS[number % len(EDIT_KINDS)], generator)
        mask = true_mask(scene, after, generator.randrange(2**31))
        yield EditPair(caption(scene), caption(after), mask)
