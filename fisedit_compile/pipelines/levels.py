"""The noise that latents have before each network call of a run, by the scheduler's own formula.

A network call is told a timestep, and expects latents with the noise of that timestep: whatever a scheduler does
between two calls, also within a step of several. So the level of a call is that of the timestep at the same place of
the scheduler's list.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines.twin import independent_copy

_STEP = "step"
"""What a run wraps in its scheduler."""


def check_levels(scheduler: Any) -> None:
    """Refuse a scheduler of which the noise of a call cannot be told.

    Raises:
        PipelineError: it has no ``add_noise`` or ``scale_noise``, or cannot be copied.
    """
    name = type(scheduler).__name__
    if _formula(scheduler) is None:
        raise PipelineError(
            f"{name} has neither add_noise nor scale_noise, by which noise is added to a picture; use a scheduler "
            "with one, such as DDIMScheduler"
        )
    if independent_copy(scheduler) is None:
        raise PipelineError(f"{name} holds functions or locks and cannot be copied; give the pipeline a plain one")


class NoiseLevels:
    """The noise levels of one run.

    Args:
        scheduler: behind ``set_timesteps`` and before its first step; a copy of it is kept.
    """

    def __init__(self, scheduler: Any) -> None:
        wrapped = {name: vars(scheduler).pop(name) for name in (_STEP,) if name in vars(scheduler)}
        try:
            self._scheduler = independent_copy(scheduler)
        finally:
            vars(scheduler).update(wrapped)
        if self._scheduler is None:
            raise PipelineError(f"{type(scheduler).__name__} cannot be copied; give the pipeline a plain scheduler")
        self.timesteps: Tensor = self._scheduler.timesteps

    @staticmethod
    def follow(scheduler: Any, then: Callable[[NoiseLevels], None]) -> None:
        """Make the levels when a scheduler that belongs to one run is told its timesteps.

        Args:
            scheduler: its ``set_timesteps`` is wrapped until it is called.
            then: is given the levels.
        """
        original = scheduler.set_timesteps

        @wraps(original)
        def set_timesteps(*positional: Any, **named: Any) -> Any:
            vars(scheduler).pop("set_timesteps", None)
            result = original(*positional, **named)
            then(NoiseLevels(scheduler))
            return result

        vars(scheduler)["set_timesteps"] = set_timesteps

    @property
    def calls(self) -> int:
        """How many turns of the loop have a level."""
        return len(self.timesteps)

    @property
    def initial_scale(self) -> Any:
        """What pipelines with this scheduler multiply the latents with that they are given."""
        return getattr(self._scheduler, "init_noise_sigma", 1.0)

    def before(self, call: int, clean: Tensor, noise: Tensor) -> Tensor:
        """Latents before a turn of the loop.

        Args:
            call: of the turns, from 0.
            clean: latents without noise.
            noise: of their shape, with a deviation of 1.
        """
        scheduler: Any = self._scheduler
        timestep = self.timesteps[call : call + 1]
        # By its place where that can be told: rounded timesteps may occur twice, with different noise.
        if callable(getattr(scheduler, "set_begin_index", None)):
            scheduler.set_begin_index(call)
        if hasattr(scheduler, "scale_noise"):
            noisy: Tensor = scheduler.scale_noise(clean, timestep, noise)
        else:
            noisy = scheduler.add_noise(clean, noise, timestep)
        return noisy

    def network_input(self, latents: Tensor) -> Tensor:
        """What the first call of the network is given of these latents."""
        scheduler: Any = copy.deepcopy(self._scheduler)
        if not callable(getattr(scheduler, "scale_model_input", None)):
            return latents
        if callable(getattr(scheduler, "set_begin_index", None)):
            scheduler.set_begin_index(0)
        scaled: Tensor = scheduler.scale_model_input(latents, self.timesteps[0])
        return scaled

    def restart(self, scheduler: Any, call: int) -> None:
        """Bring a scheduler to the state in which a run that begins with this turn has it: without what it remembers of
        earlier steps. Those that cannot begin in the middle stay as they are.

        Args:
            scheduler: of the class of the one that the levels were made from.
            call: a turn with which a step begins.
        """
        if not callable(getattr(scheduler, "set_begin_index", None)):
            return
        vars(scheduler).update(vars(copy.deepcopy(self._scheduler)))
        scheduler.set_begin_index(call)


def _formula(scheduler: Any) -> Any:
    found = (getattr(scheduler, name, None) for name in ("scale_noise", "add_noise"))
    return next((formula for formula in found if callable(formula)), None)


def like(latents: Tensor, values: Tensor) -> Tensor:
    """Values in the type and with the strides of latents, which the next call of the network was compiled for."""
    return torch.empty_like(latents).copy_(values.to(latents.device))
