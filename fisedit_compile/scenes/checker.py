"""The checker: it reads from a picture alone which scene the picture shows.

It knows the renderer's colours and silhouettes and nothing of the model.  Sky and ground are compared with
what the renderer paints for each time of day and each ground; the object is found by its colour and told
apart by laying the renderer's own silhouettes over it.  It takes square pictures of 128 pixels a side and more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .edits import EditKind
from .render import FIREWORKS_VALUES, LIGHT_VALUES, PLACE_COLUMNS, SIZE, ground_value, sky_column
from .silhouettes import area_of, as_pixels, centre_of, find_object, nearest, rows_of
from .world import GROUNDS, PLACES, TIMES, Colour, Ground, ObjectKind, Place, Scene, TimeOfDay, parse_caption

Attribute = Literal["object", "colour", "place", "ground", "time", "fireworks"]
ATTRIBUTES: tuple[Attribute, ...] = ("object", "colour", "place", "ground", "time", "fireworks")

ASKED: Mapping[EditKind, tuple[Attribute, ...]] = {
    "add": ("object", "colour", "place"),
    "remove": ("object", "colour", "place"),
    "recolour": ("colour",),
    "replace": ("object",),
    "move": ("place",),
    "ground": ("ground",),
    "time": ("time",),
    "fireworks": ("fireworks",),
    "unchanged": (),
}
"""The attributes that an edit of each kind asks for; it keeps all others."""

_SKY_ROWS = 4, 58
_GROUND_ROWS = 115, 128
_FIREWORKS_ROWS = 4, 48
_SMALLEST_FIREWORKS = 220
"""Pixels of the fireworks' colours from which on there are fireworks; the renderer paints about 700."""
WORST_FIT = 0.6
"""Overlap with the silhouette (intersection over union) below which a shape is no object of the world."""


@dataclass(frozen=True)
class Reading:
    """What the checker sees in a picture.

    ``object_kind`` is ``None`` if something stands there that is none of the world's objects; ``colour`` and
    ``place`` are ``None`` if nothing stands there.  ``fit`` is the overlap of the object with its silhouette,
    from 0 to 1, and 1 if there is no object.
    """

    object_kind: ObjectKind | None
    colour: Colour | None
    place: Place | None
    ground: Ground
    time: TimeOfDay
    fireworks: bool
    fit: float

    def attributes(self) -> dict[Attribute, object]:
        """What each of :data:`ATTRIBUTES` is."""
        values = (self.object_kind, self.colour, self.place, self.ground, self.time, self.fireworks)
        return dict(zip(ATTRIBUTES, values, strict=True))


def read_time(pixels: NDArray[np.float32]) -> TimeOfDay:
    """The time of day whose sky is nearest; the median over a row ignores sun, cloud, stars and fireworks."""
    rows = rows_of(*_SKY_ROWS, len(pixels))
    medians = np.median(pixels[rows], axis=1)
    return min(TIMES, key=lambda time: float(np.abs(medians - sky_column(time, len(pixels))[rows]).mean()))


def read_ground(pixels: NDArray[np.float32], time: TimeOfDay) -> Ground:
    """The ground whose colour, at this time of day, is nearest to the bottom of the picture."""
    colour = np.median(pixels[rows_of(*_GROUND_ROWS, len(pixels))].reshape(-1, 3), axis=0)
    return min(GROUNDS, key=lambda ground: float(np.abs(colour - np.array(ground_value(ground, time))).mean()))


def fireworks_mask(pixels: NDArray[np.float32], time: TimeOfDay) -> NDArray[np.bool_]:
    """The pixels of fireworks, ``bool`` of shape ``[side, side]``; none where there are too few to be fireworks."""
    rows = rows_of(*_FIREWORKS_ROWS, len(pixels))
    palette = [*FIREWORKS_VALUES, *LIGHT_VALUES[time]]
    found = np.zeros(pixels.shape[:2], dtype=bool)
    found[rows] = nearest(pixels[rows], palette, sky_column(time, len(pixels))[rows]) < len(FIREWORKS_VALUES)
    return found if np.count_nonzero(found) >= area_of(_SMALLEST_FIREWORKS, len(pixels)) else np.zeros_like(found)


def _nearest_place(column: float) -> Place:
    """The place whose centre is nearest to a column of a picture of 128 by 128 pixels."""
    distances = {place: abs(PLACE_COLUMNS[place] - column) for place in PLACES}
    return min(PLACES, key=distances.__getitem__)


def read_scene(picture: Image.Image | NDArray[np.uint8]) -> Reading:
    """Read the scene off a picture.

    Args:
        picture: a square picture, as an image or as ``uint8`` of shape ``[side, side, 3]``.

    Returns:
        What the picture shows.

    Raises:
        ValueError: the picture is not square, smaller than 128 by 128 pixels, or of another type.
    """
    pixels = as_pixels(picture)
    time = read_time(pixels)
    ground = read_ground(pixels, time)
    fireworks = bool(fireworks_mask(pixels, time).any())
    found = find_object(pixels, ground, time)
    if found is None:
        return Reading("nothing", None, None, ground, time, fireworks, 1.0)
    return Reading(
        object_kind=found.kind if found.overlap >= WORST_FIT else None,
        colour=found.colour,
        place=_nearest_place(centre_of(found.coloured)[1] * SIZE / len(pixels)),
        ground=ground,
        time=time,
        fireworks=fireworks,
        fit=found.overlap,
    )


def _wanted(scene: Scene) -> dict[Attribute, object]:
    """What a reading of a scene's picture should be."""
    standing = (scene.object_kind, None, None) if scene.is_empty else (scene.object_kind, scene.colour, scene.place)
    return dict(zip(ATTRIBUTES, (*standing, scene.ground, scene.time, scene.fireworks), strict=True))


def check(picture: Image.Image | NDArray[np.uint8], wanted: Scene | str) -> dict[Attribute, bool]:
    """Compare a picture with what it should show, attribute by attribute.

    Args:
        picture: a square picture, as an image or as ``uint8`` of shape ``[side, side, 3]``.
        wanted: the scene the picture should show, or its caption.

    Returns:
        For each of :data:`ATTRIBUTES` whether the picture shows it.  An empty scene has no colour and no
        place, so those two are right as soon as the picture is empty.

    Raises:
        ValueError: the picture has another size or type, or the caption is not one of the world's.
    """
    scene = parse_caption(wanted) if isinstance(wanted, str) else wanted
    seen, expected = read_scene(picture).attributes(), _wanted(scene)
    return {name: seen[name] == expected[name] for name in ATTRIBUTES}


def check_edit(
    base: Image.Image | NDArray[np.uint8],
    edited: Image.Image | NDArray[np.uint8],
    wanted: Scene | str,
    kind: EditKind,
) -> dict[Attribute, bool]:
    """Judge an edit attribute by attribute: what was asked for is new, and all else is kept.

    Args:
        base: the picture that was edited.
        edited: the picture after the edit.
        wanted: the scene after the edit, or its caption.
        kind: of the edit; :data:`ASKED` says which attributes it asks for.

    Returns:
        For each of :data:`ATTRIBUTES` whether the edited picture is right: those asked for are those of ``wanted``, the
        others what the base shows.  The edit has succeeded where all are.

    Raises:
        ValueError: a picture has another size or type, or the caption is not one of the world's.
    """
    scene = parse_caption(wanted) if isinstance(wanted, str) else wanted
    seen, expected = read_scene(edited).attributes(), read_scene(base).attributes()
    new = _wanted(scene)
    expected |= {name: new[name] for name in ASKED[kind]}
    return {name: seen[name] == expected[name] for name in ATTRIBUTES}
