"""Photos opened with pipelines of every family: their own normalisation, packing, shift and guidance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines import EditSession
from fisedit_compile.pipelines.families import family_of
from support import transformer_pipelines as transformers
from support.tiny_pipelines import tiny_pipeline

STEPS = 3
HEIGHT, WIDTH = 67, 45
"""Of the photo, which no model makes."""


def encoded(kind: str, vae: Any, pixels: Tensor) -> Tensor:
    """Latents as the papers' code has them: ``[B, C, height, width]``."""
    with torch.no_grad():
        if kind == "qwen-image":
            mean = vae.encode(2 * pixels.unsqueeze(2) - 1).latent_dist.mean[:, :, 0]
            centre, spread = (torch.tensor(one).view(1, -1, 1, 1) for one in (MEAN, SPREAD))
            return (mean - centre) / spread
        mean = vae.encode(2 * pixels - 1).latent_dist.mean
    return (mean - (vae.config.shift_factor or 0)) * vae.config.scaling_factor


MEAN, SPREAD = [0.1, -0.2, 0.3, 0.0], [0.5, 1.5, 2.0, 1.0]


def packed(latents: Tensor) -> Tensor:
    """Tokens of 2x2 cells, row by row, channel by channel."""
    rows, columns = latents.shape[2] // 2, latents.shape[3] // 2
    tokens = [
        latents[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(1)
        for row in range(rows)
        for column in range(columns)
    ]
    return torch.stack(tokens, dim=1)


def pipeline(kind: str) -> tuple[Any, dict[str, Any], dict[str, Any], tuple[int, int]]:
    """A pipeline, the prompt of the photo, that of the edit, and the size at which the model sees the photo."""
    if kind == "xl":
        return tiny_pipeline("xl"), {"prompt": "a red ball"}, {"prompt": "a blue box"}, (24, 16)
    pipe = transformers.transformer_pipeline(kind)
    if kind == "qwen-image":
        pipe.vae.register_to_config(latents_mean=MEAN, latents_std=SPREAD)
    else:
        pipe.vae.register_to_config(scaling_factor=0.3611)
    before, after = (transformers.prompt_arguments(kind, seed) for seed in (1, 2))
    return pipe, before, after, (transformers.HEIGHT, transformers.WIDTH)


@pytest.mark.parametrize("kind", ["xl", "sd3", "flux", "qwen-image"])
def test_photos_with_every_family(kind: str) -> None:
    pipe, before, after, (height, width) = pipeline(kind)
    session = EditSession(pipe)
    photo = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    arguments = {"num_inference_steps": STEPS, "height": height, "width": width, **before}
    base = session.open(photo, generator=torch.Generator().manual_seed(5), **arguments)
    calls = STEPS * (2 if kind == "qwen-image" else 1)
    assert base.report.dense_calls == calls and np.array_equal(np.asarray(base.image), photo)

    pixels = torch.from_numpy(photo).permute(2, 0, 1)[None].float() / 255
    small = torch.nn.functional.interpolate(pixels, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
    clean = encoded(kind, pipe.vae, small)
    clean = packed(clean) if kind in ("flux", "qwen-image") else clean
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(5))
    entry = session._history.last
    levels = [entry.arguments["latents"], *entry.trajectory.latents]
    torch.testing.assert_close(levels[-1], clean, atol=1e-4, rtol=1e-4)
    if kind != "xl":
        # Straight lines from the noise to the photo, which begin with noise alone.
        times = {"sd3": [1.0, 0.5005, 0.001], "flux": [1.0, 2 / 3, 1 / 3], "qwen-image": [1.0, 2 / 3, 1 / 3]}[kind]
        for time, latents in zip(times, levels, strict=False):
            torch.testing.assert_close(latents, time * noise + (1 - time) * clean, atol=1e-3, rtol=1e-3)

    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[20:50, 5:30] = True
    edited = session.edit(mask=mask, **after)
    shown = np.asarray(edited.image)
    assert edited.report.sparse_calls == calls and np.array_equal(shown[~mask], photo[~mask])
    assert (shown[mask] != photo[mask]).mean() > 0.3
    everything = session.edit(mask=np.ones_like(mask), keep=False, **after)
    begun = {**entry.arguments, **after, "output_type": "pt"}
    expected = torch.nn.functional.interpolate(pipe(**begun).images, (HEIGHT, WIDTH), mode="bicubic", antialias=True)
    # The second edit starts from the first one's picture, but from the photo's noise: its mask leaves nothing of it.
    torch.testing.assert_close(everything.pixels, expected.clamp(0, 1), atol=2e-3, rtol=0)


def test_a_pipeline_without_a_scale_is_refused() -> None:
    pipe = transformers.transformer_pipeline("sd3")
    pipe.vae_scale_factor = None
    with pytest.raises(PipelineError, match="vae_scale_factor"):
        EditSession(pipe).open(np.zeros((56, 40, 3), dtype=np.uint8), **transformers.prompt_arguments("sd3", 1))


def test_half_precision_encodes_as_the_pipelines_do_and_leaves_the_autoencoder() -> None:
    pipe = tiny_pipeline()
    pipe.vae.register_to_config(force_upcast=True)
    pixels = torch.rand(1, 3, 16, 24)
    expected = family_of(pipe).encode(pipe, pixels).latents
    pipe.vae.half()
    # The weights were rounded, the arithmetic is not.
    encoded_again = family_of(pipe).encode(pipe, pixels)
    assert encoded_again.raw.dtype == torch.float32 and next(pipe.vae.parameters()).dtype == torch.float16
    torch.testing.assert_close(encoded_again.latents, expected, atol=1e-2, rtol=1e-2)


def test_unknown_packings_are_refused() -> None:
    pipe = transformers.transformer_pipeline("flux")
    pipe._pack_latents = lambda latents: latents
    with pytest.raises(PipelineError, match="packs its latents in a way of its own"):
        family_of(pipe).encode(pipe, torch.zeros(1, 3, 56, 40))
