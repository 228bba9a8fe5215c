"""Finding where a new prompt changes the picture in the first steps of the edit itself, which run densely.

This is FISEdit's method (arXiv 2305.17423, section 4.1): over the first steps of the edit, the absolute difference of
its latents to those of the recorded run is brought to the range 0..1 at each step and summed; Otsu's threshold splits
the sum in two, and a morphological opening removes single cells. Finding by probes is in ``pipelines/probing/``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fisedit_compile.errors import MaskError
from fisedit_compile.pipelines.masks.regions import find_region, to_unit_range
from fisedit_compile.pipelines.masks.settings import AutomaticMask

__all__ = ["AutomaticMask", "MaskFinder"]


class MaskFinder:
    """Collects the differences of the first steps and makes a mask of them.

    Args:
        settings: how to find the mask.
        pixels_per_cell: pixels of the picture that a position of the latents has in each direction.
    """

    def __init__(self, settings: AutomaticMask, pixels_per_cell: int = 1) -> None:
        self.settings = settings
        self._pixels_per_cell = pixels_per_cell
        self._sum: Tensor | None = None

    def add(self, latents: Tensor, recorded: Tensor) -> None:
        """Add one finished scheduler step.

        Args:
            latents: latents of the edit after the step ``[B, C, height, width]``.
            recorded: those of the recorded run after the same step, of the same shape.
        """
        difference = (latents.float() - recorded.float()).abs().mean(dim=1)
        normalised = to_unit_range(difference)
        self._sum = normalised if self._sum is None else self._sum + normalised

    def mask(self) -> Tensor:
        """The mask ``[B, height, width]`` (bool, on the latents' device): true where the picture changes.

        Raises:
            MaskError: no step was added, or the latents hold NaN.
        """
        if self._sum is None:
            raise MaskError("the automatic mask needs at least one finished step; none was added")
        maps = to_unit_range(self._sum).cpu().numpy()
        if not np.isfinite(maps).all():
            raise MaskError("the latents of the edit or of the recorded run hold NaN or infinity; no mask can be found")
        found = np.stack([find_region(single, self.settings, self._pixels_per_cell) for single in maps])
        return torch.from_numpy(found).to(self._sum.device)
