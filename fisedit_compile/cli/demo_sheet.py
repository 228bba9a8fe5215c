"""The demo's sheet: each edit is a row of the picture, its mask, the edit, the dense edit, and what these changed."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont
from scipy import ndimage

SIDE = 256
"""Pictures are shown at least this wide and high, in pixels."""
CHANGE_FACTOR = 5
"""What differences to the picture are multiplied by, so that small ones are seen."""

PAPER, INK, FAINT, ACCENT = (252, 252, 250), (28, 30, 34), (104, 108, 116), (214, 40, 57)

MARGIN, GAP, ROW_GAP = 32, 14, 30
HEADING_SIZE, PROMPT_SIZE, TITLE_SIZE = 24, 17, 17
OUTLINE = 2
"""Width of the line around the mask, in pixels of the sheet."""


@dataclass(frozen=True)
class SheetRow:
    """One edit on the sheet; its pictures have one size.

    Attributes:
        heading: what kind of edit it is.
        prompts: from what to what.
        base, mask, edited, dense: the picture, the mask in black and white, the edit, its dense twin.
        base_caption, mask_caption, edited_caption, dense_caption: what stands below their titles.
    """

    heading: str
    prompts: str
    base: Image.Image
    mask: Image.Image
    edited: Image.Image
    dense: Image.Image
    base_caption: str
    mask_caption: str
    edited_caption: str
    dense_caption: str


def demo_sheet(rows: Sequence[SheetRow]) -> Image.Image:
    """All edits on one sheet, small pictures enlarged."""
    width, height = _shown_size(rows[0].base)
    heading, prompts, title = (ImageFont.load_default(size) for size in (HEADING_SIZE, PROMPT_SIZE, TITLE_SIZE))
    titles_top = HEADING_SIZE + GAP
    pictures_top = titles_top + 2 * (TITLE_SIZE + 5) + 4
    row_height = pictures_top + height + ROW_GAP
    columns = len(_cells(rows[0]))
    sheet_size = 2 * MARGIN + columns * width + (columns - 1) * GAP, 2 * MARGIN + len(rows) * row_height - ROW_GAP
    sheet = Image.new("RGB", sheet_size, PAPER)
    drawing = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        top = MARGIN + number * row_height
        drawing.text((MARGIN, top + HEADING_SIZE), row.heading, fill=INK, font=heading, anchor="ls")
        behind = MARGIN + drawing.textlength(row.heading, font=heading) + 2 * GAP
        drawing.text((behind, top + HEADING_SIZE), row.prompts, fill=FAINT, font=prompts, anchor="ls")
        for column, (name, caption, picture) in enumerate(_cells(row)):
            left = MARGIN + column * (width + GAP)
            drawing.text((left, top + titles_top), name, fill=INK, font=title)
            drawing.text((left, top + titles_top + TITLE_SIZE + 5), caption, fill=FAINT, font=title)
            sheet.paste(picture, (left, top + pictures_top))
    return sheet


def _cells(row: SheetRow) -> list[tuple[str, str, Image.Image]]:
    """Titles, captions and pictures of a row, as they are shown."""
    return [
        ("before", row.base_caption, _shown(row.base)),
        ("mask", row.mask_caption, outlined(row.base, row.mask)),
        ("sparse edit", row.edited_caption, _shown(row.edited)),
        ("dense edit", row.dense_caption, _shown(row.dense)),
        (f"what sparse changed, x{CHANGE_FACTOR}", "black: not at all", change(row.base, row.edited)),
        (f"what dense changed, x{CHANGE_FACTOR}", "black: not at all", change(row.base, row.dense)),
    ]


def outlined(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture as it is shown, pale outside the white part of the mask, with a line around that."""
    pixels = np.asarray(_shown(picture), dtype=np.float32)
    shown = mask.convert("L").resize(_shown_size(picture), Image.Resampling.NEAREST)
    inside = np.asarray(shown)[..., None] > 127
    edge = inside[..., 0] & ~ndimage.binary_erosion(inside[..., 0], iterations=OUTLINE, border_value=1)
    pale = 0.35 * pixels + 0.65 * np.array(PAPER, dtype=np.float32)
    result = np.where(inside, pixels, pale)
    result[edge] = ACCENT
    return Image.fromarray(result.round().astype(np.uint8))


def change(before: Image.Image, after: Image.Image) -> Image.Image:
    """How far two pictures are apart in the colour that differs most, multiplied, as it is shown; black: not at all."""
    channels = ImageChops.difference(before.convert("RGB"), after.convert("RGB")).split()
    greatest = functools.reduce(ImageChops.lighter, channels).point(lambda level: level * CHANGE_FACTOR)
    # Enlarged without smoothing: what is black stays black up to the edge of what changed.
    return greatest.convert("RGB").resize(_shown_size(before), Image.Resampling.NEAREST)


def _shown_size(picture: Image.Image) -> tuple[int, int]:
    """Width and height of a picture on the sheet: a whole number of times its own."""
    factor = max(1, math.ceil(SIDE / min(picture.size)))
    return picture.width * factor, picture.height * factor


def _shown(picture: Image.Image) -> Image.Image:
    return picture.convert("RGB").resize(_shown_size(picture), Image.Resampling.BICUBIC)
