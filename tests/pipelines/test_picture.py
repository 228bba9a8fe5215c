"""How pictures show themselves."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image

from fisedit_compile.pipelines.picture import Picture
from fisedit_compile.pipelines.report import Report


def picture(**changes: Any) -> Picture:
    given = {
        "name": "edit-2",
        "prompt": "a ball",
        "pixels": torch.rand(1, 3, 6, 8),
        "latents": torch.zeros(1, 4, 3, 4),
        "output": None,
        "mask": None,
        "pixel_mask": None,
        "report": Report({}, 1, 1, 0, None, 0),
        "flagged": None,
        "output_type": "pt",
    }
    return Picture(**{**given, **changes})


def test_a_picture_is_one_line() -> None:
    assert repr(picture()) == "Picture('edit-2', pixels 1x3x6x8, prompt 'a ball')"
    mask = torch.zeros(1, 3, 4, dtype=torch.bool)
    mask[:, 0] = True
    assert repr(picture(mask=mask, prompt=None)) == "Picture('edit-2', pixels 1x3x6x8, mask 33.3%)"
    assert repr(picture(pixels=None, prompt=None)) == "Picture('edit-2', latents 1x4x3x4)"
    line = repr(picture(prompt=["line\nbreak " * 1000] * 9))
    assert "\n" not in line and len(line) < 200


def test_a_notebook_shows_the_picture() -> None:
    pixels = torch.rand(2, 3, 6, 8)
    shown = picture(pixels=pixels, prompt=["a", "b"])._repr_png_()
    assert shown is not None
    found = np.asarray(Image.open(io.BytesIO(shown)))
    assert found.shape == (6, 16, 3)
    expected = (pixels * 255).round().permute(0, 2, 3, 1).numpy().astype(np.uint8)
    assert (found == np.concatenate(list(expected), axis=1)).all()
    assert picture(pixels=None)._repr_png_() is None
