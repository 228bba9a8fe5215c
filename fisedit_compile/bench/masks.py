"""Masks to measure with: how much of the picture is active decides the cost, and so does how ragged its edge is.

Three shapes with an exact share of active cells: ``square`` and ``disc`` are compact, which flatters every sparse
method; ``ragged`` has the statistics of masks found by comparing latents. The 3 001 masks that the authors of FISEdit
(arXiv 2305.17423) released have a mean area of 23 %, and 28, 35 and 49 % of the cells are active after max-pooling
them to 1/2, 1/4 and 1/8 of their resolution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fisedit_compile.errors import OptionError

SHAPES = ("square", "disc", "ragged")
#: Fitted to the statistics above: the amplitude of a wave falls with its frequency to this power, ...
ROUGHNESS = 1.72
#: ... and the field falls off from the centre of the edit: standard deviations of the waves on the picture's side.
LOCALITY = 4.8


def make_mask(shape: str, density: float, height: int, width: int, seed: int = 0) -> Tensor:
    """A mask with a given share of active cells.

    Args:
        shape: ``square``, ``disc`` or ``ragged``.
        density: share of active cells, above 0 and at most 1; at least one cell is active.
        height: of the mask in cells. Use the resolution of the network's input for a density that is exact there.
        width: of the mask in cells.
        seed: places the centre and, for ``ragged``, draws the outline.

    Returns:
        bool ``[height, width]``, on the CPU.

    Raises:
        OptionError: an unknown shape, or a density or size out of range.
    """
    if shape not in SHAPES:
        raise OptionError(f"unknown mask shape {shape!r}; expected one of {', '.join(SHAPES)}")
    if not 0.0 < density <= 1.0:
        raise OptionError(f"the density of a mask must be above 0 and at most 1, got {density}")
    if height < 1 or width < 1:
        raise OptionError(f"a mask needs at least one cell in each direction, got {height}x{width}")
    generator = torch.Generator().manual_seed(seed)
    count = max(1, round(density * height * width))
    # In units of the shorter side, so that squares are square in any picture; cells are taken at their centres.
    side = min(height, width)
    down, right = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    rows = torch.arange(height, dtype=torch.float64) + 0.5
    columns = torch.arange(width, dtype=torch.float64) + 0.5
    # Compact shapes stay inside the picture where they fit; a ragged one has its centre in the middle part.
    margin = 0.3 * side if shape == "ragged" else 0.5 * min(side, (count**0.5) * (1.13 if shape == "disc" else 1.0))
    y = (rows - margin - down * (height - 2 * margin)) / side
    x = (columns - margin - right * (width - 2 * margin)) / side
    if shape == "square":
        field = -torch.maximum(y.abs()[:, None], x.abs()[None, :])
    else:
        field = -torch.hypot(y[:, None], x[None, :])
        if shape == "ragged":
            field = LOCALITY * field + _waves(height, width, generator)
    chosen = field.flatten().topk(count).indices
    mask = torch.zeros(height * width, dtype=torch.bool)
    mask[chosen] = True
    return mask.reshape(height, width)


def _waves(height: int, width: int, generator: torch.Generator) -> Tensor:
    """Random waves of all lengths, float64 ``[height, width]`` of mean 0 and standard deviation 1."""
    down, right = torch.fft.fftfreq(height, dtype=torch.float64), torch.fft.rfftfreq(width, dtype=torch.float64)
    frequency = torch.hypot(down[:, None], right[None, :])
    frequency[0, 0] = torch.inf  # no constant part
    phases = torch.randn(*frequency.shape, generator=generator, dtype=torch.complex128)
    waves = torch.fft.irfft2(phases * frequency**-ROUGHNESS, s=(height, width))
    return waves / waves.std().clamp_min(1e-12) if waves.numel() > 1 else waves
