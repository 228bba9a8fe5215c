"""Pictures of pictures: the mask over a picture, pictures side by side; and how far two pictures are apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from fisedit_compile.errors import PipelineError

if TYPE_CHECKING:
    from fisedit_compile.pipelines import Picture

MASK_COLOUR = (255, 60, 60)
SHOWN_SIDE = 320
"""The side of a picture on a sheet is at least this many pixels."""

_MARGIN = 12
_TITLE_SIZE = 18


def mask_of(picture: Picture) -> Image.Image:
    """The mask of an edit in black and white, as large as the picture."""
    mask = picture.mask_image
    if mask is None:
        raise PipelineError("the picture was generated, not edited, so it has no mask")
    return mask


def overlay(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture with the white part of the mask tinted and the rest darkened."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    inside = np.asarray(mask.convert("L").resize(picture.size, Image.Resampling.NEAREST))[..., None] > 127
    tinted = 0.55 * pixels + 0.45 * np.array(MASK_COLOUR, dtype=np.float32)
    return Image.fromarray(np.where(inside, tinted, 0.6 * pixels).round().astype(np.uint8))


def sheet(rows: Sequence[Sequence[tuple[str, Image.Image]]], side: int = SHOWN_SIDE) -> Image.Image:
    """Titled pictures in rows; small ones are enlarged so that a person sees their pixels.

    Args:
        rows: of pairs of a title and a picture, all of one size.
        side: of a picture on the sheet, in pixels at least.
    """
    width, height = rows[0][0][1].size
    factor = max(1, math.ceil(side / min(width, height)))
    cell = width * factor + _MARGIN, height * factor + _TITLE_SIZE + 2 * _MARGIN
    columns = max(len(row) for row in rows)
    result = Image.new("RGB", (columns * cell[0] + _MARGIN, len(rows) * cell[1] + _MARGIN), (250, 250, 250))
    drawing = ImageDraw.Draw(result)
    font = ImageFont.load_default(_TITLE_SIZE)
    for row, pictures in enumerate(rows):
        for column, (title, picture) in enumerate(pictures):
            left, top = _MARGIN + column * cell[0], _MARGIN + row * cell[1]
            drawing.text((left, top), title, fill=(20, 20, 20), font=font)
            shown = picture.convert("RGB").resize((width * factor, height * factor), Image.Resampling.NEAREST)
            result.paste(shown, (left, top + _TITLE_SIZE + _MARGIN))
    return result


def peak_ratio(left: Image.Image, right: Image.Image, mask: Image.Image) -> float | None:
    """Peak signal-to-noise ratio in decibels inside the white part of a mask; None when there is nothing inside.

    It is infinite for equal pictures.
    """
    inside = _inside(mask)
    if not inside.any():
        return None
    error = (_values(left)[inside] - _values(right)[inside]) / 255.0
    squared = float(np.mean(error**2))
    return math.inf if squared == 0 else -10.0 * math.log10(squared)


def greatest_difference(left: Image.Image, right: Image.Image, mask: Image.Image) -> int:
    """The greatest difference of two pictures outside the white part of a mask, in levels from 0 to 255."""
    outside = ~_inside(mask)
    if not outside.any():
        return 0
    return int(np.abs(_values(left)[outside] - _values(right)[outside]).max())


def _inside(mask: Image.Image) -> NDArray[np.bool_]:
    return np.asarray(mask.convert("L")) > 127


def _values(picture: Image.Image) -> NDArray[np.float64]:
    return np.asarray(picture.convert("RGB"), dtype=np.float64)
