"""What a session does after every network call: follow, record, find the mask, keep the latents outside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Protocol

from torch import Tensor

from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines.arguments import same_value
from fisedit_compile.pipelines.attributes import replaced_attribute
from fisedit_compile.pipelines.compiling import CompiledRun
from fisedit_compile.pipelines.families.prompts import PromptLengths
from fisedit_compile.pipelines.families.schedulers import calls_for_steps, steps_for_calls
from fisedit_compile.pipelines.masks.cells import LatentCells
from fisedit_compile.pipelines.masks.finding import AutomaticMask, MaskFinder
from fisedit_compile.pipelines.masks.pasting import paste_latents
from fisedit_compile.pipelines.network_calls import NetworkCalls
from fisedit_compile.pipelines.probing.memory import CallMemory
from fisedit_compile.pipelines.random_numbers import RandomNumbers
from fisedit_compile.pipelines.report import MaskCost
from fisedit_compile.pipelines.stabilising import AttentionTurns
from fisedit_compile.pipelines.timing import StageClock
from fisedit_compile.pipelines.twin import Cancellation
from fisedit_compile.runtime import Domain


class MaskReceiver(Protocol):
    """The part of a runtime's edit that takes the mask."""

    def set_mask(self, mask: Tensor) -> None:
        """Make all further calls sparse."""

    def align(self, alignment: Any) -> None:
        """Say what further dense calls take from the recording; None: nothing."""


@dataclass
class Trajectory:
    """What a run leaves for edits of it: the latents after each turn of the pipeline's loop, and how it got there.

    Attributes:
        tokens: resolutions that the tokens may have which the latents are packed to; empty: they are maps.
        side: latent cells of a token in each direction.
        calls: of the network.
        prompts: how long they are.
        latents: of one shape each, on the pipeline's device.
        timesteps: the scheduler's, on the host.
        output: with ``output_type="latent"`` what the pipeline returned; None otherwise.
        compiled: in which form the network ran.
        memory: what probes need of the network's calls.
        attention_turns: in how many turns, from the first, the attention maps of the network were kept.
    """

    tokens: tuple[Domain, ...] = ()
    side: int = 1
    calls: NetworkCalls = field(default_factory=NetworkCalls)
    prompts: PromptLengths = field(default_factory=PromptLengths)
    latents: list[Tensor] = field(default_factory=list)
    timesteps: Tensor | None = None
    output: Tensor | None = None
    compiled: CompiledRun = field(default_factory=CompiledRun)
    memory: CallMemory = field(default_factory=CallMemory)
    attention_turns: int = 0

    @property
    def cells(self) -> LatentCells:
        """Where the cells of the latents lie; known after the first turn."""
        return LatentCells.of(self.latents[0], self.tokens, self.side)


