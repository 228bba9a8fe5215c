"""What diffusers keeps of its pipelines and networks."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from fisedit_compile.errors import PipelineError

_INTERRUPT = "_interrupt"
_PROGRESS = frozenset({_INTERRUPT, "_num_timesteps", "_current_timestep"})
"""What pipelines note of a run; all else that begins with an underscore are arguments of it."""


def packs_latents(pipe: Any) -> bool:
    """Whether a pipeline packs its latents to tokens."""
    return callable(getattr(pipe, "_pack_latents", None))


def packed_latents(pipe: Any, latents: Tensor) -> Tensor:
    """Latents ``[B, C, height, width]``, packed to tokens ``[B, tokens, C]`` as a pipeline packs them.

    Raises:
        PipelineError: its packing takes other arguments than that of Flux and Qwen-Image.
    """
    pack = pipe._pack_latents
    if len(inspect.signature(pack).parameters) != 5:
        raise PipelineError(
            f"{type(pipe).__name__} packs its latents in a way of its own, so a photo cannot be opened with it; use "
            "FluxPipeline or QwenImagePipeline, or describe its family (docs/adding-a-pipeline.md)"
        )
    packed: Tensor = pack(latents, *latents.shape)
    return packed


def is_cancelled(pipe: Any) -> bool:
    """Whether the user asked a pipeline for the end of its run."""
    return bool(vars(pipe).get(_INTERRUPT) or getattr(pipe, "interrupt", False))


def forget_cancelling(pipe: Any) -> None:
    """Take such a request back, as each call of a pipeline does."""
    if vars(pipe).get(_INTERRUPT):
        setattr(pipe, _INTERRUPT, False)


def noted_arguments(pipe: Any) -> dict[str, Any]:
    """What a pipeline notes as arguments of its last run, by the names of its attributes."""
    return {name: value for name, value in vars(pipe).items() if name.startswith("_") and name not in _PROGRESS}


def argument_noted_in(attribute: str) -> str | None:
    """The argument that pipelines note in an attribute (``guidance_scale`` in ``_guidance_scale``); None: none."""
    return attribute[1:] if attribute.startswith("_") else None


def cache_settings(network: Any) -> Any:
    """The settings of the cache that is on in a network; None: there is none."""
    return getattr(network, "_cache_config", None)


def hook_names(module: Any) -> tuple[str, ...]:
    """The names of diffusers' hooks of a module, the innermost first."""
    registry = getattr(module, "_diffusers_hook", None)
    return tuple(getattr(registry, "hooks", ()))
