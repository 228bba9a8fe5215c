"""Where the cells of latents lie: maps ``[B, C, height, width]``, or packed to tokens of 2x2 cells as Flux takes them.

A session keeps its masks at the autoencoder's resolution, whatever the network takes: pixels belong to those cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines.masking import to_latents, to_pixels
from fisedit_compile.runtime import Domain
from fisedit_compile.runtime.masks import MaskLike

PACKED_SIDE = 2
"""Latent cells of a token in each direction, in all pipelines of diffusers that pack them."""


def packed_resolution(pipe: Any, height: int | None, width: int | None) -> Domain | None:
    """The resolution of the tokens that a pipeline packs its latents to; None for a pipeline that does not.

    Args:
        pipe: a diffusers pipeline.
        height, width: of the picture in pixels; None: the pipeline's default.

    Raises:
        PipelineError: the pipeline packs latents, and does not say how many pixels a latent cell has.
    """
    if not callable(getattr(pipe, "_pack_latents", None)):
        return None
    scale, default = getattr(pipe, "vae_scale_factor", None), getattr(pipe, "default_sample_size", None)
    if scale is None or (default is None and None in (height, width)):
        raise PipelineError(
            f"{type(pipe).__name__} packs its latents to tokens and has no vae_scale_factor and default_sample_size to "
            "tell their rows and columns; give height and width, or use the runtime with the option tokens"
        )
    sizes = (int(default * scale if size is None else size) // (scale * PACKED_SIDE) for size in (height, width))
    return Domain(*sizes)


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
    def of(cls, latents: Tensor, tokens: Domain | None) -> LatentCells:
        """The cells of latents as the pipeline hands them to its callbacks.

        Args:
            latents: ``[B, C, height, width]`` or ``[B, tokens, C]``.
            tokens: as :func:`packed_resolution` tells.

        Raises:
            PipelineError: they have another form.
        """
        if latents.dim() == 4:
            return cls(Domain(*latents.shape[-2:]))
        if latents.dim() == 3 and tokens is not None and latents.shape[1] == tokens.size:
            return cls(Domain(PACKED_SIDE * tokens.height, PACKED_SIDE * tokens.width), tokens)
        expected = "[B, C, height, width]" if tokens is None else f"[B, {tokens.size}, C] for {tokens} tokens"
        raise PipelineError(
            f"the pipeline's latents have shape {tuple(latents.shape)}, and an edit session needs {expected}; it is "
            "for pipelines that make single pictures"
        )

    def maps(self, latents: Tensor) -> Tensor:
        """Latents as ``[B, C, height, width]``; a position is a token where they are packed."""
        if self.tokens is None:
            return latents
        return latents.transpose(1, 2).unflatten(2, (self.tokens.height, self.tokens.width))

    def mask(self, given: MaskLike, latents: Tensor) -> Tensor:
        """A user's mask at the autoencoder's resolution; a token is active as a whole.

        Args:
            given: white where the picture may change: PIL, numpy or torch, ``[H, W]`` or ``[B, H, W]``.
            latents: of the run.

        Returns:
            bool ``[B or 1, height, width]`` on the latents' device.

        Raises:
            MaskError: it is no mask, or holds another number of masks than 1 or B.
        """
        return self.expand(to_latents(given, self.maps(latents)))

    def expand(self, mask: Tensor) -> Tensor:
        """A mask at the resolution of :meth:`maps` at the autoencoder's: bool ``[B, height, width]``."""
        return to_pixels(mask, self.domain.height, self.domain.width)

    def keep(self, latents: Tensor, recorded: Tensor, mask: Tensor) -> Tensor:
        """The latents inside the mask, and the recorded ones outside it.

        Args:
            latents, recorded: of one shape.
            mask: bool ``[B or 1, height, width]`` at the autoencoder's resolution, as made by this class.
        """
        if self.tokens is None:
            inside = mask.unsqueeze(1)
        else:
            inside = mask[:, ::PACKED_SIDE, ::PACKED_SIDE].flatten(1).unsqueeze(2)
        mixed = torch.where(inside, latents, recorded.to(latents.dtype))
        # The next call of the network must see the strides it was compiled for: those of the latents, as a clone has.
        return latents.clone().copy_(mixed)
