"""The compiled U-Net of a session, and putting it into the pipeline for the duration of one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch

from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines.attributes import replaced_attribute
from fisedit_compile.pipelines.autoencoder import AutoencoderCall
from fisedit_compile.pipelines.timing import StageClock


class PipelineBinding:
    """Compiles a pipeline's U-Net beside the pipeline, which stays as the user made it between calls.

    Args:
        pipe: a diffusers pipeline.
        options: of the backend; ``runtime`` among them.

    Raises:
        PipelineError: the pipeline has no U-Net, no scheduler or no autoencoder.
    """

    def __init__(self, pipe: Any, options: Mapping[str, Any]) -> None:
        for part in ("unet", "scheduler", "vae"):
            if getattr(pipe, part, None) is None:
                raise PipelineError(
                    f"an edit session needs a diffusers pipeline with a {part}, and {type(pipe).__name__} has none; "
                    "use one with a U-Net, such as StableDiffusionPipeline or StableDiffusionXLPipeline"
                )
        self._pipe = pipe
        self._options = dict(options)
        self._compiled: Any = None
        self._clock: StageClock | None = None

    @property
    def module(self) -> torch.nn.Module:
        """The pipeline's U-Net itself, also when the user has put a compiled one into the pipeline."""
        unet: torch.nn.Module = self._pipe.unet
        return getattr(unet, "_orig_mod", unet)

    @property
    def device(self) -> torch.device:
        """The device of the U-Net's parameters."""
        return next(self.module.parameters()).device

    @contextmanager
    def installed(self, clock: StageClock, autoencoder: AutoencoderCall) -> Iterator[None]:
        """Put the compiled U-Net, a timed text encoding and the session's autoencoder into the pipeline, and take them
        out again.

        Raises:
            PipelineError: the U-Net is offloaded to the host between calls.
        """
        pipe, original = self._pipe, self._pipe.unet
        if getattr(self.module, "_hf_hook", None) is not None:
            raise PipelineError(
                "the pipeline's U-Net is offloaded (its hooks would be tied to the compiled module, and stay so); call "
                "pipe.remove_all_hooks() and pipe.to(device), or use the session's storage and budget to save memory"
            )
        if self._compiled is None or self._compiled._orig_mod is not self.module:
            self._compiled = torch.compile(self.module, backend="fisedit", options=self._options)
            # A hook of the compiled module itself runs outside of the graph, and not in the user's module.
            self._compiled.register_forward_pre_hook(self._before_call)
            clock.lap("setup")
        with ExitStack() as restore:
            if callable(getattr(pipe, "encode_prompt", None)):
                restore.enter_context(replaced_attribute(pipe, "encode_prompt", _timed(pipe.encode_prompt, clock)))
            if getattr(self.module, "_compiled_call_impl", None) is not None:
                # The user called compile() on the U-Net; its calls would never come to the session's compiled one.
                restore.enter_context(replaced_attribute(self.module, "_compiled_call_impl", None))
            restore.enter_context(autoencoder.installed(pipe.vae))
            self._clock = clock
            restore.callback(setattr, pipe, "unet", original)
            pipe.unet = self._compiled
            yield

    def _before_call(self, module: torch.nn.Module, inputs: Any) -> None:
        if self._clock is not None:
            self._clock.begin_loop()


def _timed(function: Callable[..., Any], clock: StageClock) -> Callable[..., Any]:
    """The text encoding of a pipeline, timed."""

    @wraps(function)
    def timed(*positional: Any, **named: Any) -> Any:
        with clock.stage("text"):
            return function(*positional, **named)

    return timed
