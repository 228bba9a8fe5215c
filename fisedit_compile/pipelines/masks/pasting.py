"""Pasting what lies outside of a mask from the picture that is edited: latents after every step, pixels in the end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fisedit_compile.pipelines.masks.blending import blended
from fisedit_compile.pipelines.masks.cells import LatentCells, grow_mask
from fisedit_compile.pipelines.masks.placing import Placing
from fisedit_compile.pipelines.report import SeamError
from fisedit_compile.pipelines.safety import Flagged, unflagged, with_flagged


def paste_latents(cells: LatentCells, latents: Tensor, recorded: Tensor, mask: Tensor) -> Tensor:
    """The latents inside the mask, and the recorded ones outside it.

    Args:
        cells: of the latents.
        latents, recorded: of one shape, which the cells hold.
        mask: bool ``[B or 1, height, width]`` at the autoencoder's resolution, as the cells make it.
    """
    if cells.tokens is not None and latents.shape[-2:] != (cells.domain.height, cells.domain.width):
        mask = mask[:, :: cells.side, :: cells.side]
    if latents.dim() == 3:
        inside = mask.flatten(1).unsqueeze(2)
    else:
        inside = mask.unflatten(0, (-1, *[1] * (latents.dim() - 3)))
    mixed = torch.where(inside, latents, recorded.to(latents.dtype))
    # The next call of the network must see the strides it was compiled for: those of the latents, as a clone has.
    return latents.clone().copy_(mixed)


def paste_pixels(
    edited: Tensor, base: Tensor, mask: Tensor, measured: Tensor | None = None
) -> tuple[Tensor, tuple[float, float]]:
    """Take the pixels outside the mask from the base picture.

    Args:
        edited, base: pictures ``[B, 3, height, width]``, values from 0 to 1.
        mask: bool ``[B or 1, height, width]``, true where the edited picture counts.
        measured: bool, of the mask's form: where differences outside the mask are looked at; None: everywhere.

    Returns:
        The picture, and the greatest and the mean absolute difference outside the mask before pasting (0 when there is
        nothing outside).
    """
    inside = mask.unsqueeze(1).expand_as(edited)
    looked_at = ~mask if measured is None else measured & ~mask
    apart = (edited.float() - base.float()).abs()[looked_at.unsqueeze(1).expand_as(edited)]
    error = (float(apart.max()), float(apart.mean())) if apart.numel() else (0.0, 0.0)
    return torch.where(inside, edited, base), error


@dataclass(frozen=True)
class Pasted:
    """An edited picture with what lies outside the mask from the one before.

    Attributes:
        pixels: ``[B, 3, height, width]``, values from 0 to 1.
        mask: bool ``[B or 1, height, width]``, the pixels that may differ.
        seam: how far the pixels next to the mask were apart; None: nothing was decoded there.
        seam_left: the steps across the mask's edge that are left when the edit is mixed in; None: it was not.
    """

    pixels: Tensor
    mask: Tensor
    seam: SeamError | None
    seam_left: SeamError | None = None


def box_around(mask: Tensor) -> tuple[slice, slice]:
    """The rows and columns of the smallest box that holds a mask ``[B, height, width]`` and one pixel around it."""
    anywhere = mask.any(dim=0)
    sides = []
    for dim in (1, 0):
        found = anywhere.any(dim=dim).nonzero().flatten()
        sides.append(slice(max(0, int(found[0]) - 1), int(found[-1]) + 2) if len(found) else slice(0, 0))
    return sides[0], sides[1]


def paste_picture(
    pixels: Tensor,
    base: Tensor,
    mask: Tensor,
    halo: int,
    decoded_outside: bool,
    flagged: Flagged,
    placing: Placing | None = None,
    region: Tensor | None = None,
    seam: int = 0,
) -> Pasted:
    """Paste the pixels outside the mask into an edited picture, but for samples that a safety checker blackened.

    Args:
        pixels: ``[B, 3, height, width]``, values from 0 to 1, as decoded.
        base: of the picture that was edited, in the form of ``pixels`` and at the size of the result.
        mask: bool ``[B or 1, latent height, latent width]``.
        halo: latent cells around the mask that were decoded as well.
        decoded_outside: whether more was decoded than the mask and its halo.
        flagged: for each sample, whether it was blackened; None: no checker.
        placing: of the base on what was decoded; None: they have one size.
        region: bool ``[B or 1, height, width]``, the pixels of the base that may differ; None: those of the mask.
        seam: over how many pixels of the base the edit is mixed with it, inside.
    """
    placing = Placing.same(base) if placing is None else placing
    pixels = placing.to_picture(pixels).to(base.dtype)
    pixel_mask = placing.region(mask) if region is None else region
    near = placing.region(grow_mask(mask, max(1, halo)))
    edited, before, inside, around = unflagged((pixels, base, pixel_mask, near), flagged)
    pasted, seam_left = before.clone(), None
    # A photo may be many times as large as what is edited in it: only that part is looked at.
    box = box_around(inside | around)
    edited, before, inside, around = (part[..., box[0], box[1]] for part in (edited, before, inside, around))
    part, errors = paste_pixels(edited, before, inside, around)
    if seam and bool(inside.any()):
        part, seam_left = blended(edited, before, inside, seam)
    pasted[..., box[0], box[1]] = part
    # Without a halo nothing was decoded outside the mask, so there is nothing to compare.
    compared = len(pasted) and (halo or decoded_outside)
    whole = with_flagged(pasted, pixels, flagged)
    return Pasted(whole, pixel_mask, SeamError(*errors) if compared else None, seam_left)
