"""Whether a pipeline call has classifier-free guidance: a doubled batch, or a second network call in every step.

Both must be in an edit as they were in the recorded run, so a session has to know before anything is computed. Not
every number that is called a guidance scale decides it: distilled networks (Flux) take it as an input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fisedit_compile.private.diffusers import argument_noted_in

_DECIDES = "do_classifier_free_guidance"
_NEGATIVE = ("negative_prompt_embeds", "negative_pooled_prompt_embeds")


@dataclass(frozen=True)
class Guidance:
    """Guidance of one call.

    Attributes:
        on: whether the network computes a second prediction.
        why: the arguments that decide it, in words.
    """

    on: bool
    why: str


class _DuringCall:
    """A pipeline as its properties see it during a call, when its arguments are attributes with an underscore.

    Attributes:
        read: the arguments that were looked at, and their values.
    """

    def __init__(self, pipe: Any, value: Callable[[str], Any], accepts: Callable[[str], bool]) -> None:
        self._outside, self._argument, self._accepts = pipe, value, accepts
        self.read: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        part = getattr(type(self._outside), name, None)
        if isinstance(part, property) and part.fget is not None:
            return part.fget(self)
        noted = argument_noted_in(name)
        if noted is not None and self._accepts(noted):
            self.read[noted] = self._argument(noted)
            return self.read[noted]
        return getattr(self._outside, name)


def guidance_of(pipe: Any, network: Any, value: Callable[[str], Any], accepts: Callable[[str], bool]) -> Guidance:
    """What guidance a call of a pipeline of diffusers has.

    Args:
        pipe: the pipeline.
        network: of it, called at every step.
        value: gives the value of an argument, its default included.
        accepts: whether the pipeline has an argument.
    """
    if accepts("true_cfg_scale"):
        scale = value("true_cfg_scale")
        embeddings = [value(name) for name in _NEGATIVE if accepts(name)]
        negative = value("negative_prompt") is not None or (
            bool(embeddings) and all(given is not None for given in embeddings)
        )
        why = f"true_cfg_scale {scale} and {'a' if negative else 'no'} negative prompt"
        return Guidance(scale is not None and scale > 1 and negative, why)
    scale = value("guidance_scale")
    if isinstance(getattr(type(pipe), _DECIDES, None), property):
        seen = _DuringCall(pipe, value, accepts)
        on = scale is not None and bool(getattr(seen, _DECIDES))
        if seen.read:
            return Guidance(on, " and ".join(f"{name} {given}" for name, given in seen.read.items()))
    else:
        embedded = hasattr(getattr(network, "config", None), "guidance_embeds")
        on = scale is not None and scale > 1 and not embedded
    return Guidance(on, f"guidance_scale {scale}")