class StepFollower:
    """The ``callback_on_step_end`` of a recorded run.  The user's own callback runs first and is obeyed.

    Args:
        callback: the user's callback, or None.
        names: tensors the user's callback is to be given.
        clock: counts the seconds of every call.
        trajectory: empty; it is filled.
        size: height and width that the picture must have in pixels; None: whatever the pipeline makes.
        numbers: that the run draws at random; None: not followed.

    Attributes:
        cancellation: tells whether the user cancelled the run.
        attention: keeps attention maps in some turns; None: in none.
        left_alone: what the user's callback is called in, by the turn.
        finished: whether the pipeline's loop is done.
    """

    def __init__(
        self,
        callback: Callable[..., Any] | None,
        names: Sequence[str],
        clock: StageClock,
        trajectory: Trajectory,
        size: tuple[int, int] | None = None,
        numbers: RandomNumbers | None = None,
    ) -> None:
        self.trajectory = trajectory
        self.cancellation: Cancellation | None = None
        self.attention: AttentionTurns | None = None
        self.left_alone: Callable[[int], AbstractContextManager[None]] = lambda _: nullcontext()
        self.finished = False
        self._numbers = numbers
        self._size = size
        self._returned: dict[str, Any] = {}
        self._callback = callback
        self._names = tuple(names)
        self._clock = clock

    def follow_scheduler(self, scheduler: Any) -> None:
        """Told before the run which scheduler belongs to it alone."""

    @property
    def tensor_names(self) -> list[str]:
        """The ``callback_on_step_end_tensor_inputs`` to give to the pipeline."""
        return list(dict.fromkeys((*self._names, "latents")))

    def __call__(self, pipe: Any, call: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Follow one network call and its scheduler step; the pipeline takes the returned tensors.

        Raises:
            PipelineError: the user's callback returns no dictionary or interrupts the run.
        """
        last = call + 1 >= _turns(pipe)
        self._clock.turn(self.stage, last)
        self._check_cancelled(pipe, call + 1)
        self.trajectory.calls.end_turn()
        self.trajectory.memory.end_turn(_turns(pipe))
        if self._numbers is not None:
            self._numbers.end_turn(last)
        self.check_obeyed(pipe)
        outputs: dict[str, Any] = {}
        if self._callback is not None:
            given = {name: tensors[name] for name in self._names}
            with self.left_alone(call):
                outputs = _check_outputs(self._callback(pipe, call, timestep, given))
            self._check_cancelled(pipe, call + 1, "callback_on_step_end interrupted the run")
        if call == 0:
            self.trajectory.timesteps = pipe.scheduler.timesteps.cpu()
            # Latents of no known form are refused before anything is made of them.
            cells = LatentCells.of(tensors["latents"], self.trajectory.tokens, self.trajectory.side)
            if cells.tokens is not None:
                self.trajectory.calls.check_tokens(pipe, {cells.tokens.size})
            else:
                self.trajectory.calls.expect_map(cells.domain)
                self.trajectory.calls.check_map(pipe)
            if self._size is not None:
                cells.check_size(pipe, *self._size)
        latents = self.after_call(pipe, call, outputs.get("latents", tensors["latents"]))
        outputs["latents"] = latents
        self.trajectory.latents.append(latents.detach().clone())
        if self.attention is not None:
            self.attention.end_turn(pipe, call + 1, _turns(pipe))
            self.trajectory.attention_turns = self.attention.kept
        self._returned = outputs
        self.finished = last
        return outputs

    def with_own_callback(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a pipeline call, with the user's ``callback``, as older pipelines know it, called as the one
        of this follower is."""
        callback = arguments.get("callback")
        if not callable(callback):
            return arguments

        @wraps(callback)
        def called(*positional: Any, **named: Any) -> Any:
            with self.left_alone(len(self.trajectory.latents)):
                return callback(*positional, **named)

        return {**arguments, "callback": called}

    def check_finished(self, pipe: Any) -> None:
        """Check, when the pipeline returned, that it was not cancelled.

        Raises:
            PipelineError: it was.
        """
        self._check_cancelled(pipe, len(self.trajectory.latents))

    def _check_cancelled(self, pipe: Any, turns: int, what: str = "the run was cancelled") -> None:
        asked = getattr(pipe, "interrupt", False) if self.cancellation is None else self.cancellation.asked
        if asked:
            raise PipelineError(
                f"{what} after call {turns} of {_turns(pipe)} (the pipeline's _interrupt was set). A cancelled run is "
                "incomplete and can be neither a base nor an edit of one, so nothing was kept; the history is as before"
            )

    def check_obeyed(self, pipe: Any) -> None:
        """Check that the pipeline took the latents of the turn before; also called behind the last turn.

        Raises:
            PipelineError: it left them.
        """
        if "latents" in self._returned:
            raise PipelineError(
                f"{type(pipe).__name__} ignores the latents that callback_on_step_end returns, and an edit session "
                "needs a pipeline that goes on with them; use the runtime with it instead (record and edit)"
            )

    def take_output(self, pipe: Any, output: Any) -> None:
        """Keep the latents that the pipeline returned, which need not be those of the last turn: some scale or unpack
        them in the end.

        Raises:
            PipelineError: they have another form, in which a mask cannot be laid over them.
        """
        cells = self.trajectory.cells
        if not isinstance(output, Tensor) or not cells.holds(output):
            came = f"latents of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise PipelineError(
                f'{type(pipe).__name__} returned {came} with output_type="latent", and an edit session needs latents '
                f'of {cells.domain} cells; generate with another output_type, such as "pt"'
            )
        self.trajectory.output = self.after_output(output)

    def after_output(self, output: Tensor) -> Tensor:
        """The latents to return."""
        return output

    @property
    def stage(self) -> str:
        """Whether the call that just ended was ``dense`` or ``sparse``."""
        return "dense"

    def after_call(self, pipe: Any, call: int, latents: Tensor) -> Tensor:
        """The latents to go on with."""
        return latents


def _turns(pipe: Any) -> int:
    """How many turns the loop of a pipeline has; those without callbacks do not tell, and take all timesteps."""
    told = getattr(pipe, "num_timesteps", None)
    return len(pipe.scheduler.timesteps) if told is None else int(told)


@contextmanager
def followed_scheduler(pipe: Any, follower: StepFollower) -> Iterator[None]:
    """Call a follower behind every step of the scheduler, for pipelines that have no ``callback_on_step_end``; they go
    on with the latents that it returns."""
    original = pipe.scheduler.step
    turns = 0

    @wraps(original)
    def step(*positional: Any, **named: Any) -> Any:
        nonlocal turns
        result = original(*positional, **named)
        timestep = positional[1] if len(positional) > 1 else named.get("timestep")
        latents = follower(pipe, turns, timestep, {"latents": result[0]}).pop("latents")
        turns += 1
        if isinstance(result, tuple):
            return (latents, *result[1:])
        result.prev_sample = latents
        return result

    with replaced_attribute(pipe.scheduler, "step", step):
        yield


def watch_predictions(scheduler: Any, memory: CallMemory) -> None:
    """Note what a scheduler that belongs to one run alone is given."""
    original = scheduler.step

    @wraps(original)
    def step(*positional: Any, **named: Any) -> Any:
        memory.predicted(positional[0] if positional else named.get("model_output"))
        return original(*positional, **named)

    vars(scheduler)["step"] = step


