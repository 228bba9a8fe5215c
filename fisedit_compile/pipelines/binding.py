"""The compiled network of a session, and the pipeline that is called with it in place of the user's."""

from __future__ import annotations

import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines.backend_options import BackendOptions
from fisedit_compile.pipelines.compiling import CompiledNetwork
from fisedit_compile.pipelines.decoding.autoencoder import AutoencoderCall
from fisedit_compile.pipelines.encoders import EncoderMemory
from fisedit_compile.pipelines.families import Family
from fisedit_compile.pipelines.random_numbers import PROMPTS, RandomNumbers
from fisedit_compile.pipelines.steps import StepFollower, followed_scheduler, watch_predictions
from fisedit_compile.pipelines.timing import StageClock
from fisedit_compile.pipelines.twin import Cancellation, check_untouched, twin_of, uncompiled, unmarked
from fisedit_compile.private.accelerate import is_offloaded
from fisedit_compile.private.diffusers import noted_arguments
from fisedit_compile.private.dynamo import keep_sizes
from fisedit_compile.private.modules import compiled_call, original_module
from fisedit_compile.runtime import Domain, Relay, Runtime

NETWORK_RELAY = Relay()
"""What networks are compiled with, so that the sessions of a pipeline share its graphs."""


@dataclass
class _Call:
    """A pipeline call in progress, and what gives the thread's random operators back behind the network."""

    clock: StageClock
    follower: StepFollower
    numbers: RandomNumbers
    resume: ExitStack = field(default_factory=ExitStack)


