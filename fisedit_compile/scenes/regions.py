"""Where an edit asks for a change: silhouettes and bands of the edited attribute, found in the pictures.

Two pictures that a model makes of two captions also differ where nobody asked: a cloud, the sun, the horizon.  So their
difference does not tell which pixels an edit is for.  Here these are told by what they show: the object, the fireworks,
the ground or everything, before the edit and after it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from .checker import WORST_FIT, fireworks_mask, read_ground, read_time
from .edits import EditKind
from .render import SIZE, ground_value, sky_column
from .silhouettes import as_pixels, find_object, rows_of

_HORIZON_ROWS = 60, 100
"""Where a horizon may lie; the renderer's are from 77 to 82."""
_RIM = 1
"""Pixels by which found colours are grown: the rim of a shape is mixed with what lies behind it."""
_INNER = 2
"""Pixels by which shapes are shrunk to what an edit of the ground or the time of day leaves as it is."""


def object_region(picture: Image.Image | NDArray[np.uint8]) -> NDArray[np.bool_]:
    """The pixels of the object, doors, wheels and rim included: ``bool`` of shape ``[side, side]``, empty without one.

    Where a silhouette fits, it is the region, with pixels of the object's colour next to it; other shapes are their
    coloured pixels with the holes filled.

    Raises:
        ValueError: the picture is not square, smaller than 128 by 128 pixels, or of another type.
    """
    pixels = as_pixels(picture)
    time = read_time(pixels)
    found = find_object(pixels, read_ground(pixels, time), time)
    if found is None:
        return np.zeros(pixels.shape[:2], dtype=bool)
    coloured = _grown(found.coloured, _RIM)
    if found.overlap < WORST_FIT:
        return np.asarray(ndimage.binary_fill_holes(coloured), dtype=bool)
    return found.whole | (coloured & _grown(found.whole, 4))


def fireworks_region(picture: Image.Image | NDArray[np.uint8]) -> NDArray[np.bool_]:
    """The pixels of fireworks and their rim: ``bool`` of shape ``[side, side]``, empty without fireworks.

    Raises:
        ValueError: the picture is not square, smaller than 128 by 128 pixels, or of another type.
    """
    pixels = as_pixels(picture)
    return _grown(fireworks_mask(pixels, read_time(pixels)), _RIM)


def ground_region(picture: Image.Image | NDArray[np.uint8]) -> NDArray[np.bool_]:
    """The band of the ground, what stands on it included: ``bool`` of shape ``[side, side]``.

    The horizon parts rows that are nearer to the ground's colour from those nearer to the sky's, by their medians.

    Raises:
        ValueError: the picture is not square, smaller than 128 by 128 pixels, or of another type.
    """
    pixels = as_pixels(picture)
    time = read_time(pixels)
    rows = rows_of(*_HORIZON_ROWS, len(pixels))
    medians = np.median(pixels[rows], axis=1)
    to_ground = np.abs(medians - np.array(ground_value(read_ground(pixels, time), time))).sum(axis=1)
    is_ground = to_ground < np.abs(medians - sky_column(time, len(pixels))[rows]).sum(axis=1)
    # With the horizon at a row, wrong are rows of ground above it and rows of sky from there on.
    above = np.concatenate([[0], np.cumsum(is_ground)])
    below = np.count_nonzero(~is_ground) - np.concatenate([[0], np.cumsum(~is_ground)])
    region = np.zeros(pixels.shape[:2], dtype=bool)
    region[rows.start + int((above + below).argmin()) :] = True
    return region


def asked_region(
    kind: EditKind, base: Image.Image | NDArray[np.uint8], edited: Image.Image | NDArray[np.uint8]
) -> NDArray[np.bool_]:
    """The pixels in which an edit asks for a change: ``bool`` of shape ``[side, side]``.

    Args:
        kind: of the edit. Edits of the object ask for where it was and where it is then, ``fireworks`` for the
            fireworks, ``ground`` for the ground, ``time`` for everything; the last two without the inner part of what
            stands there before and after.  ``unchanged`` asks for nothing.
        base: the picture before the edit.
        edited: a picture after it, of the same size: the one that a dense regeneration makes, since that is where the
            model puts what is asked for.

    Raises:
        ValueError: a picture is not square, smaller than 128 by 128 pixels, or of another type, or their sizes differ.
    """
    sides = [len(as_pixels(picture)) for picture in (base, edited)]
    if sides[0] != sides[1]:
        raise ValueError(f"the pictures have {sides[0]} and {sides[1]} pixels a side, and have to be of one size")
    if kind == "unchanged":
        return np.zeros((sides[0], sides[0]), dtype=bool)
    if kind == "fireworks":
        return fireworks_region(base) | fireworks_region(edited)
    objects = object_region(base), object_region(edited)
    if kind not in ("ground", "time"):
        return objects[0] | objects[1]
    kept = _shrunk(objects[0]) & _shrunk(objects[1])
    if kind == "ground":
        return (ground_region(base) | ground_region(edited)) & ~kept
    return ~(kept | (_shrunk(fireworks_region(base)) & _shrunk(fireworks_region(edited))))


def _grown(mask: NDArray[np.bool_], pixels: int) -> NDArray[np.bool_]:
    """The mask grown in every direction by pixels of a picture of 128 by 128."""
    side = 2 * round(pixels * len(mask) / SIZE) + 1
    return np.asarray(ndimage.maximum_filter(mask, size=side, mode="constant"), dtype=bool)


def _shrunk(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The inner part of a mask."""
    return ~_grown(~mask, _INNER)
