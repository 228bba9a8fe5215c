"""What a session does after every network call: follow, record, find the mask, keep the latents outside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines.arguments import same_value
from fisedit_compile.pipelines.latents import LatentCells
from fisedit_compile.pipelines.masking import AutomaticMask, MaskFinder
from fisedit_compile.pipelines.schedulers import calls_for_steps, steps_for_calls
from fisedit_compile.pipelines.timing import StageClock
from fisedit_compile.runtime import Domain


class MaskReceiver(Protocol):
    """The part of a runtime's edit that takes the mask."""

    def set_mask(self, mask: Tensor) -> None:
        """Make all further calls sparse."""


@dataclass
class Trajectory:
    """The latents after each network call of a run, and the scheduler's timesteps.

    Attributes:
        latents: of one shape each, on the pipeline's device.
        cells: where their cells lie.
        timesteps: the scheduler's, on the host.
    """

    latents: list[Tensor] = field(default_factory=list)
    cells: LatentCells = LatentCells(Domain(1, 1))
    timesteps: Tensor | None = None


class StepFollower:
    """The ``callback_on_step_end`` of a recorded run.  The user's own callback runs first and is obeyed.

    Args:
        callback: the user's callback, or None.
        names: tensors the user's callback is to be given.
        clock: counts the seconds of every call.
        tokens: resolution of the tokens that the pipeline packs its latents to; None: it does not.
    """

    def __init__(
        self, callback: Callable[..., Any] | None, names: Sequence[str], clock: StageClock, tokens: Domain | None
    ) -> None:
        self.tokens = tokens
        self.trajectory = Trajectory()
        self._callback = callback
        self._names = tuple(names)
        self._clock = clock

    @property
    def tensor_names(self) -> list[str]:
        """The ``callback_on_step_end_tensor_inputs`` to give to the pipeline."""
        return list(dict.fromkeys((*self._names, "latents")))

    def __call__(self, pipe: Any, call: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Follow one network call and its scheduler step; the pipeline takes the returned tensors.

        Raises:
            PipelineError: the user's callback returns no dictionary or interrupts the run.
        """
        self._clock.call(self.stage, last=call + 1 == pipe.num_timesteps)
        outputs: dict[str, Any] = {}
        if self._callback is not None:
            given = {name: tensors[name] for name in self._names}
            outputs = _check_outputs(pipe, call, self._callback(pipe, call, timestep, given))
        if call == 0:
            self.trajectory.timesteps = pipe.scheduler.timesteps.cpu()
            self.trajectory.cells = LatentCells.of(tensors["latents"], self.tokens)
        latents = self.after_call(pipe, call, outputs.get("latents", tensors["latents"]))
        outputs["latents"] = latents
        self.trajectory.latents.append(latents.detach().clone())
        return outputs

    @property
    def stage(self) -> str:
        """Whether the call that just ended was ``dense`` or ``sparse``."""
        return "dense"

    def after_call(self, pipe: Any, call: int, latents: Tensor) -> Tensor:
        """The latents to go on with."""
        return latents


def _check_outputs(pipe: Any, call: int, outputs: Any) -> dict[str, Any]:
    """A copy of what the user's callback returned."""
    if not isinstance(outputs, dict):
        raise PipelineError(f"callback_on_step_end must return a dictionary of tensors, got {type(outputs).__name__}")
    if getattr(pipe, "interrupt", False):
        raise PipelineError(
            f"callback_on_step_end interrupted the run after call {call + 1} of {pipe.num_timesteps}; an "
            "incomplete run can be neither a base nor an edit of one, so nothing was kept"
        )
    return dict(outputs)


class EditFollower(StepFollower):
    """The ``callback_on_step_end`` of an edit.

    Args:
        callback, names, clock: as for :class:`StepFollower`.
        recorded: the trajectory of the picture that is edited.
        mask: bool ``[B or 1, height, width]`` at the latents' resolution, or None to find it.
        settings: how to find it.
    """

    def __init__(
        self,
        callback: Callable[..., Any] | None,
        names: Sequence[str],
        clock: StageClock,
        recorded: Trajectory,
        mask: Tensor | None,
        settings: AutomaticMask,
    ) -> None:
        super().__init__(callback, names, clock, recorded.cells.tokens)
        self.mask = mask
        self.run: MaskReceiver | None = None
        self._recorded = recorded
        self._sparse = mask is not None and not bool(mask.all())
        self._finder = MaskFinder(settings) if mask is None else None
        self._calls_by_step: list[int] = []

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
        if self._finder is not None:
            self._find(self._finder, pipe, call, latents)
        if self.mask is None:
            return latents
        return self._recorded.cells.keep(latents, self._recorded.latents[call], self.mask)

    def _check_run(self, pipe: Any, latents: Tensor) -> None:
        recorded = self._recorded
        total = len(recorded.latents)
        if pipe.num_timesteps != total:
            raise PipelineError(
                f"the recorded run made {total} network calls, this one makes {pipe.num_timesteps}; "
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
            finder.add(*map(self._recorded.cells.maps, (latents, self._recorded.latents[call])))
        if call + 1 == self._calls_by_step[-1]:
            self._clock.lap("dense")
            self.mask = self._recorded.cells.expand(finder.mask())
            self._finder = None
            if call + 1 < total and not bool(self.mask.all()):
                if self.run is None:
                    raise PipelineError("the edit follower was not given the runtime's edit")
                self.run.set_mask(self.mask)
                self._sparse = True
            self._clock.lap("mask")