class PipelineBinding:
    """Compiles a pipeline's U-Net or transformer beside the pipeline, which stays as the user made it.

    Args:
        pipe: a diffusers pipeline.
        family: of the pipeline.
        runtime: of the session.
        options: of the backend.

    Raises:
        PipelineError: the pipeline has no scheduler or no autoencoder.
    """

    def __init__(self, pipe: Any, family: Family, runtime: Runtime, options: BackendOptions) -> None:
        wanted = [part for part in ("scheduler", family.autoencoder) if part is not None]
        missing = [part for part in wanted if getattr(pipe, part, None) is None]
        if missing:
            raise PipelineError(
                f"an edit session needs a diffusers pipeline with a {missing[0]}, and {type(pipe).__name__} has none; "
                "use one with a U-Net, such as StableDiffusionPipeline or StableDiffusionXLPipeline, or with a "
                "transformer, such as StableDiffusion3Pipeline or FluxPipeline"
            )
        self._pipe, self._family = pipe, family
        self._runtime = runtime
        self._options = options
        self._encoders = EncoderMemory()
        self._compiled: CompiledNetwork | None = None
        self._compiled_from: tuple[torch.nn.Module, Any] | None = None
        self._tokens: tuple[Domain, ...] = ()
        self._local = threading.local()

    @property
    def module(self) -> torch.nn.Module:
        """The pipeline's network itself, also when the user has put a compiled one into the pipeline."""
        network: torch.nn.Module = original_module(self._family.network_of(self._pipe))
        return network

    @property
    def device(self) -> torch.device:
        """The device of the network's parameters."""
        return next(self.module.parameters()).device

    @contextmanager
    def calling(
        self, clock: StageClock, autoencoder: AutoencoderCall, follower: StepFollower, numbers: RandomNumbers
    ) -> Iterator[Any]:
        """The pipeline to call: a twin of the user's with the compiled network, a timed text encoding, encoders that
        remember, and the session's autoencoder. The user's own stays as it is, for whoever calls it meanwhile.

        Args:
            clock: counts the seconds by stage.
            autoencoder: of this call.
            follower: of the steps. Pipelines with ``callback_on_step_end`` get it by that argument; otherwise it
                follows the scheduler.
            numbers: that this thread draws at random.

        Raises:
            PipelineError: the network is offloaded to the host between calls; at the end, the run was cancelled.
        """
        pipe = self._pipe
        if is_offloaded(self.module):
            raise PipelineError(
                "the pipeline's network is offloaded (its hooks would be tied to the compiled module, and stay so); "
                "call pipe.remove_all_hooks() and pipe.to(device), or save memory by the session's storage and budget"
            )
        compiled = self._compile(follower.trajectory.tokens, clock)
        twin = twin_of(pipe)
        follower.cancellation = Cancellation(pipe, twin)
        family = self._family
        ours = {family.network: compiled.stand_in}
        if family.autoencoder is not None:
            ours[family.autoencoder] = autoencoder.view(getattr(pipe, family.autoencoder), follower, numbers)
        ours |= self._encoders.views(pipe, numbers)
        encode, prepare = (getattr(twin, name, None) for name in (family.encode_prompt, family.prepare_latents))
        if callable(encode):
            padded = follower.trajectory.prompts.padding(encode, family.prompt_limit_of(pipe))
            ours[family.encode_prompt] = _timed(padded, clock, numbers)
        if callable(prepare):
            ours[family.prepare_latents] = _noted(prepare, follower)
        own = {name: vars(pipe)[name] for name in ours if name in vars(pipe)}

        def take_back() -> None:
            for name in ours:
                vars(twin).pop(name, None)
            vars(twin).update(own)

        @contextmanager
        def left_alone(turn: int) -> Iterator[None]:
            """What the user's callback finds: a pipeline with the user's own parts, whatever it does with them."""
            before = noted_arguments(pipe)
            take_back()
            with numbers.callback(turn):
                yield
            check_untouched(pipe, twin, before)
            changed = [name for name, part in own.items() if vars(twin)[name] is not part]
            if changed:
                raise PipelineError(
                    f"the callback exchanged the pipeline's {' and '.join(changed)}, with which a session cannot go "
                    "on; make two sessions, or exchange it before generating"
                )
            vars(twin).update(ours)

        follower.left_alone = left_alone
        with ExitStack() as restore:
            restore.enter_context(NETWORK_RELAY.using(self._runtime))
            restore.enter_context(compiled.following(follower.trajectory.compiled))
            if twin.scheduler is not pipe.scheduler:
                watch_predictions(twin.scheduler, follower.trajectory.memory)
                numbers.follow_scheduler(twin.scheduler)
                follower.follow_scheduler(twin.scheduler)
            if "callback_on_step_end" not in inspect.signature(type(pipe).__call__).parameters:
                restore.enter_context(followed_scheduler(twin, follower))
            self._local.call = _Call(clock, follower, numbers)
            restore.callback(setattr, self._local, "call", None)
            # A callback may keep the twin: then it is a pipeline as any other.
            restore.callback(take_back)
            vars(twin).update(ours)
            restore.enter_context(numbers.running())
            yield twin
            follower.check_finished(twin)
            follower.check_obeyed(twin)
            follower.trajectory.memory.close()

    def called_alone(self, arguments: Mapping[str, Any]) -> Any:
        """What the pipeline's network itself makes of arguments, by name; neither recorded nor edited.

        Args:
            arguments: as they were bound; a group of further positional or named ones has the name of its parameter.
        """
        signature = inspect.signature(self.module.forward)
        bound = inspect.BoundArguments(signature, OrderedDict(arguments))
        with torch.no_grad():
            return uncompiled(self.module)(*bound.args, **bound.kwargs)

    def _compile(self, tokens: tuple[Domain, ...], clock: StageClock) -> CompiledNetwork:
        """The compiled network; made anew where it is another one than before, or takes other tokens."""
        made_from = (self.module, compiled_call(self.module))
        if self._compiled is None or self._compiled_from != made_from or self._tokens != tokens:
            options = self._options.of_network(self._family, tokens)
            with unmarked(self.module):
                self._compiled = CompiledNetwork(uncompiled(self.module), NETWORK_RELAY, options)
            self._compiled_from, self._tokens = made_from, tokens
            # Hooks of the compiled module itself run outside of the graph, and not in the user's module.
            self._compiled.stand_in.register_forward_pre_hook(self._before_call, with_kwargs=True)
            self._compiled.stand_in.register_forward_hook(self._after_call, always_call=True)
            clock.lap("setup")
        return self._compiled

    def _before_call(self, module: torch.nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        keep_sizes(positional, named)
        call: _Call | None = getattr(self._local, "call", None)
        if call is None:
            return
        calls, memory = call.follower.trajectory.calls, call.follower.trajectory.memory
        call.numbers.begin_loop()
        arguments = inspect.signature(self.module.forward).bind_partial(*positional, **named).arguments
        calls.add(arguments)
        calls.check_map(self._pipe)
        if self._tokens:
            calls.check_tokens(self._pipe, {domain.size for domain in self._tokens})
        with call.numbers.paused():
            memory.begin_call(arguments)
        call.clock.begin_call()
        call.resume.enter_context(call.numbers.paused())

    def _after_call(self, module: torch.nn.Module, given: Any, output: Any) -> None:
        call: _Call | None = getattr(self._local, "call", None)
        if call is not None:
            call.follower.trajectory.memory.end_call(output)
            call.resume.close()


def _noted(prepare: Callable[..., Any], follower: StepFollower) -> Callable[..., Any]:
    """The preparation of a pipeline's latents, which are noted: of what size the network has to be called."""

    @wraps(prepare)
    def noted(*positional: Any, **named: Any) -> Any:
        result = prepare(*positional, **named)
        latents = result[0] if isinstance(result, tuple) and result else result
        if isinstance(latents, Tensor) and latents.dim() == 4:
            follower.trajectory.calls.expect_map(Domain(*latents.shape[-2:]))
        return result

    return noted


def _timed(function: Callable[..., Any], clock: StageClock, numbers: RandomNumbers) -> Callable[..., Any]:
    """The text encoding of a pipeline, timed."""

    @wraps(function)
    def timed(*positional: Any, **named: Any) -> Any:
        with clock.stage("text"), numbers.section(PROMPTS):
            return function(*positional, **named)

    return timed
