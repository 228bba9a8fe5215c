"""Finding the object of a scene in a picture: its colour, and the renderer's silhouettes laid over it.

Rows and numbers of pixels are those of a picture of 128 by 128 pixels, and grow with the picture.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .render import COLOUR_VALUES, DARK_VALUE, LIGHT_VALUES, ROOF_SHADE, SIZE, darker, ground_value, render, sky_column
from .world import COLOURS, OBJECTS, Colour, Ground, ObjectKind, Scene, TimeOfDay

_OBJECT_ROWS = 56, 116
_SMALLEST_OBJECT = 220
"""Pixels of one object colour from which on there is an object; the renderer's smallest has about 750."""
_RIM_DIFFERENCE = 8
"""Difference of a channel (of 255) from which on a pixel of the renderer belongs to an object, its rim included."""


class Silhouette(NamedTuple):
    """An object of the renderer, its coloured pixels centred: ``bool`` of shape ``[side, side]``.

    ``coloured`` are the pixels of its colour, ``whole`` those and its doors or wheels and its rim.
    """

    coloured: NDArray[np.bool_]
    whole: NDArray[np.bool_]


class Found(NamedTuple):
    """An object that was found in a picture.

    ``coloured`` are the pixels of its colour, ``kind`` the object whose silhouette fits best, ``overlap`` how well it
    fits (0 to 1, intersection over union), and ``whole`` that silhouette where it fits best.
    """

    colour: Colour
    coloured: NDArray[np.bool_]
    kind: ObjectKind
    overlap: float
    whole: NDArray[np.bool_]


def as_pixels(picture: Image.Image | NDArray[np.uint8]) -> NDArray[np.float32]:
    """The picture as ``float32`` of shape ``[side, side, 3]`` with values from 0 to 255.

    Raises:
        ValueError: the picture is not square, is smaller than 128 by 128 pixels, or is not of 8 bits.
    """
    pixels = np.asarray(picture.convert("RGB") if isinstance(picture, Image.Image) else picture)
    side = pixels.shape[0] if pixels.ndim else 0
    if pixels.shape != (side, side, 3) or side < SIZE or pixels.dtype != np.uint8:
        raise ValueError(
            f"the picture is {pixels.dtype} {list(pixels.shape)}, and has to be uint8 [side, side, 3] with a side of "
            f"{SIZE} pixels or more"
        )
    return pixels.astype(np.float32)


def rows_of(first: float, last: float, side: int) -> slice:
    """The rows of a picture that are rows ``first`` to ``last`` (left out) in one of 128 by 128 pixels."""
    return slice(round(first * side / SIZE), round(last * side / SIZE))


def area_of(pixels: float, side: int) -> float:
    """As many pixels as ``pixels`` are in a picture of 128 by 128."""
    return pixels * (side / SIZE) ** 2


def nearest(
    pixels: NDArray[np.float32], colours: list[tuple[int, int, int]], sky: NDArray[np.float32]
) -> NDArray[np.intp]:
    """For each pixel the number of the nearest colour; the sky, different in each row, is the last one."""
    palette = np.array(colours, dtype=np.float32)
    distances = np.square(pixels[:, :, None, :] - palette).sum(axis=3)
    to_sky = np.square(pixels - sky[:, None, :]).sum(axis=2)
    return np.concatenate([distances, to_sky[:, :, None]], axis=2).argmin(axis=2)


def object_masks(pixels: NDArray[np.float32], ground: Ground, time: TimeOfDay) -> NDArray[np.bool_]:
    """Which pixels have each colour (its body or its darker roof), ``bool`` of shape ``[4, side, side]``."""
    side = len(pixels)
    rows = rows_of(*_OBJECT_ROWS, side)
    palette = [COLOUR_VALUES[colour] for colour in COLOURS]
    palette += [darker(COLOUR_VALUES[colour], ROOF_SHADE) for colour in COLOURS]
    palette += [DARK_VALUE, ground_value(ground, time), *LIGHT_VALUES[time]]
    numbers = np.full((side, side), len(palette), dtype=np.intp)
    numbers[rows] = nearest(pixels[rows], palette, sky_column(time, side)[rows])
    return np.stack([(numbers == index) | (numbers == index + len(COLOURS)) for index in range(len(COLOURS))])


def find_object(pixels: NDArray[np.float32], ground: Ground, time: TimeOfDay) -> Found | None:
    """The object in a picture with this ground and time of day; None where nothing of the objects' colours stands."""
    masks = object_masks(pixels, ground, time)
    counts = masks.sum(axis=(1, 2))
    number = int(counts.argmax())
    if counts[number] < area_of(_SMALLEST_OBJECT, len(pixels)):
        return None
    fits = [_fit(COLOURS[number], masks[number], kind) for kind in OBJECTS]
    return max(fits, key=lambda found: found.overlap)


def centre_of(mask: NDArray[np.bool_]) -> tuple[int, int]:
    """The mean row and column of a mask, rounded."""
    rows, columns = np.nonzero(mask)
    return round(float(rows.mean())), round(float(columns.mean()))


@lru_cache(maxsize=4)
def silhouettes(side: int) -> dict[ObjectKind, Silhouette]:
    """Each object as the renderer draws it in the middle of a picture of ``side`` pixels, centred."""
    found: dict[ObjectKind, Silhouette] = {}
    for kind in OBJECTS:
        drawn = as_pixels(render(Scene(kind, "blue", "middle", "snow", "day"), 0, side))
        empty = as_pixels(render(Scene("nothing", ground="snow", time="day"), 0, side))
        coloured = object_masks(drawn, "snow", "day")[COLOURS.index("blue")]
        whole = np.abs(drawn - empty).max(axis=2) > _RIM_DIFFERENCE
        down, right = (side // 2 - centre for centre in centre_of(coloured))
        found[kind] = Silhouette(_shifted(coloured, down, right), _shifted(whole, down, right))
    return found


def _shifted(mask: NDArray[np.bool_], down: int, right: int) -> NDArray[np.bool_]:
    """The mask moved by whole pixels; what leaves the picture is lost."""
    moved = np.zeros_like(mask)
    rows, columns = np.nonzero(mask)
    rows, columns = rows + down, columns + right
    inside = (rows >= 0) & (rows < len(mask)) & (columns >= 0) & (columns < len(mask))
    moved[rows[inside], columns[inside]] = True
    return moved


def _fit(colour: Colour, mask: NDArray[np.bool_], kind: ObjectKind) -> Found:
    """An object's silhouette laid over a mask where it overlaps most, near the place where both centres agree."""
    side = len(mask)
    row, column = (centre - side // 2 for centre in centre_of(mask))
    step = max(1, round(side / SIZE))
    silhouette = silhouettes(side)[kind]
    best, place = -1.0, (0, 0)
    for down in range(row - 3 * step, row + 3 * step + 1, step):
        for right in range(column - 3 * step, column + 3 * step + 1, step):
            laid = _shifted(silhouette.coloured, down, right)
            overlap = np.count_nonzero(mask & laid) / np.count_nonzero(mask | laid)
            if overlap > best:
                best, place = overlap, (down, right)
    return Found(colour, mask, kind, best, _shifted(silhouette.whole, *place))
