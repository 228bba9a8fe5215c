"""Masks of where two pictures differ."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fisedit_compile.errors import MaskError, OptionError
from fisedit_compile.pipelines.photos import PhotoLike, read_photo

DIFFERENCE = 8 / 255
"""From which difference of a channel on a pixel counts as painted: what files lose in compression is mostly less."""


def difference_mask(
    before: PhotoLike, after: PhotoLike, *, threshold: float = DIFFERENCE, grow: int = 0
) -> NDArray[np.bool_]:
    """Where two pictures differ: the mask of what was painted.

    Args:
        before: a picture of any form of a photo; or a batch of pictures, ``[B, height, width, 3]`` (numpy) or
            ``[B, 3, height, width]`` (torch).
        after: the same, of one size with it. Where it is transparent, ``before`` shows.
        threshold: from 0 to below 1: a pixel differs where a channel does by more.
        grow: by how many pixels the mask is grown, in every direction.

    Returns:
        bool ``[height, width]``, or ``[B, height, width]`` of batches of several pictures.

    Raises:
        PipelineError: one of them is no photo.
        MaskError: they have different sizes.
        OptionError: the threshold or the growth is out of its range.
    """
    if not 0 <= threshold < 1:
        raise OptionError(f"threshold must be from 0 to below 1, the scale of pixels, got {threshold!r}")
    if isinstance(grow, bool) or not isinstance(grow, int) or grow < 0:
        raise OptionError(f"grow must be a number of pixels from 0 on, got {grow!r}")
    batches = [_batch(one) for one in (before, after)]
    if len(batches[0]) != len(batches[1]):
        raise MaskError(f"there are {len(batches[0])} pictures before and {len(batches[1])} after; give as many")
    masks = [_single(left, right, threshold, grow) for left, right in zip(batches[0], batches[1], strict=True)]
    return masks[0] if len(masks) == 1 else np.stack(masks)


def _batch(given: PhotoLike) -> list[PhotoLike]:
    """The pictures of a batch; any other picture alone."""
    if getattr(given, "ndim", 0) == 4:
        return list(given)  # type: ignore[arg-type]
    return [given]


def _single(before: PhotoLike, after: PhotoLike, threshold: float, grow: int) -> NDArray[np.bool_]:
    ground, painted = read_photo(before, "the picture before").over_white(), read_photo(after, "the picture after")
    if ground.size != painted.size:
        sizes = " and ".join("x".join(map(str, one.size)) for one in (ground, painted))
        raise MaskError(f"two pictures of one size can be compared, got {sizes} (height x width); resize one of them")
    apart = (painted.over(ground.pixels) - ground.pixels).abs().amax(dim=(0, 1)).numpy()
    # Bytes that are exactly the threshold apart are so in single precision only nearly.
    mask = apart > threshold + 1e-6
    if grow:
        mask = ndimage.binary_dilation(mask, structure=np.ones((2 * grow + 1, 2 * grow + 1), dtype=bool))
    return np.asarray(mask, dtype=bool)
