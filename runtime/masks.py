"""Masks of a picture: what may change. Preparing any input, reducing to a resolution, tiling over a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from fisedit_compile.errors import MaskError
from fisedit_compile.runtime.spec import Domain

MaskLike = Image.Image | np.ndarray | Tensor | Sequence

_EXPECTED = (
    "a mask is a PIL image, a numpy array or a torch tensor [height, width] or [batch, height, width], white = edit"
)


def prepare_mask(mask: MaskLike) -> Tensor:
    """Turn any mask into a boolean tensor on the device it came from.

    Args:
        mask: PIL image of any mode (fully transparent pixels count as black), numpy array or torch tensor of any real
            dtype, ``[height, width]`` or ``[batch, height, width]``; or a sequence of equally large two-dimensional
            masks, one for each sample. A value greater than zero is white: it may change.

    Returns:
        bool ``[1, height, width]`` or ``[batch, height, width]``, contiguous, sharing no memory with ``mask``.

    Raises:
        MaskError: another type, rank or dtype, a size of zero, or NaN values.
    """
    if isinstance(mask, Tensor):
        values = mask.detach()
        if values.layout is not torch.strided:
            values = values.to_dense()
        if values.is_floating_point() and values.element_size() == 1:
            # Nothing can be asked of floats of eight bits.
            values = values.to(torch.float32)
    elif isinstance(mask, Image.Image):
        values = _from_image(mask)
    elif isinstance(mask, np.ndarray | np.generic):
        values = _from_array(np.asarray(mask))
    elif isinstance(mask, list | tuple):
        values = _from_sequence(mask)
    else:
        raise MaskError(f"{_EXPECTED}; got {type(mask).__name__}. Convert it to one of these.")
    if values.is_complex():
        raise MaskError(f"{_EXPECTED}; got complex values ({values.dtype}). Pass a real or boolean mask.")
    if values.ndim not in (2, 3):
        raise MaskError(
            f"{_EXPECTED}; got rank {values.ndim}, shape {tuple(values.shape)}. "
            "Select one channel, and drop dimensions of size 1."
        )
    if values.numel() == 0:
        raise MaskError(f"{_EXPECTED}; got shape {tuple(values.shape)} without elements. Pass at least one pixel.")
    if values.is_floating_point() and bool(torch.isnan(values).any()):
        raise MaskError(f"{_EXPECTED}; got NaN values. Replace them, for example with torch.nan_to_num(mask).")
    active = values.clone() if values.dtype == torch.bool else values > 0
    return (active if active.ndim == 3 else active.unsqueeze(0)).contiguous()


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
            f"got masks for {samples} samples. Pass one mask, or one for each picture."
        )
    return mask.repeat(batch // samples, 1, 1)


def _from_image(image: Image.Image) -> Tensor:
    """The brightness of an image, zero where it is fully transparent."""
    if "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode in ("LA", "La", "RGBA", "RGBa", "PA"):
        pixels = np.asarray(image.convert("RGBA"))
        return _from_array(pixels[..., :3].max(axis=2) * (pixels[..., 3] > 0))
    if image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16"):
        return _from_array(np.asarray(image))
    return _from_array(np.asarray(image.convert("RGB")).max(axis=2))


def _from_array(array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "biufc":
        raise MaskError(f"{_EXPECTED}; got an array of dtype {array.dtype}. Pass numbers or booleans.")
    if array.dtype.kind in "iu":
        # torch lacks comparisons for some unsigned types; only the sign matters.
        array = array > 0
    elif array.dtype.kind == "f" and array.dtype.itemsize not in (2, 4, 8) or array.dtype.byteorder in "<>":
        array = array.astype(array.dtype.newbyteorder("=") if array.dtype.itemsize <= 8 else np.float64)
    return torch.from_numpy(np.array(array))


def _from_sequence(masks: Sequence) -> Tensor:
    """One mask for each element; or nested lists of numbers."""
    if masks and all(isinstance(element, Image.Image | Tensor | np.ndarray) for element in masks):
        prepared = [prepare_mask(element) for element in masks]
        shapes = [tuple(element.shape) for element in prepared]
        if any(shape[0] != 1 or shape != shapes[0] for shape in shapes):
            raise MaskError(f"a list of masks must hold [height, width] masks of one size; got {shapes}. Resize them.")
        return torch.cat([element.to(prepared[0].device) for element in prepared])
    try:
        array = np.asarray(masks)
    except ValueError as error:
        raise MaskError(f"{_EXPECTED}; got a list that is not rectangular. Give every row the same length.") from error
    return _from_array(array)
