"""One compiled network for several runtimes.

PyTorch's compiler keeps the graphs of a function by backend and options, up to a limit, for as long as the function
lives. Were each runtime an option of its own, each would trace the network anew, and the ninth would find no room.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fisedit_compile.errors import FisEditError
from fisedit_compile.runtime.spec import Site

if TYPE_CHECKING:
    from fisedit_compile.runtime.phases import EditPhase, RecordPhase


class PhaseSource(ABC):
    """What a compiled network asks, at each call, whether it is recorded or edited."""

    @abstractmethod
    def phase(self) -> RecordPhase | EditPhase | None:
        """What the calling thread is doing: None outside record and edit."""

    @abstractmethod
    def bytes_needed(self, sites: Iterable[Site]) -> int:
        """Bytes one recorded call with these sites takes."""

    def __deepcopy__(self, memo: dict[int, object]) -> PhaseSource:
        """Itself: the copy of a compiled network asks whom the network was compiled with."""
        return self


class Relay(PhaseSource):
    """Asks the runtime that the calling thread uses; outside ``using`` networks run densely."""

    def __init__(self) -> None:
        self._local = threading.local()

    @contextmanager
    def using(self, source: PhaseSource) -> Iterator[None]:
        """Ask ``source`` inside, in this thread. Uses may be nested; the innermost counts."""
        before = getattr(self._local, "source", None)
        self._local.source = source
        try:
            yield
        finally:
            self._local.source = before

    def phase(self) -> RecordPhase | EditPhase | None:
        """What the runtime in use says."""
        source: PhaseSource | None = getattr(self._local, "source", None)
        return None if source is None else source.phase()

    def bytes_needed(self, sites: Iterable[Site]) -> int:
        """What the runtime in use says.

        Raises:
            FisEditError: none is.
        """
        source: PhaseSource | None = getattr(self._local, "source", None)
        if source is None:
            raise FisEditError("no runtime is in use; enter using(runtime) around record and edit")
        return source.bytes_needed(sites)
