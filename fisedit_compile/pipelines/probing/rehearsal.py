"""What an edit would give its network: the pipeline is called on the recorded predictions, and left after one turn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines.decoding.autoencoder import AutoencoderCall
from fisedit_compile.pipelines.decoding.decoding import DecodeJob
from fisedit_compile.pipelines.history import Entry
from fisedit_compile.pipelines.masks.settings import AutomaticMask
from fisedit_compile.pipelines.probing.memory import KeptTurn
from fisedit_compile.pipelines.random_numbers import RandomNumbers
from fisedit_compile.pipelines.runs import Run, Tools
from fisedit_compile.pipelines.steps import EditFollower
from fisedit_compile.pipelines.timing import StageClock

NAME = "rehearsal"


class _TurnDone(Exception):
    """Leaves a pipeline behind the first turn of its loop."""


class _FirstTurn(EditFollower):
    """Follows the first turn of an edit in which nothing is active, and ends it."""

    def after_call(self, pipe: Any, call: int, latents: Tensor) -> Tensor:
        """Check the turn as that of an edit, and leave.

        Raises:
            PipelineError: the turns are not those of the recorded run.
        """
        super().after_call(pipe, call, latents)
        raise _TurnDone


class Rehearsal(Run):
    """The first turn of an edit with an empty mask: its network calls return what was recorded, and compute nothing.

    Whatever of the edit does not fit the recorded run is refused here, before anything is computed.

    Args:
        tools: of the session.
        given: arguments of the edit.
        base: the picture that is edited.
    """

    def __init__(self, tools: Tools, given: dict[str, Any], base: Entry) -> None:
        domain = base.trajectory.cells.domain
        self._nothing = torch.zeros(1, domain.height, domain.width, dtype=torch.bool)
        clock, numbers = StageClock(tools.binding.device), RandomNumbers(base.numbers)
        mask = self._nothing.to(base.trajectory.latents[0].device)
        follower = _FirstTurn(None, (), clock, base.trajectory, mask, AutomaticMask(), numbers)
        autoencoder = AutoencoderCall(tools.decoder, DecodeJob(NAME), base.encodes, generation=False)
        # The user's callbacks are for the edit itself.
        own = {name: value for name, value in given.items() if name not in ("callback", "callback_steps")}
        super().__init__(tools, NAME, own, clock, follower, autoencoder, numbers)
        self._base = base

    @property
    def text_seconds(self) -> float:
        """Seconds that texts took to encode."""
        return self._clock.seconds()["text"]

    @property
    def cancelled(self) -> bool:
        """Whether the user asked for the end of the edit."""
        return self._steps.cancellation is not None and self._steps.cancellation.asked

    def _prepare(self, pipe: Any) -> None:
        """Show no progress of what is not computed."""
        if callable(getattr(pipe, "set_progress_bar_config", None)):
            pipe.set_progress_bar_config(disable=True)

    def first_turn(self) -> KeptTurn:
        """What the edit gives the network in its first turn, and what the pipeline makes of the recorded predictions.

        Raises:
            PipelineError: the pipeline made no turn; or the edit does not fit the recorded run.
        """
        try:
            with self._tools.runtime.edit(self._base.picture.name, mask=self._nothing):
                self.call(self._base.noise.generators())
        except _TurnDone:
            return self._steps.trajectory.memory.turns[0]
        raise PipelineError(
            f"{type(self._tools.pipe).__name__} goes on after an error in its callback, so what an edit gives its "
            "network cannot be seen beforehand; give a mask, or AutomaticMask(method='fisedit')"
        )
