"""What diffusers keeps of its pipelines and networks."""

from __future__ import annotations

from typing import Any

_INTERRUPT = "_interrupt"
_PROGRESS = frozenset({_INTERRUPT, "_num_timesteps", "_current_timestep"})
"""What pipelines note of a run; all else that begins with an underscore are arguments of it."""


def packs_latents(pipe: Any) -> bool:
    """Whether a pipeline packs its latents to tokens."""
    return callable(getattr(pipe, "_pack_latents", None))


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
