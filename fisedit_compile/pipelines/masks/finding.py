"""Finding where a new prompt changes the picture.

The automatic mask follows FISEdit (arXiv 2305.17423, section 4.1): over the first steps of the edit, the absolute
difference of its latents to those of the recorded run is brought to the range 0..1 at each step and summed; Otsu's
threshold splits the sum in two, and a morphological opening removes single cells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from fisedit_compile.errors import MaskError, OptionError

OTSU_BINS = 256


@dataclass(frozen=True)
class AutomaticMask:
    """How the mask of an edit is found.

    Attributes:
        steps: how many of ``out_of`` scheduler steps run densely to find it; scaled to the steps of the run.
        out_of: number of steps that ``steps`` refers to.
        threshold: between 0 and 1, of the summed difference brought to 0..1; None chooses it by Otsu's method.
        opening: side, in latent cells, of the square of the morphological opening; 0 or 1 leaves it out.
        growth: by how many latent cells, in every direction, the mask is grown in the end. What differs in the first
            steps is smaller than what differs in the end; docs/pipelines.md has what growth brings and costs.
        stabilised: the dense steps take the attention to words that both prompts share from the recorded run, which
            has to have kept it: the session must have been told so, by its own ``automatic_mask``, when it generated.

    Raises:
        OptionError: a value is out of its range.
    """

    steps: int = 10
    out_of: int = 50
    threshold: float | None = None
    opening: int = 2
    growth: int = 1
    stabilised: bool = False

    def __post_init__(self) -> None:
        """Check every value."""
        if self.out_of < 1 or not 1 <= self.steps <= self.out_of:
            raise OptionError(f"automatic mask: steps must be from 1 to out_of, got {self.steps} of {self.out_of}")
        if self.threshold is not None and not 0.0 <= self.threshold < 1.0:
            raise OptionError(f"automatic mask: threshold must be from 0 to below 1, got {self.threshold}")
        if self.opening < 0 or self.growth < 0:
            raise OptionError(
                f"automatic mask: opening and growth must not be negative, got {self.opening} and {self.growth}"
            )

    def scaled_steps(self, steps: int) -> int:
        """How many of ``steps`` scheduler steps run densely: at least one."""
        return max(1, math.ceil(steps * self.steps / self.out_of))


class MaskFinder:
    """Collects the differences of the first steps and makes a mask of them.

    Args:
        settings: how to find the mask.
    """

    def __init__(self, settings: AutomaticMask) -> None:
        self.settings = settings
        self._sum: Tensor | None = None

    def add(self, latents: Tensor, recorded: Tensor) -> None:
        """Add one finished scheduler step.

        Args:
            latents: latents of the edit after the step ``[B, C, height, width]``.
            recorded: those of the recorded run after the same step, of the same shape.
        """
        difference = (latents.float() - recorded.float()).abs().mean(dim=1)
        normalised = _to_unit_range(difference)
        self._sum = normalised if self._sum is None else self._sum + normalised

    def mask(self) -> Tensor:
        """The mask ``[B, height, width]`` (bool, on the latents' device): true where the picture changes.

        Raises:
            MaskError: no step was added, or the latents hold NaN.
        """
        if self._sum is None:
            raise MaskError("the automatic mask needs at least one finished step; none was added")
        maps = _to_unit_range(self._sum).cpu().numpy()
        if not np.isfinite(maps).all():
            raise MaskError("the latents of the edit or of the recorded run hold NaN or infinity; no mask can be found")
        found = np.stack([find_region(single, self.settings) for single in maps])
        return torch.from_numpy(found).to(self._sum.device)


def find_region(difference: NDArray[np.floating], settings: AutomaticMask) -> NDArray[np.bool_]:
    """Threshold, open and grow one map of differences ``[height, width]`` with values from 0 to 1."""
    threshold = otsu_threshold(difference) if settings.threshold is None else settings.threshold
    # Compared in double precision: in single precision a threshold just below a bin's edge would round up to it.
    region = difference.astype(np.float64) > threshold
    if settings.opening > 1:
        region = open_region(region, settings.opening)
    if settings.growth:
        side = 2 * settings.growth + 1
        region = ndimage.binary_dilation(region, structure=np.ones((side, side), dtype=bool))
    return np.asarray(region, dtype=bool)


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


def _to_unit_range(maps: Tensor) -> Tensor:
    """Bring each map of ``[B, height, width]`` to 0..1; a map of one value becomes zero."""
    lowest = maps.amin(dim=(1, 2), keepdim=True)
    extent = maps.amax(dim=(1, 2), keepdim=True) - lowest
    return torch.where(extent == 0, torch.zeros_like(maps), (maps - lowest) / extent)
