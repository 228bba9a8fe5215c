"""The checker: it reads from a picture alone which scene the picture shows.

It knows the renderer's colours and silhouettes and nothing of the model.  Sky and ground are compared with
what the renderer paints for each time of day and each ground; the object is found by its colour and told
apart by laying the renderer's own silhouettes over it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .render import (
    COLOUR_VALUES,
    DARK_VALUE,
    FIREWORKS_VALUES,
    LIGHT_VALUES,
    PLACE_COLUMNS,
    ROOF_SHADE,
    SIZE,
    darker,
    ground_value,
    render,
    sky_column,
)
from .world import (
    COLOURS,
    GROUNDS,
    OBJECTS,
    PLACES,
    TIMES,
    Colour,
    Ground,
    ObjectKind,
    Place,
    Scene,
    TimeOfDay,
    parse_caption,
)

Attribute = Literal["object", "colour", "place", "ground", "time", "fireworks"]
ATTRIBUTES: tuple[Attribute, ...] = ("object", "colour", "place", "ground", "time", "fireworks")

_SKY_ROWS = slice(4, 58)
_OBJECT_ROWS = slice(56, 116)
_GROUND_ROWS = slice(115, 128)
_FIREWORKS_ROWS = slice(4, 48)
_SMALLEST_OBJECT = 220
"""Pixels of one object colour from which on there is an object; the renderer's smallest has about 750."""
_SMALLEST_FIREWORKS = 220
"""Pixels of the fireworks' colours from which on there are fireworks; the renderer paints about 700."""
_WORST_FIT = 0.6
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


def _as_pixels(picture: Image.Image | NDArray[np.uint8]) -> NDArray[np.float32]:
    """The picture as ``float32`` of shape ``[128, 128, 3]`` with values from 0 to 255."""
    pixels = np.asarray(picture.convert("RGB") if isinstance(picture, Image.Image) else picture)
    if pixels.shape != (SIZE, SIZE, 3) or pixels.dtype != np.uint8:
        raise ValueError(f"the picture is {pixels.dtype} {list(pixels.shape)}, and has to be uint8 [{SIZE}, {SIZE}, 3]")
    return pixels.astype(np.float32)


def _read_time(pixels: NDArray[np.float32]) -> TimeOfDay:
    """The time of day whose sky is nearest; the median over a row ignores sun, cloud, stars and fireworks."""
    rows = np.median(pixels[_SKY_ROWS], axis=1)
    return min(TIMES, key=lambda time: float(np.abs(rows - sky_column(time)[_SKY_ROWS]).mean()))


def _read_ground(pixels: NDArray[np.float32], time: TimeOfDay) -> Ground:
    """The ground whose colour, at this time of day, is nearest to the bottom of the picture."""
    colour = np.median(pixels[_GROUND_ROWS].reshape(-1, 3), axis=0)
    return min(GROUNDS, key=lambda ground: float(np.abs(colour - np.array(ground_value(ground, time))).mean()))


def _nearest(
    pixels: NDArray[np.float32], colours: list[tuple[int, int, int]], sky: NDArray[np.float32]
) -> NDArray[np.intp]:
    """For each pixel the number of the nearest colour; the sky, different in each row, is the last one."""
    palette = np.array(colours, dtype=np.float32)
    distances = np.square(pixels[:, :, None, :] - palette).sum(axis=3)
    to_sky = np.square(pixels - sky[:, None, :]).sum(axis=2)
    return np.concatenate([distances, to_sky[:, :, None]], axis=2).argmin(axis=2)


def _object_masks(pixels: NDArray[np.float32], ground: Ground, time: TimeOfDay) -> NDArray[np.bool_]:
    """Which pixels have each colour (its body or its darker roof), ``bool`` of shape ``[4, 128, 128]``."""
    palette = [COLOUR_VALUES[colour] for colour in COLOURS]
    palette += [darker(COLOUR_VALUES[colour], ROOF_SHADE) for colour in COLOURS]
    palette += [DARK_VALUE, ground_value(ground, time), *LIGHT_VALUES[time]]
    numbers = np.full((SIZE, SIZE), len(palette), dtype=np.intp)
    numbers[_OBJECT_ROWS] = _nearest(pixels[_OBJECT_ROWS], palette, sky_column(time)[_OBJECT_ROWS])
    return np.stack([(numbers == index) | (numbers == index + len(COLOURS)) for index in range(len(COLOURS))])


