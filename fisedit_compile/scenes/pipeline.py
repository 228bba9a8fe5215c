"""Loading of the scenes model that comes with the package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fisedit_compile.errors import MissingPackageError

if TYPE_CHECKING:
    import torch
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

WEIGHTS = Path(__file__).parent / "weights"
"""Folder of the packaged weights, in the ordinary layout of a diffusers pipeline."""


def load_pipeline(dtype: torch.dtype | None = None, weights: Path | None = None) -> StableDiffusionPipeline:
    """Load the scenes model: a text-to-image pipeline of 128 by 128 pixels.  Nothing is downloaded.

    Args:
        dtype: type of the weights and of the computation; ``torch.float32`` if not given.
        weights: folder to load from, if not the packaged one.

    Returns:
        The pipeline, on the processor, with its progress bar off.

    Raises:
        FileNotFoundError: the folder holds no pipeline.
        MissingPackageError: diffusers or transformers is not installed.
    """
    import torch

    try:
        import transformers  # noqa: F401  (diffusers hides that it is missing, and then lacks the pipeline)
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    except ModuleNotFoundError as error:
        raise MissingPackageError(error.name or str(error), "the scenes model") from error

    folder = WEIGHTS if weights is None else weights
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder} holds no pipeline: model_index.json is missing")
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    # The argument that sets the type has changed its name between releases of diffusers, so cast afterwards;
    # and by the plain method, since diffusers' own one warns of layers that need float32, which these models
    # do not have.
    for component in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        torch.nn.Module.to(component, torch.float32 if dtype is None else dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
