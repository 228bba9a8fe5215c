"""The cells of latents: where they lie, and masks that are carried between them and pixels.

Latents are maps ``[B, C, height, width]``, or packed to tokens of several cells, as Flux takes them. A session keeps
its masks at the autoencoder's resolution, whatever the network takes: pixels belong to those cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from torch import Tensor
from torch.nn import functional

from fisedit_compile.errors import MaskError, PipelineError
from fisedit_compile.pipelines.masks.settings import AutomaticMask
from fisedit_compile.runtime import Domain
from fisedit_compile.runtime.masks import WHITE_THRESHOLD, MaskLike, prepare_mask, reduce_mask

_ROUNDINGS = ((0, 2), (-2, 0), (-1, 1))
"""Between which halves below and above a whole number lies what was rounded to it: down, up, to the nearest."""


@dataclass(frozen=True)
class LatentCells:
    """The cells of the latents of a run.

    Attributes:
        domain: the autoencoder's resolution.
        tokens: resolution of the tokens ``[B, height * width, C]``, each a square of cells; None: latents are maps.
    """

    domain: Domain
    tokens: Domain | None = None

    @classmethod
    def of(cls, latents: Tensor, tokens: Sequence[Domain] = (), side: int = 1) -> LatentCells:
        """The cells of latents as the pipeline hands them to its callbacks.

        Args:
            latents: ``[B, C, height, width]`` or ``[B, tokens, C]``.
            tokens: the resolutions that tokens may have.
            side: cells of a token in each direction.

        Raises:
            PipelineError: they have another form.
        """
        if latents.dim() == 4:
            return cls(Domain(*latents.shape[-2:]))
        for domain in tokens:
            if latents.dim() == 3 and latents.shape[1] == domain.size:
                return cls(Domain(side * domain.height, side * domain.width), domain)
        forms = [f"[B, {domain.size}, C] for {domain} tokens" for domain in tokens] or ["[B, C, height, width]"]
        raise PipelineError(
            f"the pipeline's latents have shape {tuple(latents.shape)}, and an edit session needs {' or '.join(forms)}"
            "; it is for pipelines that make single pictures"
        )

    def check_size(self, pipe: Any, height: int, width: int) -> None:
        """Refuse a pipeline that makes a picture of another size and resizes it in the end.

        Args:
            pipe: it has these latents.
            height, width: of the picture that it returns, in pixels.

        Raises:
            PipelineError: the latents do not belong to a picture of this size.
        """
        made = tuple(pipe.vae_scale_factor * side for side in (self.domain.height, self.domain.width))
        if made != (height, width):
            raise PipelineError(
                f"{type(pipe).__name__} makes a picture of {made[0]}x{made[1]} pixels and resizes it to the {height}x"
                f"{width} that were asked for, to which masks of its latents do not belong; give "
                f"use_resolution_binning=False, or height={made[0]} and width={made[1]}"
            )

    @property
    def side(self) -> int:
        """Cells of a token in each direction; 1 for maps."""
        return 1 if self.tokens is None else self.domain.height // self.tokens.height

    def pixels_per_position(self, pipe: Any, pixels: Tensor | None) -> int:
        """Pixels that a position of :meth:`maps` has in each direction.

        Args:
            pipe: it has these latents.
            pixels: a picture of it ``[B, 3, height, width]``; None: latents were wanted, so the pipeline tells.
        """
        scale = getattr(pipe, "vae_scale_factor", 1) if pixels is None else pixels.shape[-2] // self.domain.height
        return int(scale) * self.side

    def maps(self, latents: Tensor) -> Tensor:
        """Latents as ``[B, C, height, width]``; a position is a token where they are packed."""
        if self.tokens is None:
            return latents
        return latents.transpose(1, 2).unflatten(2, (self.tokens.height, self.tokens.width))

    def mask(
        self,
        given: MaskLike,
        latents: Tensor,
        white_threshold: float = WHITE_THRESHOLD,
        picture: tuple[int, int] | None = None,
    ) -> Tensor:
        """A user's mask at the autoencoder's resolution; a token is active as a whole.

        Args:
            given: white where the picture may change: a picture (PIL, or the path of one), numpy or torch, ``[H, W]``
                or ``[B, H, W]``.
            latents: of the run.
            white_threshold: the share of the mask's scale that white reaches.
            picture: height and width of the picture in pixels, where it was resized for the model and may have a
                somewhat other aspect ratio, which the mask may have as well.

        Returns:
            bool ``[B or 1, height, width]`` on the latents' device.

        Raises:
            MaskError: it is no mask, holds another number of masks than 1 or B, or has another aspect ratio.
            OptionError: the threshold is not above 0 and up to 1.
        """
        return self.expand(to_latents(given, self.maps(latents), white_threshold, picture))

    def given_mask(
        self,
        given: MaskLike | None,
        latents: Tensor,
        white_threshold: float,
        automatic_mask: AutomaticMask | None,
        picture: tuple[int, int] | None = None,
    ) -> Tensor | None:
        """:meth:`mask` of what the user of an edit gave; None: the mask is to be found.

        Raises:
            MaskError: as :meth:`mask`; or a mask together with settings to find one, or a threshold without a mask.
            OptionError: the threshold is not above 0 and up to 1.
        """
        if given is None:
            if white_threshold != WHITE_THRESHOLD:
                raise MaskError("white_threshold is for a mask that is given, and there is none; leave it out")
            return None
        if automatic_mask is not None:
            raise MaskError("give either mask or automatic_mask, not both")
        return self.mask(given, latents, white_threshold, picture)

    def expand(self, mask: Tensor) -> Tensor:
        """A mask at the resolution of :meth:`maps` at the autoencoder's: bool ``[B, height, width]``."""
        return to_pixels(mask, self.domain.height, self.domain.width)

    def holds(self, latents: Tensor) -> bool:
        """Whether latents are of a form that can be pasted: packed to tokens, or maps of cells or of tokens."""
        if latents.dim() == 3:
            return self.tokens is not None and latents.shape[1] == self.tokens.size
        return latents.dim() > 3 and Domain(*latents.shape[-2:]) in (self.domain, self.tokens)


