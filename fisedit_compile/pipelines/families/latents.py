"""Where the cells of latents lie: maps ``[B, C, height, width]``, or packed to tokens of 2x2 cells as Flux takes them.

A session keeps its masks at the autoencoder's resolution, whatever the network takes: pixels belong to those cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.errors import MaskError, PipelineError
from fisedit_compile.pipelines.masks.masking import AutomaticMask, to_latents, to_pixels
from fisedit_compile.private.diffusers import packs_latents
from fisedit_compile.runtime import Domain
from fisedit_compile.runtime.masks import WHITE_THRESHOLD, MaskLike

PACKED_SIDE = 2
"""Latent cells of a token in each direction, in all pipelines of diffusers that pack them."""


def packed_resolutions(
    pipe: Any, height: int | None, width: int | None, others: Sequence[tuple[int, int]] = ()
) -> tuple[Domain, ...]:
    """The resolutions that the tokens may have to which a pipeline packs its latents; none for one that does not.

    It has one of them: what it calls the autoencoder's scale is that of a latent cell for most pipelines (Flux), and
    that of a token for others (Bria); and some take the size of their control picture. The number of tokens tells.

    Args:
        pipe: a diffusers pipeline.
        height, width: of the picture in pixels; None: the pipeline's default.
        others: heights and widths that it may have instead.

    Raises:
        PipelineError: the pipeline packs latents, and does not say how many pixels a latent cell has; or two of the
            sizes have as many tokens.
    """
    if not packs_latents(pipe):
        return ()
    scale, default = getattr(pipe, "vae_scale_factor", None), getattr(pipe, "default_sample_size", None)
    if scale is None or (default is None and None in (height, width)):
        raise PipelineError(
            f"{type(pipe).__name__} packs its latents to tokens and has no vae_scale_factor and default_sample_size to "
            "tell their rows and columns; give height and width"
        )
    known: dict[int, tuple[Domain, list[int]]] = {}
    for size in ((height, width), *others):
        pixels = [int(default * scale if side is None else side) for side in size]
        for side in (scale * PACKED_SIDE, scale):
            domain = Domain(*(extent // side for extent in pixels))
            former, former_pixels = known.setdefault(domain.size, (domain, pixels))
            if former != domain:
                told = " and ".join("x".join(map(str, one)) for one in (former_pixels, pixels))
                raise PipelineError(
                    f"the picture may become one of {told} pixels (height x width): one is the size asked for, "
                    "the other that of the control picture, and the latents do not tell which it is; give a control "
                    "picture of the size that is asked for"
                )
    return tuple(domain for domain, _ in known.values() if domain.size)


@dataclass(frozen=True)
class LatentCells:
    """The cells of the latents of a run.

    Attributes:
        domain: the autoencoder's resolution.
        tokens: resolution of the tokens ``[B, height * width, C]``, each of 2x2 cells; None: latents are maps.
    """

    domain: Domain
    tokens: Domain | None = None

    @classmethod
    def of(cls, latents: Tensor, tokens: Sequence[Domain]) -> LatentCells:
        """The cells of latents as the pipeline hands them to its callbacks.

        Args:
            latents: ``[B, C, height, width]`` or ``[B, tokens, C]``.
            tokens: as :func:`packed_resolutions` tells.

        Raises:
            PipelineError: they have another form.
        """
        if latents.dim() == 4:
            return cls(Domain(*latents.shape[-2:]))
        for domain in tokens:
            if latents.dim() == 3 and latents.shape[1] == domain.size:
                return cls(Domain(PACKED_SIDE * domain.height, PACKED_SIDE * domain.width), domain)
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

    def maps(self, latents: Tensor) -> Tensor:
        """Latents as ``[B, C, height, width]``; a position is a token where they are packed."""
        if self.tokens is None:
            return latents
        return latents.transpose(1, 2).unflatten(2, (self.tokens.height, self.tokens.width))

    def mask(self, given: MaskLike, latents: Tensor, white_threshold: float = WHITE_THRESHOLD) -> Tensor:
        """A user's mask at the autoencoder's resolution; a token is active as a whole.

        Args:
            given: white where the picture may change: a picture (PIL, or the path of one), numpy or torch, ``[H, W]``
                or ``[B, H, W]``.
            latents: of the run.
            white_threshold: the share of the mask's scale that white reaches.

        Returns:
            bool ``[B or 1, height, width]`` on the latents' device.

        Raises:
            MaskError: it is no mask, holds another number of masks than 1 or B, or has another aspect ratio.
            OptionError: the threshold is not above 0 and up to 1.
        """
        return self.expand(to_latents(given, self.maps(latents), white_threshold))

    def given_mask(
        self,
        given: MaskLike | None,
        latents: Tensor,
        white_threshold: float,
        automatic_mask: AutomaticMask | None,
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
        return self.mask(given, latents, white_threshold)

    def expand(self, mask: Tensor) -> Tensor:
        """A mask at the resolution of :meth:`maps` at the autoencoder's: bool ``[B, height, width]``."""
        return to_pixels(mask, self.domain.height, self.domain.width)

    def holds(self, latents: Tensor) -> bool:
        """Whether latents are of a form that :meth:`keep` takes: packed to tokens, or maps of cells or of tokens."""
        if latents.dim() == 3:
            return self.tokens is not None and latents.shape[1] == self.tokens.size
        return latents.dim() > 3 and Domain(*latents.shape[-2:]) in (self.domain, self.tokens)

    def keep(self, latents: Tensor, recorded: Tensor, mask: Tensor) -> Tensor:
        """The latents inside the mask, and the recorded ones outside it.

        Args:
            latents, recorded: of one shape, which :meth:`holds`.
            mask: bool ``[B or 1, height, width]`` at the autoencoder's resolution, as made by this class.
        """
        if self.tokens is not None and latents.shape[-2:] != (self.domain.height, self.domain.width):
            mask = mask[:, ::PACKED_SIDE, ::PACKED_SIDE]
        if latents.dim() == 3:
            inside = mask.flatten(1).unsqueeze(2)
        else:
            inside = mask.unflatten(0, (-1, *[1] * (latents.dim() - 3)))
        mixed = torch.where(inside, latents, recorded.to(latents.dtype))
        # The next call of the network must see the strides it was compiled for: those of the latents, as a clone has.
        return latents.clone().copy_(mixed)
