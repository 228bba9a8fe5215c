"""Seconds by stage of one pipeline call."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

STAGES = ("text", "prepare", "setup", "dense", "mask", "sparse", "decode")
"""Every stage, in the order of a report; see :class:`fisedit_compile.pipelines.report.Report` for what each holds."""


class StageClock:
    """Splits the time of a pipeline call into stages.

    A lap goes from the end of the previous lap to now.  The first turn of the loop in a phase also traces, compiles or
    plans; :meth:`seconds` moves what it took beyond the average of the phase's others to the stage ``setup``.

    Args:
        device: the pipeline's device; on CUDA the clock waits for the device where it must, never at every call.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stages = dict.fromkeys(STAGES, 0.0)
        self._turns = {"dense": 0, "sparse": 0}
        self._calls = {"dense": 0, "sparse": 0}
        self._begun = 0
        self._first = {"dense": 0.0, "sparse": 0.0}
        self._known_setup = dict.fromkeys(STAGES, 0.0)
        self._started = self._now(synchronise=True)
        self._last = self._started
        self._looping = False

    def _now(self, synchronise: bool) -> float:
        if synchronise and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def lap(self, stage: str, synchronise: bool = True) -> None:
        """Count the time since the previous lap to ``stage``."""
        now = self._now(synchronise)
        self._stages[stage] += now - self._last
        self._last = now

    def begin_call(self) -> None:
        """Called before every network call; the first one ends the preparation."""
        self._begun += 1
        if not self._looping:
            self._looping = True
            self.lap("prepare")

    def turn(self, stage: str, last: bool) -> None:
        """A turn of the pipeline's loop is done: a network call, or two with guidance, and a scheduler step.

        Args:
            stage: ``dense`` or ``sparse``.
            last: whether another stage follows, so that the device must have finished this one.
        """
        first = self._turns[stage] == 0
        before = self._stages[stage]
        self.lap(stage, synchronise=first or last)
        self._turns[stage] += 1
        self._calls[stage] += self._begun
        self._begun = 0
        if first:
            self._first[stage] = self._stages[stage] - before

    @contextmanager
    def stage(self, stage: str) -> Iterator[None]:
        """Count the time inside the context to ``stage``, and what came before it to ``prepare``."""
        self.lap("prepare")
        try:
            yield
        finally:
            self.lap(stage)

    def set_up(self, stage: str, seconds: float) -> None:
        """Say that so many seconds of a stage were set-up."""
        self._known_setup[stage] += seconds

    def move(self, source: str, stage: str, seconds: float) -> None:
        """Say that so many seconds that were counted to ``source`` belong to another stage."""
        self._stages[source] -= seconds
        self._stages[stage] += seconds

    def calls(self, stage: str) -> int:
        """Number of network calls counted in ``dense`` or ``sparse``."""
        return self._calls[stage]

    def turns(self) -> int:
        """Number of turns of the pipeline's loop."""
        return sum(self._turns.values())

    def seconds(self) -> dict[str, float]:
        """Seconds by stage, with the set-up split off, and ``total``."""
        stages = dict(self._stages)
        for stage, turns in self._turns.items():
            if turns > 1:
                others = (stages[stage] - self._first[stage]) / (turns - 1)
                extra = max(0.0, self._first[stage] - others)
                stages[stage] -= extra
                stages["setup"] += extra
        for stage, known in self._known_setup.items():
            moved = min(known, stages[stage])
            stages[stage] -= moved
            stages["setup"] += moved
        stages["total"] = sum(stages.values())
        return stages
