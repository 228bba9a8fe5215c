"""Latents that pipelines of diffusers pack to tokens: of which resolution those are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fisedit_compile.errors import PipelineError
from fisedit_compile.runtime import Domain

SIDE = 2
"""Latent cells of a token in each direction, in all pipelines of diffusers that pack them."""


def packed_resolutions(
    pipe: Any, height: int | None, width: int | None, others: Sequence[tuple[int, int]] = ()
) -> tuple[Domain, ...]:
    """The resolutions that the tokens may have to which a pipeline packs its latents.

    It has one of them: what it calls the autoencoder's scale is that of a latent cell for most pipelines (Flux), and
    that of a token for others (Bria); and some take the size of their control picture. The number of tokens tells.

    Args:
        pipe: a diffusers pipeline.
        height, width: of the picture in pixels; None: the pipeline's default.
        others: heights and widths that it may have instead.

    Raises:
        PipelineError: the pipeline does not say how many pixels a latent cell has; or two of the sizes have as many
            tokens.
    """
    scale, default = getattr(pipe, "vae_scale_factor", None), getattr(pipe, "default_sample_size", None)
    if scale is None or (default is None and None in (height, width)):
        raise PipelineError(
            f"{type(pipe).__name__} packs its latents to tokens and has no vae_scale_factor and default_sample_size to "
            "tell their rows and columns; give height and width"
        )
    known: dict[int, tuple[Domain, list[int]]] = {}
    for size in ((height, width), *others):
        pixels = [int(default * scale if side is None else side) for side in size]
        for side in (scale * SIDE, scale):
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
