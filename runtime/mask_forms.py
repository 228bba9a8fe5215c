"""Which dimensions of an array of levels are samples and which are channels, and one map for each sample."""

from __future__ import annotations

import torch
from torch import Tensor

from fisedit_compile.errors import MaskError
from fisedit_compile.runtime.transparency import levels_of_layer

COLOURS = (3, 4)
"""Numbers of channels of pictures in colours, without and with opacity."""

SMALLEST = 8
"""``[H, W, 3]`` of at least so many rows and columns is a picture in colours, whatever it shows: so many masks of three
columns are of no use."""

ALIKE = 1 / 32
"""Channels that are nowhere further apart show grey: decoded from JPEG, they differ a little."""


def one_for_each_sample(levels: Tensor, samples: int | None, white_threshold: float, booleans: bool = False) -> Tensor:
    """Levels as ``[1 or batch, height, width]``.

    Args:
        levels: of rank 2 to 4, from 0 to 1 or booleans, with or without channels.
        samples: for how many pictures they are; None: not known.
        white_threshold: see :func:`~fisedit_compile.runtime.transparency.levels_of_layer`.
        booleans: they were given as booleans, which are no colours: ``[3, H, W]`` of an unknown number of samples is
            three masks, also where these are equal.

    Raises:
        MaskError: they have another rank, or it cannot be told what a dimension is.
    """
    shape = tuple(levels.shape)
    if levels.ndim == 2:
        return levels[None]
    if levels.ndim == 3:
        return _of_three(levels, samples, white_threshold, booleans)
    if levels.ndim == 4:
        for axis in (1, 3):
            if shape[axis] == 1:
                return levels.squeeze(axis)
        last = shape[3] in COLOURS and min(shape[1:3]) >= SMALLEST
        if not last and shape[1] in COLOURS and _alike(levels, 1):
            return _without_channels(levels, 1, white_threshold)
        if last or (shape[3] in COLOURS and _alike(levels, 3)):
            return _without_channels(levels, 3, white_threshold)
    raise MaskError(
        f"a mask is [height, width] or [batch, height, width], also with one, three equal or four channels; got rank "
        f"{levels.ndim}, shape {shape}. Select one channel, and drop dimensions of size 1"
    )


def _of_three(levels: Tensor, samples: int | None, white_threshold: float, booleans: bool) -> Tensor:
    first, rows, last = levels.shape
    if first == 1:
        return levels
    if last == 1:
        return levels.squeeze(2)[None]
    if last in COLOURS and min(first, rows) >= SMALLEST:
        return _without_channels(levels[None], 3, white_threshold)
    # Three masks of one value are as likely as a picture of one grey, and more is said by what the network's batch is.
    told = samples == 1 or not (booleans or bool(levels.min() == levels.max()))
    if first == 3 and told and _alike(levels[None], 1):
        return _without_channels(levels[None], 1, white_threshold)
    if last == 3 and _alike(levels[None], 3):
        return _without_channels(levels[None], 3, white_threshold)
    if first == 4 and samples not in (None, 4) and _alike(levels[None], 1):
        return _without_channels(levels[None], 1, white_threshold)
    return levels


def _alike(levels: Tensor, axis: int) -> bool:
    """Whether the colours of ``[B, ...]`` along ``axis`` show grey; opacity is not looked at."""
    colours = levels.narrow(axis, 0, 3).float()
    return bool((colours.amax(axis) - colours.amin(axis)).max() <= ALIKE)


def _without_channels(levels: Tensor, axis: int, white_threshold: float) -> Tensor:
    """``[B, H, W]`` from ``[B, H, W, C]`` or ``[B, C, H, W]``: the brightest colour, or what opacity says."""
    if levels.shape[axis] == 3:
        return levels.amax(axis)
    last = levels.movedim(axis, -1).float().cpu().numpy()
    maps = [levels_of_layer(sample[..., :3], sample[..., 3], white_threshold) for sample in last]
    return torch.stack([torch.from_numpy(one) for one in maps]).to(levels.device)
