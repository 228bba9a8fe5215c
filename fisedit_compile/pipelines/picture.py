"""What a generation or an edit returns."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines.report import Report

PROMPT_SHOWN = 60
"""Most characters of a prompt in the line that describes a picture."""


def as_pixels(images: Any) -> Tensor:
    """Pixels ``[B, 3, height, width]`` from what a pipeline returned: a tensor, an array ``[B, height, width, 3]`` or
    PIL pictures, whatever was asked for.

    Raises:
        PipelineError: it is none of them.
    """
    if isinstance(images, Tensor) and images.dim() == 4:
        return images
    if isinstance(images, list) and images and all(isinstance(image, Image.Image) for image in images):
        images = VaeImageProcessor.pil_to_numpy([image.convert("RGB") for image in images])
    if isinstance(images, np.ndarray) and images.ndim == 4:
        return VaeImageProcessor.numpy_to_pt(images)
    shape = f" of shape {tuple(images.shape)}" if isinstance(images, (Tensor, np.ndarray)) else ""
    raise PipelineError(
        'expected a tensor or an array of pictures, as diffusers\' pipelines return with output_type="pt", got '
        f"{type(images).__name__}{shape}: an edit session is for pipelines that make single pictures; call the "
        "pipeline itself"
    )


@dataclass(frozen=True, eq=False, repr=False)
class Picture:
    """A generated or an edited picture.

    Attributes:
        name: of its base in the session's runtime.
        prompt: what it was made from; None when embeddings were given.
        pixels: ``[B, 3, height, width]``, values from 0 to 1; None with ``output_type="latent"``.
        latents: ``[B, C, latent height, latent width]`` after the last step.
        output: with ``output_type="latent"`` what the pipeline returned: some bring latents into another form or scale
            in the end (Flux.2 Klein, Sana Sprint). None otherwise.
        mask: of an edit: bool ``[B or 1, latent height, latent width]``, true where the picture may differ from the one
            that was edited; None for a generation.
        pixel_mask: the same for pixels ``[B or 1, height, width]``; None also with ``output_type="latent"``.
        report: seconds by stage, density, speed-up, cache bytes, seam error.
        flagged: for each picture, whether the pipeline's safety checker blackened it; None without a checker.
        output_type: form of ``images``: ``pil``, ``np``, ``pt`` or ``latent``.
    """

    name: str
    prompt: str | list[str] | None
    pixels: Tensor | None
    latents: Tensor
    output: Tensor | None
    mask: Tensor | None
    pixel_mask: Tensor | None
    report: Report
    flagged: tuple[bool, ...] | None
    output_type: str

    @property
    def images(self) -> Any:
        """All pictures as the pipeline returns them: a list of PIL images, an array ``[B, height, width, 3]``, or a
        tensor (pixels or latents)."""
        if self.pixels is None:
            return self.output
        if self.output_type == "pt":
            return self.pixels
        array = VaeImageProcessor.pt_to_numpy(self.pixels)
        return array if self.output_type == "np" else VaeImageProcessor.numpy_to_pil(array)

    @property
    def image(self) -> Any:
        """The first of :attr:`images`."""
        return self.images[0]

    def __repr__(self) -> str:
        """One line: what it is, its size, what it was made from, and how much of it was edited."""
        size = self.latents.shape if self.pixels is None else self.pixels.shape
        what = "latents" if self.pixels is None else "pixels"
        parts = [repr(self.name), f"{what} {'x'.join(map(str, size))}"]
        if self.prompt is not None:
            prompt = repr(self.prompt)
            parts.append(f"prompt {prompt if len(prompt) <= PROMPT_SHOWN else prompt[:PROMPT_SHOWN] + '...'}")
        if self.mask is not None:
            parts.append(f"mask {float(self.mask.float().mean()):.1%}")
        return f"Picture({', '.join(parts)})"

    def _repr_png_(self) -> bytes | None:
        """The pictures of the batch side by side, as a notebook shows them; None for latents."""
        if self.pixels is None:
            return None
        array = VaeImageProcessor.pt_to_numpy(self.pixels.float())
        content = io.BytesIO()
        VaeImageProcessor.numpy_to_pil(np.concatenate(list(array), axis=1))[0].save(content, format="PNG")
        return content.getvalue()

    @property
    def mask_image(self) -> Image.Image | None:
        """The mask of the first picture in black and white, as large as the picture; None for a generation."""
        mask = self.pixel_mask if self.pixel_mask is not None else self.mask
        if mask is None:
            return None
        return Image.fromarray(mask[0].cpu().numpy().astype(np.uint8) * 255)
