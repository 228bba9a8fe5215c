"""Strokes: an edit that starts, inside its mask, from what was painted over the picture and some noise.

Source: SDEdit (arXiv 2108.01073), with which SIGE (arXiv 2211.02048) edits samples of unconditional models. All turns
of the loop run. Calls before the start are answered from the recording, by an empty mask; at the start the latents
inside the mask become those of the painted picture with the noise of the call; from there on the edit is as any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines.levels import NoiseLevels, like
from fisedit_compile.pipelines.masks.pasting import paste_latents
from fisedit_compile.pipelines.masks.settings import AutomaticMask
from fisedit_compile.pipelines.random_numbers import RandomNumbers
from fisedit_compile.pipelines.steps import EditFollower, Trajectory
from fisedit_compile.pipelines.timing import StageClock


@dataclass(frozen=True)
class Strokes:
    """What was painted, as a run starts from it.

    Attributes:
        mask: bool ``[1, height, width]`` at the latents' resolution.
        start: the first turn of the loop that computes anything, from 1.
        clean: latents of the painted picture, in float32.
        noise: of their shape.
    """

    mask: Tensor
    start: int
    clean: Tensor
    noise: Tensor


class StrokeFollower(EditFollower):
    """The ``callback_on_step_end`` of an edit by strokes.

    Args:
        callback, names, clock, recorded, settings, numbers: as for :class:`EditFollower`.
        strokes: what was painted; its mask is that of the edit.
    """

    def __init__(
        self,
        callback: Callable[..., Any] | None,
        names: Sequence[str],
        clock: StageClock,
        recorded: Trajectory,
        strokes: Strokes,
        settings: AutomaticMask,
        numbers: RandomNumbers | None = None,
    ) -> None:
        super().__init__(callback, names, clock, recorded, torch.zeros_like(strokes.mask), settings, numbers)
        self._strokes = strokes
        self._levels: NoiseLevels | None = None

    def follow_scheduler(self, scheduler: Any) -> None:
        """Learn the noise levels when the pipeline sets its timesteps."""

        def keep(levels: NoiseLevels) -> None:
            self._levels = levels

        NoiseLevels.follow(scheduler, keep)

    def after_call(self, pipe: Any, call: int, latents: Tensor) -> Tensor:
        """The recorded latents outside the mask; inside, at the start, those of the strokes.

        Raises:
            PipelineError: the calls are not those of the recorded run, or its noise cannot be told.
        """
        latents = super().after_call(pipe, call, latents)
        strokes = self._strokes
        if call + 1 != strokes.start:
            return latents
        if self._levels is None or self.run is None:
            raise PipelineError(
                f"{type(pipe).__name__} sets its timesteps in a way that a session cannot follow, so strokes cannot "
                "start in it; edit with a mask and a prompt"
            )
        self.mask = strokes.mask
        self.run.set_mask(strokes.mask)
        self._levels.restart(pipe.scheduler, strokes.start)
        painted = self._levels.before(strokes.start, strokes.clean, strokes.noise)
        return paste_latents(self._cells, like(latents, painted), latents, strokes.mask)