def to_latents(
    mask: MaskLike,
    latents: Tensor,
    white_threshold: float = WHITE_THRESHOLD,
    picture: tuple[int, int] | None = None,
) -> Tensor:
    """A user's mask at the latents' resolution: a cell is active when any white mask pixel lies in it.

    Args:
        mask: white where the picture may change: a picture (PIL, or the path of one), numpy or torch, ``[H, W]`` or
            ``[B, H, W]``.
        latents: ``[B, C, height, width]``.
        white_threshold: the share of the mask's scale that white reaches.
        picture: as for :meth:`LatentCells.mask`.

    Returns:
        bool ``[B or 1, height, width]`` on the latents' device.

    Raises:
        MaskError: it is no mask, holds another number of masks than 1 or B, or has another aspect ratio.
        OptionError: the threshold is not above 0 and up to 1.
    """
    prepared = prepare_mask(mask, white_threshold, latents.shape[0]).to(latents.device)
    if prepared.shape[0] not in (1, latents.shape[0]):
        raise MaskError(
            f"the run has {latents.shape[0]} pictures and the mask has {prepared.shape[0]}; give one mask for all "
            "pictures or one for each; a picture in colours is [height, width, channels]"
        )
    height, width = latents.shape[-2:]
    size = prepared.shape[-2], prepared.shape[-1]
    if picture is None or not same_aspect(size, (height, width)):
        check_aspect(size, (height, width) if picture is None else picture)
    return reduce_mask(prepared, Domain(height, width))


def check_aspect(mask: tuple[int, int], cells: tuple[int, int]) -> None:
    """Refuse a mask that cannot be one of the whole picture.

    Args:
        mask: its height and width in pixels.
        cells: those of the picture in latent cells.

    Raises:
        MaskError: it has another aspect ratio.
    """
    if not same_aspect(mask, cells):
        (rows, columns), (height, width) = mask, cells
        shapes = f"{rows}x{columns} (height x width)"
        turned = same_aspect((columns, rows), cells)
        raise MaskError(
            f"expected a mask with the aspect ratio of the picture, {height}:{width} = {height / width:.3g} (height to "
            f"width); got one of {shapes}, {rows / columns:.3g}. "
            + ("Turn it: it is as high as it should be wide" if turned else "Crop or pad it to what the picture shows")
        )


def same_aspect(mask: tuple[int, int], cells: tuple[int, int]) -> bool:
    """Whether a mask may be one of the whole picture, as far as rounding tells.

    Both come from one original: the mask is it at some scale with its sides rounded to pixels, the picture is it with
    its sides rounded to cells. Rounding goes down, up or to the nearest, alike for both sides.

    Args:
        mask: its height and width in pixels.
        cells: those of the picture in latent cells.
    """
    for (pixel_below, pixel_above), (cell_below, cell_above) in product(_ROUNDINGS, _ROUNDINGS):
        least, most = ([2 * side + off for side in mask] for off in (pixel_below, pixel_above))
        shortest, longest = ([2 * side + off for side in cells] for off in (cell_below, cell_above))
        # The scales that each side allows, least / longest to most / shortest, have some in common.
        if least[0] * shortest[1] < most[1] * longest[0] and least[1] * shortest[0] < most[0] * longest[1]:
            return True
    return False


def to_pixels(mask: Tensor, height: int, width: int) -> Tensor:
    """The pixels that belong to the cells of a latent mask.

    Args:
        mask: bool ``[B, latent height, latent width]``.
        height, width: of the picture, multiples of the mask's.

    Returns:
        bool ``[B, height, width]``.

    Raises:
        MaskError: the picture's size is not a multiple of the mask's.
    """
    rows, columns = mask.shape[-2:]
    if height % rows or width % columns:
        raise MaskError(f"a picture of {height}x{width} pixels is no multiple of its {rows}x{columns} latents")
    return mask.repeat_interleave(height // rows, dim=-2).repeat_interleave(width // columns, dim=-1)


def grow_mask(mask: Tensor, cells: int) -> Tensor:
    """Grow a mask by a number of cells in every direction, diagonals included; bool ``[B, height, width]``."""
    if cells == 0:
        return mask
    return functional.max_pool2d(mask.float(), 2 * cells + 1, stride=1, padding=cells) > 0
