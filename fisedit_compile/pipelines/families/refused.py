"""Pipelines of no family: what they make is not single pictures."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from fisedit_compile.errors import PipelineError

_OF_VIDEOS = re.compile(r"(?:\w+_)?(?:num_frames|frames|video|video_length|num_videos_per_prompt)$")
"""Arguments of pipelines that make videos. Their latents may have four dimensions (``TextToVideoZeroPipeline``)."""

_OF_DEPTHS = "VaeImageProcessorLDM3D"
"""The class of image processors that make depth maps beside pictures."""


def check_single_pictures(pipe: Any, arguments: Iterable[str]) -> None:
    """Refuse a pipeline that makes something else than single pictures.

    Args:
        pipe: a diffusers pipeline.
        arguments: the names of its arguments.

    Raises:
        PipelineError: it makes videos, or depth maps beside its pictures.
    """
    name = type(pipe).__name__
    moving = [argument for argument in arguments if _OF_VIDEOS.match(argument) is not None]
    if moving:
        raise PipelineError(
            f"{name} makes videos (it takes {', '.join(moving)}), and an edit session is for pipelines that "
            "make single pictures; call the pipeline itself"
        )
    if type(getattr(pipe, "image_processor", None)).__name__ == _OF_DEPTHS:
        raise PipelineError(
            f"{name} makes depth maps beside its pictures, which an edit session cannot keep together; call "
            "the pipeline itself, or use one that makes pictures only, such as StableDiffusionPipeline"
        )
