"""The compiled network of a session, and putting it into the pipeline for the duration of one call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch

from fisedit_compile import private
from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines.attributes import replaced_attribute
from fisedit_compile.pipelines.autoencoder import AutoencoderCall
from fisedit_compile.pipelines.compiling import CompiledNetwork
from fisedit_compile.pipelines.guidance import NETWORKS
from fisedit_compile.pipelines.network_calls import TOKENS_ARGUMENT, NetworkCalls
from fisedit_compile.pipelines.steps import StepFollower, followed_scheduler
from fisedit_compile.pipelines.timing import StageClock
from fisedit_compile.runtime import Domain, Relay, Runtime

CONTENT_ARGUMENTS = ("guidance",)
"""What distilled networks call the guidance scale that they take as an input; an edit may change it."""

NETWORK_RELAY = Relay()
"""What networks are compiled with, so that the sessions of a pipeline share its graphs."""


class PipelineBinding:
    """Compiles a pipeline's U-Net or transformer beside the pipeline, which stays as the user made it between calls.

    Args:
        pipe: a diffusers pipeline.
        runtime: of the session.
        options: of the backend, without ``runtime``.

    Raises:
        PipelineError: the pipeline has neither U-Net nor transformer, no scheduler or no autoencoder.
    """

    def __init__(self, pipe: Any, runtime: Runtime, options: Mapping[str, Any]) -> None:
        found = [name for name in NETWORKS if getattr(pipe, name, None) is not None]
        missing = [part for part in ("scheduler", "vae") if getattr(pipe, part, None) is None]
        if missing or not found:
            raise PipelineError(
                f"an edit session needs a diffusers pipeline with a {(missing or [' or a '.join(NETWORKS)])[0]}, and "
                f"{type(pipe).__name__} has none; use one with a U-Net, such as StableDiffusionPipeline or "
                "StableDiffusionXLPipeline, or with a transformer, such as StableDiffusion3Pipeline or FluxPipeline"
            )
        self._pipe = pipe
        self._name = found[0]
        self._runtime = runtime
        self._options = dict(options)
        self._compiled: CompiledNetwork | None = None
        self._tokens: tuple[Domain, ...] = ()
        self._clock: StageClock | None = None
        self._calls: NetworkCalls | None = None

    @property
    def module(self) -> torch.nn.Module:
        """The pipeline's network itself, also when the user has put a compiled one into the pipeline."""
        network: torch.nn.Module = getattr(self._pipe, self._name)
        return getattr(network, "_orig_mod", network)

    @property
    def device(self) -> torch.device:
        """The device of the network's parameters."""
        return next(self.module.parameters()).device

    @contextmanager
    def installed(self, clock: StageClock, autoencoder: AutoencoderCall, follower: StepFollower) -> Iterator[None]:
        """Put the compiled network, a timed text encoding and the session's autoencoder into the pipeline, and take
        them out again.

        Args:
            clock: counts the seconds by stage.
            autoencoder: of this call.
            follower: of the steps. Pipelines with ``callback_on_step_end`` get it by that argument; otherwise it
                follows the scheduler.

        Raises:
            PipelineError: the network is offloaded to the host between calls.
        """
        pipe, original = self._pipe, getattr(self._pipe, self._name)
        tokens = follower.trajectory.tokens
        if getattr(self.module, "_hf_hook", None) is not None:
            raise PipelineError(
                "the pipeline's network is offloaded (its hooks would be tied to the compiled module, and stay so); "
                "call pipe.remove_all_hooks() and pipe.to(device), or save memory by the session's storage and budget"
            )
        if self._compiled is None or self._compiled.module is not self.module or self._tokens != tokens:
            options = {**self._options, "content": list(CONTENT_ARGUMENTS)}
            if tokens:
                options["tokens"] = {TOKENS_ARGUMENT: [(domain.height, domain.width) for domain in tokens]}
            self._compiled = CompiledNetwork(self.module, NETWORK_RELAY, options)
            self._tokens = tokens
            # A hook of the compiled module itself runs outside of the graph, and not in the user's module.
            self._compiled.stand_in.register_forward_pre_hook(self._before_call, with_kwargs=True)
            clock.lap("setup")
        with ExitStack() as restore:
            restore.enter_context(NETWORK_RELAY.using(self._runtime))
            restore.enter_context(self._compiled.following(follower.trajectory.compiled))
            if callable(getattr(pipe, "encode_prompt", None)):
                encode = follower.trajectory.prompts.padding(pipe.encode_prompt)
                restore.enter_context(replaced_attribute(pipe, "encode_prompt", _timed(encode, clock)))
            if getattr(self.module, "_compiled_call_impl", None) is not None:
                # The user called compile() on the network; its calls would never come to the session's compiled one.
                restore.enter_context(replaced_attribute(self.module, "_compiled_call_impl", None))
            restore.enter_context(autoencoder.installed(pipe.vae))
            if "callback_on_step_end" not in inspect.signature(type(pipe).__call__).parameters:
                restore.enter_context(followed_scheduler(pipe, follower))
            self._clock, self._calls = clock, follower.trajectory.calls
            restore.callback(setattr, pipe, self._name, original)
            setattr(pipe, self._name, self._compiled.stand_in)
            yield
            follower.check_obeyed(pipe)

    def _before_call(self, module: torch.nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        private.keep_sizes(positional, named)
        if self._calls is not None:
            self._calls.add(self.module, positional, named)
            if self._tokens:
                self._calls.check_tokens(self._pipe, {domain.size for domain in self._tokens})
        if self._clock is not None:
            self._clock.begin_call()


def _timed(function: Callable[..., Any], clock: StageClock) -> Callable[..., Any]:
    """The text encoding of a pipeline, timed."""

    @wraps(function)
    def timed(*positional: Any, **named: Any) -> Any:
        with clock.stage("text"):
            return function(*positional, **named)

    return timed
