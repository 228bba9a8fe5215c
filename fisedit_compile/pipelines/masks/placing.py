"""How a photo of any size lies on the cells of a model: resized as a whole, never cropped, and pasted at full size.

The model draws a picture whose sides are multiples of its own. The photo is resized to that, so each pixel of the photo
belongs to one cell, in proportion. No border is added: the rounding squeezes by a few per cent what the model sees, and
is undone when the edit comes back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fisedit_compile.errors import MaskError
from fisedit_compile.pipelines.masks.cells import check_aspect, same_aspect, to_pixels
from fisedit_compile.runtime import Domain
from fisedit_compile.runtime.masks import MaskLike, prepare_mask, reduce_mask

AREA_WEIGHT = 0.2
"""How much a picture's area may differ from the model's before its aspect ratio does: by a factor 2 for 14 %."""


@dataclass(frozen=True)
class Placing:
    """Where a picture lies on what the model makes.

    Attributes:
        picture: height and width of the picture in pixels.
        model: height and width of what the model makes, in pixels.
    """

    picture: tuple[int, int]
    model: tuple[int, int]

    @classmethod
    def same(cls, pixels: Tensor) -> Placing:
        """That of a picture ``[..., height, width]`` which the model made itself."""
        size = int(pixels.shape[-2]), int(pixels.shape[-1])
        return cls(size, size)

    @property
    def resized(self) -> bool:
        """Whether the picture is of another size than what the model makes."""
        return self.picture != self.model

    def to_model(self, pixels: Tensor) -> Tensor:
        """A picture ``[B, C, *picture]`` with values from 0 to 1 at the model's size."""
        return _resized(pixels, self.model)

    def to_picture(self, pixels: Tensor) -> Tensor:
        """What the model made ``[B, C, *model]`` at the size of the picture."""
        return _resized(pixels, self.picture)

    def region(self, cells: Tensor) -> Tensor:
        """The pixels of the picture that belong to cells, bool ``[B, height, width]``: those whose centre lies in one.

        Args:
            cells: bool ``[B, rows, columns]`` of what the model makes.
        """
        if not self.resized:
            return to_pixels(cells, *self.picture)
        rows, columns = (
            ((torch.arange(extent, device=cells.device) + 0.5) * count / extent).long()
            for extent, count in zip(self.picture, cells.shape[-2:], strict=True)
        )
        return cells[:, rows][:, :, columns]

    def given_region(self, mask: MaskLike, white_threshold: float, cells: Tensor) -> Tensor:
        """The pixels of the picture that a user's mask names, bool ``[B or 1, height, width]``.

        Args:
            mask: white where the picture may change, of the picture's aspect ratio or the model's. One of the size of
                ``cells``, such as one that was found, names cells.
            white_threshold: the share of the mask's scale that white reaches.
            cells: bool ``[1, rows, columns]``, the mask at the latents' resolution.

        Raises:
            MaskError: it is no mask, or has another aspect ratio.
        """
        prepared = prepare_mask(mask, white_threshold, 1)
        self.check(prepared)
        if prepared.shape[0] != 1:
            raise MaskError(f"a photo is one picture, and the mask has {prepared.shape[0]}; give one mask")
        if prepared.shape[-2:] == cells.shape[-2:]:
            return self.region(prepared.to(cells.device))
        return reduce_mask(prepared, Domain(*self.picture)).to(cells.device)

    def check(self, mask: Tensor) -> None:
        """Refuse a mask ``[..., height, width]`` of another aspect ratio than the picture's and the model's.

        Raises:
            MaskError: it is one.
        """
        size = int(mask.shape[-2]), int(mask.shape[-1])
        if not same_aspect(size, self.model):
            check_aspect(size, self.picture)


def _resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    resized = functional.interpolate(pixels.float(), size=size, mode="bicubic", antialias=True)
    return resized.clamp(0, 1).to(pixels.dtype)


def fitted_size(picture: tuple[int, int], area: int, grid: int) -> tuple[int, int]:
    """The size at which a model sees a picture: about as many pixels as it usually makes, in about the aspect ratio.

    A picture whose sides are multiples already, of half the usual area to one and a half times, is taken as it is.

    Args:
        picture: height and width in pixels.
        area: pixels that the model usually makes.
        grid: of how many pixels both sides must be multiples.
    """
    height, width = picture
    if height % grid == 0 and width % grid == 0 and area / 2 <= height * width <= 1.5 * area:
        return picture

    def cost(size: tuple[int, int]) -> float:
        squeezed = abs(math.log(size[0] * width / (size[1] * height)))
        return squeezed + AREA_WEIGHT * abs(math.log(size[0] * size[1] / area))

    ideal = math.sqrt(area * height / width)
    rows = range(max(1, int(ideal / grid / 2)), int(2 * ideal / grid) + 2)
    sizes = []
    for row in rows:
        column = max(1, math.floor(row * width / height))
        sizes += [(row * grid, column * grid), (row * grid, (column + 1) * grid)]
    return min(sizes, key=cost)
