"""From a map of differences to a region: a threshold, what is left out, what is filled, and growth."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from fisedit_compile.pipelines.masks.settings import AutomaticMask

OTSU_BINS = 256
AROUND = np.ones((3, 3), dtype=bool)
"""A cell and its neighbours, diagonal ones included."""


def find_region(
    difference: NDArray[np.floating], settings: AutomaticMask, pixels_per_cell: int = 1
) -> NDArray[np.bool_]:
    """Where a map of differences is great.

    Args:
        difference: ``[height, width]``, from 0 to 1.
        settings: how to find a mask.
        pixels_per_cell: pixels of the picture that a position of the map has in each direction.

    Returns:
        bool ``[height, width]``: above the threshold, without specks and holes, and grown.
    """
    region = above_threshold(difference, settings)
    if settings.opening > 1:
        opened = open_region(region, settings.opening)
        # Where there is nothing else, a speck is what was looked for; FISEdit leaves nothing.
        region = opened if opened.any() or settings.method == "fisedit" else region
    if settings.fills_holes:
        region = np.asarray(ndimage.binary_fill_holes(region), dtype=bool)
    return grow_region(region, settings, pixels_per_cell)


def above_threshold(difference: NDArray[np.floating], settings: AutomaticMask) -> NDArray[np.bool_]:
    """The cells above the threshold of the settings, and those above the lower one that are connected with them."""
    threshold = otsu_threshold(difference) if settings.threshold is None else settings.threshold
    # Compared in double precision: in single precision a threshold just below a bin's edge would round up to it.
    values = difference.astype(np.float64)
    region = values > threshold
    if settings.hysteresis < 1.0:
        lower = values > settings.hysteresis * threshold
        region = ndimage.binary_propagation(region, structure=AROUND, mask=lower)
    return np.asarray(region, dtype=bool)


def grow_region(region: NDArray[np.bool_], settings: AutomaticMask, pixels_per_cell: int) -> NDArray[np.bool_]:
    """A region ``[height, width]`` with all cells that have a pixel within the growth of the settings."""
    cells, pixels = settings.grown_cells, settings.grown_pixels
    reach = cells if pixels is None else -(-pixels // pixels_per_cell)
    if not reach:
        return region
    structure = np.ones((2 * reach + 1, 2 * reach + 1), dtype=bool)
    if pixels is not None:
        # Pixels between a cell and another one so many cells away, along one axis.
        between = np.maximum(np.abs(np.arange(-reach, reach + 1)) - 1, 0) * pixels_per_cell
        structure = np.hypot(between[:, None], between[None, :]) < pixels
    return np.asarray(ndimage.binary_dilation(region, structure=structure), dtype=bool)


def otsu_threshold(values: NDArray[np.floating]) -> float:
    """The threshold that splits values from 0 to 1 into two classes of greatest variance between them.

    Source: N. Otsu, "A threshold selection method from gray-level histograms", 1979.  The histogram has 256 bins;
    where several thresholds are equally good, the middle one is taken.  Values above the threshold are the upper class;
    a map of a single value has no upper class.
    """
    counts, edges = np.histogram(values, bins=OTSU_BINS, range=(0.0, 1.0))
    centres = (edges[:-1] + edges[1:]) / 2
    lower = np.cumsum(counts).astype(np.float64)
    lower_sum = np.cumsum(counts * centres)
    upper = lower[-1] - lower
    split = (lower > 0) & (upper > 0)
    if not split.any():
        return 1.0
    variance = np.full(OTSU_BINS, -1.0)
    means_apart = lower_sum[split] / lower[split] - (lower_sum[-1] - lower_sum[split]) / upper[split]
    variance[split] = lower[split] * upper[split] * means_apart**2
    best = np.flatnonzero(variance >= variance.max() * (1 - 1e-9))
    # One float below the edge: a value on the edge is counted in the upper bin.
    return float(np.nextafter(edges[1:][best[len(best) // 2]], 0.0))


def open_region(region: NDArray[np.bool_], side: int) -> NDArray[np.bool_]:
    """Morphological opening with a square: what remains is the union of all squares that fit into the region."""
    return np.asarray(ndimage.binary_opening(region, structure=np.ones((side, side), dtype=bool)), dtype=bool)


def to_unit_range(maps: Tensor) -> Tensor:
    """Bring each map of ``[B, height, width]`` to 0..1; a map of one value becomes zero."""
    lowest = maps.amin(dim=(1, 2), keepdim=True)
    extent = maps.amax(dim=(1, 2), keepdim=True) - lowest
    return torch.where(extent == 0, torch.zeros_like(maps), (maps - lowest) / extent)
