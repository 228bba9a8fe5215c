"""What Dynamo calls in place of a graph: the dense graph, or inside record and edit its executable."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fisedit_compile.executing.executable import Dense, Executable
from fisedit_compile.runtime import PhaseSource, ReachCheck
from fisedit_compile.tracing.calls import on_calls


class CompiledGraph:
    """What Dynamo calls in place of a graph. Outside record and edit it is the dense graph, with autograd.

    Its program is made by the first call inside of one: tracing and the passes take seconds on a large network, and a
    network that is only run, or a graph that only a warm-up reaches, never pays for them.
    """

    def __init__(self, dense: Dense, runtime: PhaseSource, build: Callable[[], Executable]) -> None:
        """Keep what is needed to build the executable later.

        Args:
            dense: the graph as Dynamo made it.
            runtime: says whether a call is recorded or edited.
            build: makes the executable; called once.
        """
        self.dense = dense
        self._runtime = runtime
        self._check = ReachCheck(runtime)
        self._build = build
        self._lock = threading.Lock()
        self._executable: Executable | None = None

    @property
    def executable(self) -> Executable:
        """What runs inside record and edit, made at its first use."""
        if self._executable is None:
            with self._lock:
                if self._executable is None:
                    self._executable = self._build()
        return self._executable

    def __call__(self, *arguments: Any) -> Sequence[Tensor]:
        phase = self._runtime.phase()
        if phase is None:
            return self.dense(*arguments)
        # Not only while the graph is compiled: what else was compiled with equal options shares it.
        on_calls(self._check)
        return self.executable(phase, *arguments)
