"""Latents of a given picture, as the pipelines of a family hand them to their callbacks: encoded, normalised, packed.

The pipeline itself only knows the way back: what it gives its autoencoder in the end. A session compares that with what
came from the encoder, so a normalisation that is not the pipeline's is an error and never a wrong picture.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.errors import PipelineError
from fisedit_compile.private.diffusers import packed_latents


@dataclass(frozen=True)
class Encoded:
    """A picture as latents.

    Attributes:
        latents: as the pipeline's callbacks have them: normalised, and packed where the pipeline packs them.
        raw: as they came from the encoder, which is what the decoder must be given; None: there is no autoencoder.
    """

    latents: Tensor
    raw: Tensor | None


def encode_map(pipe: Any, pixels: Tensor) -> Encoded:
    """Latents ``[B, C, height, width]``, shifted and scaled as the autoencoder's configuration says.

    Args:
        pipe: a pipeline with an autoencoder ``vae``.
        pixels: ``[B, 3, height, width]``, values from 0 to 1.

    Raises:
        PipelineError: the autoencoder has no encoder, or one that is not known.
    """
    raw = _mode(pipe.vae, pixels)
    return Encoded(_normalised(pipe.vae.config, raw), raw)


def encode_tokens(pipe: Any, pixels: Tensor) -> Encoded:
    """As :func:`encode_map`, packed to tokens ``[B, tokens, C]`` by the pipeline itself.

    Raises:
        PipelineError: also if the pipeline packs in a way that is not known.
    """
    encoded = encode_map(pipe, pixels)
    return Encoded(packed_latents(pipe, encoded.latents), encoded.raw)


def encode_frame(pipe: Any, pixels: Tensor) -> Encoded:
    """Tokens ``[B, tokens, C]`` of the only frame of a video, for autoencoders of videos (Qwen-Image).

    Raises:
        PipelineError: as :func:`encode_tokens`.
    """
    raw = _mode(pipe.vae, pixels.unsqueeze(2))
    normalised = _normalised(pipe.vae.config, raw)
    return Encoded(packed_latents(pipe, normalised[:, :, 0]), raw)


def encode_pixels(_: Any, pixels: Tensor) -> Encoded:
    """Pixels from -1 to 1, for pipelines that have no autoencoder."""
    return Encoded(2 * pixels - 1, None)


def _mode(vae: Any, pixels: Tensor) -> Tensor:
    """What an encoder is most certain of, of pixels from 0 to 1: nothing is drawn at random."""
    if not callable(getattr(vae, "encode", None)):
        raise PipelineError(
            f"{type(vae).__name__} has no encoder, which a photo needs; give the pipeline an autoencoder with both"
        )
    parameter = next(vae.parameters())
    if parameter.dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
        # As the pipelines do; but they change the autoencoder in place, which may be in use elsewhere.
        vae = copy.deepcopy(vae).float()
        parameter = next(vae.parameters())
    output = vae.encode((2 * pixels - 1).to(parameter.dtype))
    distribution = getattr(output, "latent_dist", None)
    found = (getattr(output, name, None) for name in ("latents", "latent"))
    raw = distribution.mode() if distribution is not None else next((one for one in found if one is not None), None)
    if not isinstance(raw, Tensor):
        raise PipelineError(
            f"{type(vae).__name__} encodes to {type(output).__name__}, of which a session knows no latents; describe "
            "the pipeline's family with an encode of its own (docs/adding-a-pipeline.md)"
        )
    return raw


def _normalised(config: Any, raw: Tensor) -> Tensor:
    """Latents ``[B, C, ...]`` as the network knows them, computed in float32."""
    mean, deviation = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    scale = getattr(config, "scaling_factor", None)
    values = raw.float() - (getattr(config, "shift_factor", None) or 0.0)
    if mean is not None and deviation is not None:
        shape = (1, -1, *[1] * (raw.dim() - 2))
        centre, spread = (torch.tensor(one, device=raw.device).view(shape) for one in (mean, deviation))
        values = (values - centre) / spread
    return values if scale is None else values * scale
