"""Partly transparent masks: a photo with a hole (transparent = edit), or paint on a layer (painted = edit).

Programs save both in one form. They are told apart by what is opaque: paint has one colour or a few, a photo has many;
a photo reaches the border of the picture and fills most of it. What is neither clearly the one nor the other is
refused: taken for the wrong one, a mask becomes its opposite.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fisedit_compile.errors import MaskError

Levels = NDArray[np.floating]

CLEAR, SOLID = 0.02, 0.98
"""Opacity up to which, and from which, a pixel is taken for wholly transparent or opaque."""

CORE = 0.9
"""Colours are looked at where opacity is at least this share of the greatest: at soft edges they may be mixed."""

SAME_COLOUR = 1 / 8
"""How far the channels of one colour may lie apart, of 1."""

NEARLY_ALL = 0.95
"""The share of pixels that decides; the others are soft edges and noise."""

BRUSHES = 4
"""A painted layer has at most so many colours."""

_BY_HAND = (
    "Save it in black and white without transparency (white = edit), or say what is meant: with alpha = "
    "numpy.asarray(picture.convert('RGBA'))[..., 3], give mask=alpha to edit what is opaque, or mask=255 - alpha to "
    "edit what is transparent"
)


def levels_of_layer(colours: Levels, alpha: Levels, white_threshold: float) -> Levels:
    """How much each pixel of a picture with transparency is to be edited.

    Args:
        colours: ``[height, width, 1 or 3]``, from 0 to 1, not multiplied by ``alpha``.
        alpha: opacity ``[height, width]``, from 0 to 1.
        white_threshold: from which level on a pixel is edited.

    Returns:
        ``[height, width]``, from 0 to 1: of an opaque picture its brightness; of a photo with a hole how transparent a
        pixel is; of a painted layer how opaque; of a layer without paint zero.

    Raises:
        MaskError: it cannot be told which of them it is, or nothing of it reaches the threshold.
    """
    if alpha.min() >= SOLID:
        brightness: Levels = colours.max(axis=2)
        return brightness
    if alpha.max() <= CLEAR:
        return np.zeros_like(alpha)
    reason, hole = _kind(colours, alpha)
    if reason is not None:
        raise MaskError(
            "a mask with transparency is a photo with a hole (transparent = edit) or paint on a transparent layer "
            f"(painted = edit); got {reason}, which may be either. {_BY_HAND}"
        )
    levels = 1 - alpha if hole else alpha
    greatest = float(levels.max())
    if greatest < white_threshold:
        what = (
            "the hole of the mask is at most {} transparent" if hole else "the paint of the mask is at most {} opaque"
        )
        raise MaskError(
            f"expected a mask that reaches white_threshold={white_threshold:g} somewhere; got none: "
            f"{what.format(f'{greatest:.0%}')}. Pass white_threshold={greatest / 2:.2g}, or "
            f"{'erase' if hole else 'paint'} with full strength"
        )
    return levels


def _kind(colours: Levels, alpha: Levels) -> tuple[str | None, bool]:
    """Why it cannot be told, or None, and whether it is a photo with a hole."""
    core = alpha >= CORE * alpha.max()
    border = np.concatenate([core[0], core[-1], core[:, 0], core[:, -1]])
    fills = core.mean() > 0.5 and border.mean() > 0.5
    found = _main_colours(colours[core])
    if found is None:
        return (None, True) if fills else ("a photo of which most is cut away", False)
    black = any(colour.max() <= SAME_COLOUR for colour in found)
    white = any(colour.min() >= 1 - SAME_COLOUR for colour in found)
    if len(found) == 1 and black:
        return (None, True) if fills else ("black on a transparent ground", False)
    if black and white:
        return "black and white beside transparency", False
    if fills:
        return "one colour or a few that fill most of the picture", False
    return ("several colours with black among them", False) if black else (None, False)


def _main_colours(colours: Levels) -> list[Levels] | None:
    """The few colours ``[1 or 3]`` that nearly all pixels ``[count, 1 or 3]`` have; None: they have many."""
    found: list[Levels] = []
    left = colours
    while len(left) > (1 - NEARLY_ALL) * len(colours):
        if len(found) == BRUSHES:
            return None
        # The most frequent one, not the mean: that may be a colour which no pixel has.
        bins = (left / SAME_COLOUR).astype(np.int64) @ (9 ** np.arange(left.shape[1]))
        values, counts = np.unique(bins, return_counts=True)
        colour = np.median(left[bins == values[counts.argmax()]], axis=0)
        found.append(colour)
        left = left[np.abs(left - colour).max(axis=1) > SAME_COLOUR]
    return found
