"""Photos and painted pictures: read from files, Pillow, numpy and torch; upright, in colours, opaque, or refused."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from fisedit_compile.errors import PipelineError
from fisedit_compile.runtime.mask_pictures import COMPOSITES, KEYED, WITH_ALPHA

PhotoLike = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor

LEAST_SIDE = 16
"""Fewest pixels of a side."""

MOST_PIXELS = 64 * 2**20
"""Most pixels of a photo: one of 64 mebipixels takes 768 MiB in single precision."""

MOST_ELONGATED = 8.0
"""Greatest ratio of the longer side to the shorter one."""

_EXPECTED = (
    "a photo is a picture (PIL, or the path of a file), an array [height, width, 3] or a tensor [3, height, width], of "
    "bytes, or of floats from 0 to 1"
)
_CHANNELS = (1, 3, 4)
"""Grey, colours, colours and opacity."""

_DEEP = ("I", "F")
"""Modes of Pillow, and beginnings of their names, with more than 8 bits."""


@dataclass(frozen=True)
class Photo:
    """A picture as it was given.

    Attributes:
        pixels: float32 ``[1, 3, height, width]``, values from 0 to 1. Bytes are 255ths, which come back as they were.
        opaque: float32 ``[1, 1, height, width]``: how opaque it was; None: it was not transparent.
        notes: sentences on what was done to it.
    """

    pixels: Tensor
    opaque: Tensor | None = None
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return int(self.pixels.shape[-2]), int(self.pixels.shape[-1])

    def over(self, ground: Tensor) -> Tensor:
        """The picture over another one ``[1, 3, height, width]``, which shows where this one is transparent."""
        if self.opaque is None:
            return self.pixels
        mixed = ground + self.opaque * (self.pixels - ground)
        return torch.where(self.opaque == 0, ground, torch.where(self.opaque == 1, self.pixels, mixed))

    def over_white(self) -> Photo:
        """The picture over white, and a note that says so."""
        if self.opaque is None:
            return self
        note = "the photo was partly transparent, and was laid over white"
        return Photo(self.over(torch.ones_like(self.pixels)), None, (*self.notes, note))


def read_photo(given: PhotoLike, what: str = "the photo") -> Photo:
    """Read a photo, upright and in colours.

    Args:
        given: a picture of Pillow with 8 bits a channel or the path of one; an array ``[height, width]`` or
            ``[height, width, channels]``, or a tensor ``[channels, height, width]``, also with a batch of one and with
            the channels at the other end, of bytes or of floats from 0 to 1; one channel is grey, a fourth is opacity.
        what: it is called in messages.

    Raises:
        PipelineError: it is something else, cannot be decoded, is one of several, has more than 8 bits a channel, or a
            size that is none of a photo.
    """
    if isinstance(given, (str, os.PathLike)):
        return _from_path(os.fsdecode(given), what)
    if isinstance(given, Image.Image):
        return _from_picture(given, what)
    if isinstance(given, (np.ndarray, Tensor)):
        return _from_numbers(given, what)
    raise PipelineError(f"{_EXPECTED}; got {type(given).__name__} for {what}. Convert it to one of these")


def check_photo_size(photo: Photo) -> None:
    """Refuse a photo of which a model can draw nothing sensible.

    Raises:
        PipelineError: it is too small, or too long for its width.
    """
    height, width = photo.size
    came = f"the photo has {height}x{width} pixels (height x width)"
    if min(height, width) < LEAST_SIDE:
        raise PipelineError(f"{came}, and at least {LEAST_SIDE} a side are needed; enlarge it")
    if max(height, width) > MOST_ELONGATED * min(height, width):
        raise PipelineError(
            f"{came}: one side may be at most {MOST_ELONGATED:g} times the other, or models draw nothing sensible; "
            "open a part of it, such as photo.crop(...)"
        )


def _check_pixels(height: int, width: int, what: str) -> None:
    """Refuse a picture without pixels, and one that is too large to be kept."""
    came = f"{what} has {height}x{width} pixels (height x width)"
    if min(height, width) < 1:
        raise PipelineError(f"{came}, which is none; give a picture with pixels")
    if height * width > MOST_PIXELS:
        raise PipelineError(f"{came}, and at most {MOST_PIXELS / 1e6:.0f} million can be opened; make it smaller")


def _from_path(name: str, what: str) -> Photo:
    with _readable(f"the file {name!r}"):
        try:
            opened = Image.open(name)
        except FileNotFoundError as error:
            raise PipelineError(f"there is no file {name!r} in {os.getcwd()!r} for {what}; check the path") from error
        except IsADirectoryError as error:
            raise PipelineError(f"{name!r} is a folder; name the file of {what}") from error
        except PermissionError as error:
            raise PipelineError(f"{name!r} may not be read; check who may read {what}") from error
        with opened:
            return _from_picture(opened, what)


def _from_picture(picture: Image.Image, what: str) -> Photo:
    # Everything that can be told without decoding comes first: a file of a few bytes may become a picture of gigabytes.
    _check_pixels(picture.height, picture.width, what)
    frames = getattr(picture, "n_frames", 1)
    if frames > 1 and picture.tell() == 0 and picture.format not in COMPOSITES:
        raise PipelineError(
            f"{what} holds {frames} pictures (an animation or pages), and a single one can be opened; choose it: "
            "photo.seek(number), then open photo.copy()"
        )
    # Pillow reads colours of 16 bits as 8 without a word; how they are stored tells.
    stored = [str(tile[3]) for tile in getattr(picture, "tile", ())]
    if picture.mode.split(";")[0] in _DEEP or any(";16" in one for one in stored):
        raise PipelineError(
            f"{what} has more than 8 bits a channel (mode {picture.mode}), which would be lost in the picture that "
            "comes back; bring it to 8 bits first, with the program that made it"
        )
    notes = []
    with _readable(what):
        upright = ImageOps.exif_transpose(picture)
        mode, key = upright.mode, upright.info.get("transparency")
        if upright.info.get("icc_profile"):
            notes.append("the photo's colour profile is not used; give it to save() with the edited picture")
        opaque = None
        if mode in WITH_ALPHA or (key is not None and mode in KEYED):
            layer = np.asarray(upright.convert("RGBA"))
            colours, alpha = layer[..., :3], layer[..., 3]
            opaque = None if bool((alpha == 255).all()) else _planes(alpha[..., None])
        else:
            colours = np.asarray(upright.convert("RGB"))
            if mode not in ("RGB", "L", "1", "P"):
                notes.append(f"the photo's colours ({mode}) were converted to RGB")
    return Photo(_planes(colours), opaque, tuple(notes))


def _planes(pixels: NDArray[np.uint8]) -> Tensor:
    """Bytes ``[height, width, channels]`` as float32 ``[1, channels, height, width]``."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float()[None] / 255


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn what Pillow raises for pictures that it cannot decode into one error."""
    try:
        yield
    except PipelineError:
        raise
    except Image.DecompressionBombError as error:
        raise PipelineError(f"{name} has too many pixels: {error}. Make it smaller, or raise PIL's limit") from error
    except (OSError, EOFError, SyntaxError, ValueError, struct.error) as error:
        raise PipelineError(f"{name} cannot be decoded: {error}. Open it elsewhere and save it as PNG") from error


def _channels_last(shape: tuple[int, ...], array: bool) -> bool:
    """Whether three dimensions end in the channels. Where both ends may be, arrays have them last, tensors first."""
    first, last = shape[0] in _CHANNELS, shape[-1] in _CHANNELS
    return last and (array or not first)


def _from_numbers(given: NDArray[np.generic] | Tensor, what: str) -> Photo:
    kind = given.dtype
    shape = tuple(given.shape)
    came = f"got {kind} of shape {shape} for {what}"
    if isinstance(given, np.ndarray) and given.dtype.kind not in "uif":
        raise PipelineError(f"{_EXPECTED}; {came}. Convert it to one of these")
    name = kind.name if isinstance(kind, np.dtype) else str(kind).rpartition(".")[2]
    if isinstance(given, Tensor) and (given.layout is not torch.strided or given.is_meta):
        raise PipelineError(f"{what} is a tensor that is sparse or has no values; give a dense one")
    if isinstance(given, Tensor) and given.is_complex():
        raise PipelineError(f"{_EXPECTED}; {came}. Give its real part")
    if name not in ("uint8", "float16", "bfloat16", "float32", "float64"):
        raise PipelineError(f"{_EXPECTED}; {came}. Divide it by what is white, so that it has floats from 0 to 1")
    if isinstance(given, np.ndarray):
        values = torch.from_numpy(np.array(given, dtype=given.dtype.newbyteorder("=")))
    else:
        values = given.detach().cpu()
    if values.dim() == 4 and len(values) == 1:
        values = values[0]
    if values.dim() == 2:
        values = values[None]
    elif values.dim() == 3 and _channels_last(tuple(values.shape), isinstance(given, np.ndarray)):
        values = values.permute(2, 0, 1)
    if values.dim() != 3 or values.shape[0] not in _CHANNELS:
        raise PipelineError(f"{_EXPECTED}; {came}. Give one picture of one, three or four channels")
    _check_pixels(int(values.shape[1]), int(values.shape[2]), what)
    pixels = values.float() / 255 if values.dtype == torch.uint8 else values.float()
    if not bool(torch.isfinite(pixels).all()) or float(pixels.min()) < 0 or float(pixels.max()) > 1:
        raise PipelineError(
            f"{_EXPECTED}; {came} with values from {float(pixels.min()):g} to {float(pixels.max()):g}. Bring it to "
            "that scale, or give bytes"
        )
    opaque = None
    if len(pixels) == 4:
        opaque = None if bool((pixels[3:] == 1).all()) else pixels[None, 3:].contiguous()
        pixels = pixels[:3]
    return Photo(pixels.expand(3, -1, -1)[None].contiguous(), opaque)
