"""Pictures as masks: opened from files, upright, a single one, and brought to levels from black to white."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fisedit_compile.errors import MaskError
from fisedit_compile.runtime.transparency import levels_of_layer

COMPOSITES = ("PSD", "MPO", "ICO", "ICNS")
"""Formats of which the first picture is the whole one; the others are its layers, views and sizes."""

WITH_ALPHA = ("LA", "La", "RGBA", "RGBa", "PA")
KEYED = ("1", "L", "P", "RGB")
"""Modes of 8 bits that may name a colour as transparent."""

_ADVICE = "Save it as PNG, in black and white without transparency, white = edit"


def open_picture(path: str | os.PathLike[str]) -> Image.Image:
    """Open the picture of a mask.

    Args:
        path: of a file in any format that Pillow reads.

    Returns:
        The picture as every viewer shows it: turned as its orientation tag says.

    Raises:
        MaskError: there is no such file, it cannot be read or decoded, or it holds several pictures.
    """
    name = os.fsdecode(path)
    with _readable(f"the file {name!r}"):
        try:
            opened = Image.open(name)
        except FileNotFoundError as error:
            raise MaskError(
                f"a mask may be the path of a picture; got {name!r}, and there is no such file in {os.getcwd()!r}. "
                "Check the path"
            ) from error
        except IsADirectoryError as error:
            raise MaskError(f"a mask may be the path of a picture; got {name!r}, a folder. Name the file") from error
        except PermissionError as error:
            raise MaskError(f"a mask may be the path of a picture; got {name!r}, which may not be read") from error
        with opened:
            return upright(opened, f"the file {name!r}")


def upright(picture: Image.Image, name: str = "the mask") -> Image.Image:
    """A copy of a picture, decoded and turned as its orientation tag says.

    Raises:
        MaskError: it cannot be decoded, or is one of several and it is not said which.
    """
    with _readable(name):
        frames = getattr(picture, "n_frames", 1)
        if frames > 1 and picture.tell() == 0 and picture.format not in COMPOSITES:
            raise MaskError(
                f"a mask is a single picture; {name} holds {frames} (an animation or pages), got all of them. Choose "
                "one: picture.seek(number), then mask=picture.copy()"
            )
        return ImageOps.exif_transpose(picture)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn what Pillow raises for pictures that it cannot decode into one error."""
    try:
        yield
    except MaskError:
        raise
    except (OSError, EOFError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise MaskError(f"a mask is a picture that can be decoded; got {name}: {error}. {_ADVICE}") from error


def levels_of_picture(picture: Image.Image, white_threshold: float) -> NDArray[np.generic]:
    """How white the pixels of a mask are.

    Args:
        picture: of any mode. Colours count by their brightest channel.
        white_threshold: what is white, see :func:`levels_of_layer`.

    Returns:
        bool, numbers from 0 to 1, or integers and floats of a scale that is not known from the mode (``I``, ``F``);
        ``[height, width]``.

    Raises:
        MaskError: it cannot be decoded, or it is partly transparent and what that means cannot be told.
    """
    picture = upright(picture)
    with _readable("the mask"):
        mode, key = picture.mode, picture.info.get("transparency")
        if mode in WITH_ALPHA or (key is not None and mode in KEYED):
            pixels = np.asarray(picture.convert("RGBA"), dtype=np.float32) / 255
            return levels_of_layer(pixels[..., :3], pixels[..., 3], white_threshold)
        if mode == "1":
            return np.asarray(picture)
        if mode == "I" or mode.startswith("I;16"):
            values = np.asarray(picture)
            scale = 1 if mode == "I" else 65535
            if isinstance(key, int):
                alpha = (values != key).astype(np.float32)
                grey = values.astype(np.float32) / (scale if scale > 1 else max(1, int(values.max())))
                return levels_of_layer(grey[..., None], alpha, white_threshold)
            return values if scale == 1 else values.astype(np.float32) / scale
        if mode in ("L", "LAB"):
            # A picture of 8 bits is never one of booleans: 1 of 255 is black.
            return np.asarray(picture.getchannel(0), dtype=np.float32) / 255
        if mode == "F":
            return np.asarray(picture)
        return np.asarray(picture.convert("RGB"), dtype=np.float32).max(axis=2) / 255