def _check_outputs(outputs: Any) -> dict[str, Any]:
    """A copy of what the user's callback returned."""
    if not isinstance(outputs, dict):
        raise PipelineError(f"callback_on_step_end must return a dictionary of tensors, got {type(outputs).__name__}")
    return dict(outputs)


class EditFollower(StepFollower):
    """The ``callback_on_step_end`` of an edit.

    Args:
        callback, names, clock: as for :class:`StepFollower`.
        recorded: the trajectory of the picture that is edited.
        mask: bool ``[B or 1, height, width]`` at the latents' resolution, or None to find it.
        settings: how to find it.
        numbers: that the run draws at random.
        pixels: of the picture, that a position of the latents has in each direction.

    Attributes:
        finding: what finding the mask cost; None: it is given, or not found yet.
        dense_turns: how many turns ran densely.
    """

    def __init__(
        self,
        callback: Callable[..., Any] | None,
        names: Sequence[str],
        clock: StageClock,
        recorded: Trajectory,
        mask: Tensor | None,
        settings: AutomaticMask,
        numbers: RandomNumbers | None = None,
        pixels: int = 1,
    ) -> None:
        calls, prompts = NetworkCalls(recorded.calls), PromptLengths(recorded=recorded.prompts)
        own = Trajectory(recorded.tokens, recorded.side, calls, prompts)
        own.compiled = CompiledRun(recorded.compiled)
        super().__init__(callback, names, clock, own, numbers=numbers)
        self.mask = mask
        self.run: MaskReceiver | None = None
        self._recorded = recorded
        self._cells = recorded.cells
        self._sparse = mask is not None and not bool(mask.all())
        self._finder = MaskFinder(settings, pixels) if mask is None else None
        self.finding: MaskCost | None = None
        self._calls_by_step: list[int] = []
        self.dense_turns = 0

    @property
    def stage(self) -> str:
        """Whether the call that just ended was ``dense`` or ``sparse``."""
        return "sparse" if self._sparse else "dense"

    @property
    def sparse_from_start(self) -> bool:
        """Whether the mask is known before the first call, and leaves something out."""
        return self._sparse

    def after_call(self, pipe: Any, call: int, latents: Tensor) -> Tensor:
        """Find the mask when its steps are done; from then on keep the recorded latents outside it.

        Raises:
            PipelineError: the calls are not those of the recorded run.
        """
        if call == 0:
            self._check_run(pipe, latents)
        self.dense_turns += self.stage == "dense"
        if self._finder is not None:
            self._find(self._finder, pipe, call, latents)
        if self.mask is None:
            return latents
        return paste_latents(self._cells, latents, self._recorded.latents[call], self.mask)

    def after_output(self, output: Tensor) -> Tensor:
        """The latents to return: those of the recorded run outside the mask."""
        if self.mask is None or self._recorded.output is None:
            return output
        return paste_latents(self._cells, output, self._recorded.output, self.mask)

    def _check_run(self, pipe: Any, latents: Tensor) -> None:
        recorded = self._recorded
        total = len(recorded.latents)
        if _turns(pipe) != total:
            raise PipelineError(
                f"the loop of the recorded run had {total} turns, that of this one has {_turns(pipe)}; "
                "keep the steps and the scheduler of the recorded run, or call generate first"
            )
        if recorded.latents[0].shape != latents.shape:
            raise PipelineError(
                f"the recorded run had latents of shape {tuple(recorded.latents[0].shape)}, this one has "
                f"{tuple(latents.shape)}; keep the size and the number of prompts, or call generate first"
            )
        if not same_value(recorded.timesteps, self.trajectory.timesteps):
            raise PipelineError(
                "the timesteps differ from those of the recorded run; keep the steps and the scheduler of the "
                "recorded run, or call generate first"
            )

    def _find(self, finder: MaskFinder, pipe: Any, call: int, latents: Tensor) -> None:
        """Add the finished steps to the finder; after the last of them switch to sparse calls."""
        total = len(self._recorded.latents)
        if not self._calls_by_step:
            steps = finder.settings.scaled_steps(steps_for_calls(pipe.scheduler, total))
            self._calls_by_step = [calls_for_steps(pipe.scheduler, step + 1, total) for step in range(steps)]
        if call + 1 in self._calls_by_step:
            finder.add(*map(self._cells.maps, (latents, self._recorded.latents[call])))
        if call + 1 == self._calls_by_step[-1]:
            self._clock.lap("dense")
            self.mask = self._cells.expand(finder.mask())
            self.finding = MaskCost("fisedit", dense_steps=len(self._calls_by_step))
            self._finder = None
            if self.run is not None:
                self.run.align(None)
            if call + 1 < total and not bool(self.mask.all()):
                if self.run is None:
                    raise PipelineError("the edit follower was not given the runtime's edit")
                self.run.set_mask(self.mask)
                self._sparse = True
            self._clock.lap("mask")
