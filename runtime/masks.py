"""Masks of a picture: what may change. Preparing any input, reducing to a resolution, tiling over a batch.

``plans.py`` makes the indices of active positions from them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from fisedit_compile.errors import MaskError, OptionError
from fisedit_compile.runtime.mask_forms import one_for_each_sample
from fisedit_compile.runtime.mask_pictures import levels_of_picture, open_picture
from fisedit_compile.runtime.spec import Domain

MaskLike = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor | Sequence

WHITE_THRESHOLD = 0.5
"""White is what reaches half of the scale, as in diffusers."""

_EXPECTED = (
    "a mask is a picture (PIL, or the path of a file), a numpy array or a torch tensor [height, width] or "
    "[batch, height, width], white = edit"
)
_SCALES = (1, 255, 65535)
"""What white is in integers: of booleans, of 8 bits, of 16 bits."""

_ROUNDING = 1e-3
"""By how much floats may exceed 1: resizing rounds."""


def prepare_mask(mask: MaskLike, white_threshold: float = WHITE_THRESHOLD, samples: int | None = None) -> Tensor:
    """Turn any mask into a boolean tensor on the device it came from.

    White, which may change, is what reaches ``white_threshold`` of the scale. The scale is 1 for floats (or 255, if
    they are whole numbers of which one exceeds 1), 255 for integers of 8 bits and 65535 for those of 16; for wider
    ones, and for signed ones that cannot hold it, the least of 1, 255 and 65535 that no value exceeds. Integers that
    are all 0 or 1 are booleans, but never in a picture of 8 bits.

    Args:
        mask: picture of any mode or the path of one, numpy array or torch tensor of any real dtype: ``[H, W]`` or
            ``[batch, H, W]``; with one channel (``[H, W, 1]``, ``[B, 1, H, W]``, ``[B, H, W, 1]``), three
            (``[H, W, 3]``, ``[B, H, W, 3]``: the brightest counts; ``[3, H, W]``, ``[B, 3, H, W]`` where they are
            equal) or four (``[H, W, 4]``, with opacity); or a sequence of equally large masks, one for each sample.
            What transparency means is told by :func:`~fisedit_compile.runtime.transparency.levels_of_layer`. Pictures
            are turned as their orientation tag says.
        white_threshold: above 0, up to 1.
        samples: for how many pictures it is, where that is known: ``[3, H, W]`` may be masks of three.

    Returns:
        bool ``[1, height, width]`` or ``[batch, height, width]``, contiguous, sharing no memory with ``mask``.

    Raises:
        MaskError: another type, rank or dtype, a size of zero, NaN, values of no known scale, a file that cannot be
            read, or a meaning that cannot be told.
        OptionError: ``white_threshold`` is out of its range.
    """
    check_white_threshold(white_threshold)
    if isinstance(mask, (list, tuple)) and mask and all(isinstance(one, _SINGLE) for one in mask):
        return _from_sequence(mask, white_threshold)
    if isinstance(mask, (str, os.PathLike)):
        mask = open_picture(mask)
    if isinstance(mask, Image.Image):
        # Its levels are of a channel already; those of modes without a scale are told like numbers.
        levels = _levels(_from_array(levels_of_picture(mask, white_threshold)))[None]
    else:
        values = _numbers(mask)
        levels = one_for_each_sample(_levels(values), samples, white_threshold, values.dtype == torch.bool)
    if levels.dtype == torch.bool:
        return levels.clone(memory_format=torch.contiguous_format)
    # In their own type: a threshold of 0.7 is reached by 0.7, however narrow the type.
    return (levels >= torch.tensor(white_threshold, dtype=levels.dtype, device=levels.device)).contiguous()


def check_white_threshold(white_threshold: float) -> None:
    """Refuse what is no share of the scale.

    Raises:
        OptionError: it is no number above 0 and up to 1.
    """
    number = isinstance(white_threshold, (int, float, np.floating)) and not isinstance(white_threshold, bool)
    if not number or not 0 < white_threshold <= 1:
        raise OptionError(f"white_threshold must be a number above 0 and up to 1, got {white_threshold!r}")


def reduce_mask(mask: Tensor, domain: Domain) -> Tensor:
    """Bring a mask to a domain: a position is active when any mask cell it covers is active.

    Args:
        mask: bool ``[batch, height, width]``; for a domain with a cover of its own, at the mask domain of its program.
        domain: coarser or finer than the mask.

    Returns:
        bool ``[batch, domain.height, domain.width]``.
    """
    if not domain.cover.whole:
        return domain.cover.active(mask)
    if mask.shape[-2:] == (domain.height, domain.width):
        return mask
    # A batch as channels: adaptive pooling treats both alike, and takes three dimensions.
    return functional.adaptive_max_pool2d(mask.to(torch.float32), (domain.height, domain.width)) > 0


def tile_mask(mask: Tensor, batch: int) -> Tensor:
    """Repeat the masks of a batch for a network whose batch is a multiple of theirs (guidance doubles it).

    Args:
        mask: bool ``[samples, height, width]``.
        batch: batch size of the network's spatial input.

    Returns:
        ``mask`` itself when ``samples`` is 1 (one mask for all) or ``batch``; else ``[batch, height, width]``: all
        masks, then all masks again.

    Raises:
        MaskError: ``batch`` is not a multiple of ``samples``.
    """
    samples = mask.shape[0]
    if samples in (1, batch):
        return mask
    if batch % samples:
        raise MaskError(
            f"the network's batch is {batch}, so a mask for 1 sample or for a divisor of {batch} was expected; "
            f"got masks for {samples} samples. Pass one mask, or one for each picture; of colours pass one channel."
        )
    return mask.repeat(batch // samples, 1, 1)


_SINGLE = (str, os.PathLike, Image.Image, Tensor, np.ndarray)


def _from_sequence(masks: Sequence, white_threshold: float) -> Tensor:
    """One mask for each element."""
    prepared = [prepare_mask(element, white_threshold, samples=1) for element in masks]
    shapes = [tuple(element.shape) for element in prepared]
    if any(shape[0] != 1 or shape != shapes[0] for shape in shapes):
        raise MaskError(f"a list of masks must hold [height, width] masks of one size; got {shapes}. Resize them.")
    return torch.cat([element.to(prepared[0].device) for element in prepared])


def _numbers(mask: object) -> Tensor:
    """The numbers of a tensor, an array or nested lists."""
    if isinstance(mask, Tensor):
        values = mask.detach()
        return values.to_dense() if values.layout is not torch.strided else values
    if isinstance(mask, (np.ndarray, np.generic)):
        return _from_array(np.asarray(mask))
    if isinstance(mask, (list, tuple)):
        try:
            return _from_array(np.asarray(mask))
        except ValueError as error:
            message = "got a list that is not rectangular. Give every row the same length."
            raise MaskError(f"{_EXPECTED}; {message}") from error
    raise MaskError(f"{_EXPECTED}; got {type(mask).__name__}. Convert it to one of these.")


def _from_array(array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "biufc":
        raise MaskError(f"{_EXPECTED}; got an array of dtype {array.dtype}. Pass numbers or booleans.")
    if array.dtype.kind in "iufc" and not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if array.dtype.kind == "f" and array.dtype.itemsize not in (2, 4, 8):
        array = array.astype(np.float64)
    return torch.from_numpy(np.array(array))


def _levels(values: Tensor) -> Tensor:
    """Booleans as they are, or levels from black to white as floats: white is 1, and what lies below 0 is black.

    Raises:
        MaskError: the scale cannot be told.
    """
    if values.is_complex():
        raise MaskError(f"{_EXPECTED}; got complex values ({values.dtype}). Pass a real or boolean mask.")
    if values.numel() == 0:
        raise MaskError(f"{_EXPECTED}; got shape {tuple(values.shape)} without elements. Pass at least one pixel.")
    if values.dtype == torch.bool:
        return values
    return _levels_of_floats(values) if values.is_floating_point() else _levels_of_integers(values)


def _levels_of_floats(values: Tensor) -> Tensor:
    if values.element_size() == 1:
        # Nothing can be asked of floats of eight bits.
        values = values.to(torch.float32)
    if not bool(torch.isfinite(values).all()):
        kind = "NaN" if bool(torch.isnan(values).any()) else "infinite"
        raise MaskError(f"{_EXPECTED}; got {kind} values. Replace them, for example with torch.nan_to_num(mask).")
    greatest = float(values.max())
    if greatest <= 1 + _ROUNDING:
        return values
    if greatest <= 255 and bool((values == values.round()).all()):
        return values.to(torch.float32) / 255
    raise MaskError(
        f"a mask of floats has values from 0 to 1, or whole numbers from 0 to 255; got {values.dtype} from "
        f"{float(values.min()):g} to {greatest:g}. Divide them by what is white, or clamp them: mask.clip(0, 1)"
    )


def _levels_of_integers(values: Tensor) -> Tensor:
    dtype, bits = values.dtype, 8 * values.element_size()
    # Little can be asked of unsigned types.
    values = values.to(torch.int64)
    least, greatest = int(values.min()), int(values.max())
    if dtype == torch.uint64 and least < 0:
        # Half of its numbers have no place among signed ones.
        least, greatest = 0, 2**63
    if least >= 0 and greatest <= 1:
        return values.bool()
    if dtype in (torch.uint8, torch.uint16):
        scale: int | None = _SCALES[bits // 8]
    else:
        held = [known for known in _SCALES if known < 2 ** (bits - 1)]
        scale = next((known for known in held if greatest <= known), None)
    if least < 0 or scale is None:
        raise MaskError(
            f"a mask of integers has values of 0 and 1, from 0 to 255 or from 0 to 65535; got {dtype} from "
            f"{least} to {greatest}. Pass booleans, such as mask > 0, or floats from 0 to 1"
        )
    return values.to(torch.float32) / scale