@lru_cache(maxsize=1)
def _silhouettes() -> dict[ObjectKind, NDArray[np.bool_]]:
    """The coloured pixels of each object in the middle of the renderer's picture, centred."""
    silhouettes: dict[ObjectKind, NDArray[np.bool_]] = {}
    for kind in OBJECTS:
        scene = Scene(kind, "blue", "middle", "snow", "day")
        mask = _object_masks(_as_pixels(render(scene, 0)), "snow", "day")[COLOURS.index("blue")]
        silhouettes[kind] = _shifted(mask, *(SIZE // 2 - centre for centre in _centre(mask)))
    return silhouettes


def _centre(mask: NDArray[np.bool_]) -> tuple[int, int]:
    """The mean row and column of a mask, rounded."""
    rows, columns = np.nonzero(mask)
    return round(float(rows.mean())), round(float(columns.mean()))


def _shifted(mask: NDArray[np.bool_], down: int, right: int) -> NDArray[np.bool_]:
    """The mask moved by whole pixels; what leaves the picture is lost."""
    moved = np.zeros_like(mask)
    rows, columns = np.nonzero(mask)
    rows, columns = rows + down, columns + right
    inside = (rows >= 0) & (rows < SIZE) & (columns >= 0) & (columns < SIZE)
    moved[rows[inside], columns[inside]] = True
    return moved


def _fit(mask: NDArray[np.bool_], kind: ObjectKind) -> float:
    """The best overlap (intersection over union) of a mask with an object's silhouette laid over it."""
    row, column = _centre(mask)
    best = 0.0
    for down in range(-3, 4):
        for right in range(-3, 4):
            silhouette = _shifted(_silhouettes()[kind], row + down - SIZE // 2, column + right - SIZE // 2)
            overlap = np.count_nonzero(mask & silhouette) / np.count_nonzero(mask | silhouette)
            best = max(best, overlap)
    return best


def _nearest_place(column: int) -> Place:
    """The place whose centre is nearest to a column."""
    distances = {place: abs(PLACE_COLUMNS[place] - column) for place in PLACES}
    return min(PLACES, key=distances.__getitem__)


def read_scene(picture: Image.Image | NDArray[np.uint8]) -> Reading:
    """Read the scene off a picture.

    Args:
        picture: a picture of 128 by 128 pixels, as an image or as ``uint8`` of shape ``[128, 128, 3]``.

    Returns:
        What the picture shows.

    Raises:
        ValueError: the picture has another size or another type.
    """
    pixels = _as_pixels(picture)
    time = _read_time(pixels)
    ground = _read_ground(pixels, time)
    palette = [*FIREWORKS_VALUES, *LIGHT_VALUES[time]]
    numbers = _nearest(pixels[_FIREWORKS_ROWS], palette, sky_column(time)[_FIREWORKS_ROWS])
    fireworks = np.count_nonzero(numbers < len(FIREWORKS_VALUES)) >= _SMALLEST_FIREWORKS
    masks = _object_masks(pixels, ground, time)
    counts = masks.sum(axis=(1, 2))
    number = int(counts.argmax())
    if counts[number] < _SMALLEST_OBJECT:
        return Reading("nothing", None, None, ground, time, bool(fireworks), 1.0)
    mask = masks[number]
    fits = {kind: _fit(mask, kind) for kind in OBJECTS}
    kind = max(OBJECTS, key=fits.__getitem__)
    column = _centre(mask)[1]
    return Reading(
        object_kind=kind if fits[kind] >= _WORST_FIT else None,
        colour=COLOURS[number],
        place=_nearest_place(column),
        ground=ground,
        time=time,
        fireworks=bool(fireworks),
        fit=fits[kind],
    )


def check(picture: Image.Image | NDArray[np.uint8], wanted: Scene | str) -> dict[Attribute, bool]:
    """Compare a picture with what it should show, attribute by attribute.

    Args:
        picture: a picture of 128 by 128 pixels, as an image or as ``uint8`` of shape ``[128, 128, 3]``.
        wanted: the scene the picture should show, or its caption.

    Returns:
        For each of :data:`ATTRIBUTES` whether the picture shows it.  An empty scene has no colour and no
        place, so those two are right as soon as the picture is empty.

    Raises:
        ValueError: the picture has another size or type, or the caption is not one of the world's.
    """
    scene = parse_caption(wanted) if isinstance(wanted, str) else wanted
    reading = read_scene(picture)
    return {
        "object": reading.object_kind == scene.object_kind,
        "colour": reading.colour == (None if scene.is_empty else scene.colour),
        "place": reading.place == (None if scene.is_empty else scene.place),
        "ground": reading.ground == scene.ground,
        "time": reading.time == scene.time,
        "fireworks": reading.fireworks == scene.fireworks,
    }
