"""Decoding a grown region of a picture densely, when there is no room to record what a sparse decode would read.

The lowest resolution of a diffusers decoder (its first convolution and its middle block with the attention) runs on the
whole latents: it costs a few percent. The blocks above, which cost almost everything, run on boxes around the mask.
Their group norms use the statistics of the recorded dense decode, a few kilobytes, since a box cannot know those of the
picture. A box is wider than what is taken from it by :data:`MARGIN` cells, because its borders see padding instead of
neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from fisedit_compile.pipelines.twin import module_tree

MARGIN = 4
"""Latent cells by which a box is wider, on every side, than what is taken from it."""

LOWEST_SHARE = 0.05
"""Share of a decode's arithmetic at the lowest resolution: 4.4 % for the autoencoder of Stable Diffusion."""

Statistics = Mapping[str, tuple[Tensor, Tensor]]
"""By the name of each group norm above the lowest resolution: mean and inverse deviation, float32 ``[B, groups]``."""

Box = tuple[slice, slice]


def unsupported(decoder: Any) -> str | None:
    """Why a decoder cannot decode regions; None when it can."""
    from diffusers.models.autoencoders.vae import Decoder

    if not isinstance(decoder, Decoder):
        return f"regions are known for diffusers' Decoder only, not for {type(decoder).__name__}"
    if not all(isinstance(getattr(block, "resnets", None), nn.ModuleList) for block in decoder.up_blocks):
        return "regions are known for decoder blocks of residual networks only"
    if any(getattr(block, "attentions", None) for block in decoder.up_blocks):
        return "the decoder has attention above its lowest resolution, which looks at the whole picture"
    last_norm: Any = decoder.conv_norm_out
    if not isinstance(last_norm, nn.GroupNorm):
        return "regions are known for decoders with group norms only"
    return None


def _norms(decoder: Any) -> dict[str, nn.GroupNorm]:
    """The group norms above the lowest resolution, by name."""
    return {
        name: module
        for name, module in decoder.named_modules()
        if isinstance(module, nn.GroupNorm) and not name.startswith("mid_block")
    }


def noting_decoder(decoder: nn.Module) -> tuple[nn.Module, Statistics]:
    """A decoder that does what another one does, whose tensors it shares, and the statistics of the group norms that it
    notes when it decodes."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str, module: nn.GroupNorm, inputs: tuple[Any, ...]) -> None:
        grouped = inputs[0].float().flatten(2).unflatten(1, (module.num_groups, -1)).flatten(2)
        variance, mean = torch.var_mean(grouped, dim=2, correction=0)
        found[name] = mean, torch.rsqrt(variance + module.eps)

    noting: nn.Module = module_tree(decoder)
    for name, module in _norms(noting).items():
        module.register_forward_pre_hook(lambda module, inputs, name=name: note(name, module, inputs))
    return noting, found


def _normalise(module: nn.GroupNorm, statistics: tuple[Tensor, Tensor], values: Tensor) -> Tensor:
    """A group norm with given statistics; ``values`` is ``[B, C, height, width]``."""
    mean, inverse = (part.repeat_interleave(values.shape[1] // module.num_groups, dim=1) for part in statistics)
    scale = inverse if module.weight is None else inverse * module.weight.float()
    shift = -mean * scale if module.bias is None else module.bias.float() - mean * scale
    return values * scale[:, :, None, None].to(values.dtype) + shift[:, :, None, None].to(values.dtype)


class RegionDecoder(nn.Module):
    """Stands in for a decoder in one call and computes only the boxes around a mask.

    Args:
        decoder: one that :func:`unsupported` does not refuse.
        statistics: of the recorded decode.
        mask: bool ``[B or 1, height, width]`` at the latents' resolution, not empty.
        background: ``[B, channels, picture height, picture width]``, what the decoder is taken to give elsewhere.
    """

    def __init__(self, decoder: Any, statistics: Statistics, mask: Tensor, background: Tensor) -> None:
        super().__init__()
        self.decoder = decoder
        # Group norms of others who decode at the same time are not touched.
        self._blocks = module_tree(decoder)
        for name, norm in _norms(self._blocks).items():
            norm.forward = partial(_normalise, norm, statistics[name])  # type: ignore[method-assign]
        self._mask, self._background = mask, background

    def forward(self, latents: Tensor, latent_embeds: None = None) -> Tensor:
        """Decode ``[B, C, height, width]``; cells outside the mask are the background's."""
        decoder, blocks, mask = self.decoder, self._blocks, self._mask.any(dim=0)
        lowest = decoder.mid_block(decoder.conv_in(latents), None)
        result = self._background.to(lowest.dtype).clone()
        scale = result.shape[-1] // latents.shape[-1]
        for rows, columns in boxes(mask):
            values = lowest[:, :, rows, columns]
            for block in blocks.up_blocks:
                values = block(values, None)
            values = blocks.conv_out(blocks.conv_act(blocks.conv_norm_out(values)))
            inside = mask[rows, columns].repeat_interleave(scale, 0).repeat_interleave(scale, 1)
            target = result[:, :, _scaled(rows, scale), _scaled(columns, scale)]
            target.copy_(torch.where(inside, values, target))
        return result


def _scaled(cells: slice, scale: int) -> slice:
    return slice(cells.start * scale, cells.stop * scale)


def boxes(mask: Tensor) -> list[Box]:
    """Boxes with margins that together cover the mask ``[height, width]``: one for each connected part, or a single one
    where that is less to compute."""
    active = mask.cpu().numpy()
    parts, _ = ndimage.label(active, structure=np.ones((3, 3)))
    single = [_with_margin(found, active.shape) for found in ndimage.find_objects(active.astype(np.int32))]
    several = [_with_margin(found, active.shape) for found in ndimage.find_objects(parts)]
    return min((single, several), key=_area)


def box_share(mask: Tensor) -> float:
    """How much of the picture the boxes of a mask ``[height, width]`` compute; above 1 when they overlap much."""
    return _area(boxes(mask)) / mask.numel()


def _area(found: list[Box]) -> int:
    return sum((rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns in found)


def _with_margin(box: Box, shape: tuple[int, ...]) -> Box:
    rows, columns = (
        slice(max(0, side.start - MARGIN), min(extent, side.stop + MARGIN))
        for side, extent in zip(box, shape, strict=True)
    )
    return rows, columns
