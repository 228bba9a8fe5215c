"""The seam of an edit: blended inside the mask, so that outside every pixel is the one of the picture before.

Autoencoders do not give back quite the photo that they were given, so what is decoded inside a mask does not meet the
photo outside. Over a few pixels from the edge inwards the edit is therefore mixed with the picture before.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from fisedit_compile.errors import OptionError
from fisedit_compile.pipelines.report import SeamError


def check_seam(seam: Any) -> None:
    """Refuse what is no number of pixels.

    Raises:
        OptionError: it is none.
    """
    if seam is not None and (isinstance(seam, bool) or not isinstance(seam, Integral) or seam < 0):
        raise OptionError(f"seam must be a number of pixels from 0 on, or None for the default; got {seam!r}")


def blended(edited: Tensor, base: Tensor, region: Tensor, seam: int) -> tuple[Tensor, SeamError | None]:
    """An edited picture inside a region and the one before outside, mixed along the region's edge, inside.

    Args:
        edited, base: ``[B, 3, height, width]``, values from 0 to 1.
        region: bool ``[B or 1, height, width]``.
        seam: over how many pixels they are mixed; fewer in narrow parts, of which at least the middle is the edit's.

    Returns:
        The picture, and how far it is from going on across the edge as the edited picture does; None: there is no edge.
    """
    weights = [torch.from_numpy(_weights(one.cpu().numpy(), seam)) for one in region]
    weight = torch.stack(weights).unsqueeze(1).to(edited.device)
    inside = region.unsqueeze(1)
    mixed = (base.float() + weight * (edited.float() - base.float())).to(base.dtype)
    result = torch.where(inside, torch.where(weight >= 1, edited, mixed), base)
    return result, _steps(result.float() - edited.float(), inside)


def _weights(region: NDArray[np.bool_], seam: int) -> NDArray[np.float32]:
    """How much the edit counts at each pixel: 0 outside, rising to 1 over so many pixels from the edge inwards.

    The picture's own border is no edge. Each connected part has a depth, the distance of its innermost pixel; the rise
    takes no more than that.
    """
    weights = region.astype(np.float32)
    if seam == 0 or not region.any() or region.all():
        return weights
    rows, columns = (np.flatnonzero(region.any(axis=axis)) for axis in (1, 0))
    # One pixel more on each side, where there is one: that is where the edge is seen from.
    box = tuple(slice(max(0, int(found[0]) - 1), int(found[-1]) + 2) for found in (rows, columns))
    inner = region[box]
    depth = ndimage.distance_transform_cdt(inner, metric="chessboard").astype(np.float32)
    parts, count = ndimage.label(inner, structure=np.ones((3, 3), dtype=int))
    deepest = np.zeros(count + 1, dtype=np.float32)
    deepest[1:] = ndimage.maximum(depth, parts, np.arange(1, count + 1))
    rise = np.minimum(np.float32(seam + 1), np.maximum(deepest, 1))[parts]
    weights[box] = np.where(inner, np.minimum(depth / rise, 1), 0)
    return weights


def _steps(correction: Tensor, inside: Tensor) -> SeamError | None:
    """The steps that a correction ``[B, C, height, width]`` of a picture makes across the edge of a region."""
    found = []
    for dim in (-2, -1):
        count = correction.shape[dim] - 1
        across = inside.narrow(dim, 0, count) != inside.narrow(dim, 1, count)
        step = (correction.narrow(dim, 1, count) - correction.narrow(dim, 0, count)).abs()
        found.append(step[across.expand_as(step)])
    steps = torch.cat(found)
    return SeamError(float(steps.max()), float(steps.mean())) if steps.numel() else None
