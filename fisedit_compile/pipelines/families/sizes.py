"""Sizes of pictures: where the user gives none, and of what they should be multiples."""

from __future__ import annotations

from typing import Any


def default_size_of(pipe: Any, network: Any) -> tuple[int, int] | None:
    """Height and width in pixels that pipelines of diffusers take by default; None: they do not tell.

    Args:
        pipe: the pipeline; it may have a ``default_sample_size`` in latent cells.
        network: of it; its configuration may have a ``sample_size``: one for both sides, or height and width.
    """
    scale = getattr(pipe, "vae_scale_factor", None)
    own, configured = getattr(pipe, "default_sample_size", None), getattr(network, "config", None)
    sample = getattr(configured, "sample_size", None) if own is None else own
    sides = [sample, sample] if isinstance(sample, int) else sample
    if scale is None or not isinstance(sides, (list, tuple)) or len(sides) != 2:
        return None
    return sides[0] * scale, sides[1] * scale


def whole_cells_of(network: Any) -> int:
    """Of how many latent cells the sides of a picture should be multiples: a U-Net halves them from one resolution to
    the next, a transformer cuts them into patches.

    Args:
        network: a network of diffusers; one without a configuration takes any number.
    """
    configured = getattr(network, "config", None)
    blocks, patch = (getattr(configured, name, None) for name in ("down_block_types", "patch_size"))
    if isinstance(blocks, (list, tuple)) and blocks:
        return int(2 ** (len(blocks) - 1))
    return patch if isinstance(patch, int) else 1
