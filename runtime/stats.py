"""What a runtime has done so far, for people and for reports."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

PHASES = ("record", "edit", "dense")


def format_bytes(count: int) -> str:
    """``count`` bytes for people: ``1.5 GiB``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_count(count: float) -> str:
    """``count`` things for people: ``1.5 G``; as it is below a thousand."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(count) >= size:
            return f"{count / size:.4g}{unit}"
    return f"{count:.0f}"


@dataclass
class Stats:
    """Counters of a runtime since it was made, or since ``Runtime.reset_stats``.

    Attributes:
        calls: graph calls by phase: ``record``; ``edit`` (masked: sparse, or as a whole if it cannot be traced);
            ``dense`` (inside an edit: before its mask is known, with a mask of everything, or of a graph without
            spatial inputs). Calls outside record and edit are not counted.
        density: for every resolution of the last mask (``"64x64"``), the fraction of active positions, 0 to 1.
        bytes_stored: bytes all bases hold now; a tensor that several bases share counts once.
        bytes_loaded: bytes of the recorded tensors that edit calls were given.
        seconds: host seconds by phase; ``plan``, for index plans, is a part of ``edit``. Work on CUDA goes on after
            the host's part.
        ways: how operators that can be computed in several ways were computed, and how often: in sparse calls
            ``"convolution: rows"``, ``tiles``, ``compiled tiles``, ``dense``, or on a GPU the kernel's block sizes, and
            there ``"edit graph: replayed"`` or ``launched one by one``; in recorded and dense calls
            ``"convolution of a map: direct"`` or ``tiles``, and ``"product of a map: plain"``, ``packed`` or
            ``compiled``; in all of them ``"attention: plain"`` or ``compiled``. ``"dense call: stabilised"``: a
            dense call of an edit took the attention to shared words from the recording.
    """

    calls: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    density: dict[str, float] = field(default_factory=dict)
    bytes_stored: int = 0
    bytes_loaded: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys((*PHASES, "plan"), 0.0))
    ways: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain dictionaries and numbers."""
        return asdict(self)

    def __repr__(self) -> str:
        calls = ", ".join(f"{phase} {count}" for phase, count in self.calls.items())
        density = ", ".join(f"{domain} {100 * part:.1f} %" for domain, part in self.density.items()) or "no mask yet"
        seconds = ", ".join(f"{phase} {spent:.2f}" for phase, spent in self.seconds.items())
        ways = ", ".join(f"{way} {count}" for way, count in sorted(self.ways.items())) or "none to choose from"
        return (
            f"Stats(\n  calls: {calls}\n  density: {density}\n"
            f"  bytes: stored {format_bytes(self.bytes_stored)}, loaded {format_bytes(self.bytes_loaded)}\n"
            f"  seconds: {seconds}\n  ways: {ways}\n)"
        )


class StatsCounter:
    """A ``Stats`` that several threads may add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stats = Stats()

    def add_call(self, phase: str, seconds: float, bytes_loaded: int = 0) -> None:
        """Count one call of ``phase`` (``record``, ``edit`` or ``dense``)."""
        with self._lock:
            self._stats.calls[phase] += 1
            self._stats.seconds[phase] += seconds
            self._stats.bytes_loaded += bytes_loaded

    def add_plan(self, seconds: float) -> None:
        """Count the seconds spent on building an index plan."""
        with self._lock:
            self._stats.seconds["plan"] += seconds

    def add_ways(self, ways: Mapping[str, int]) -> None:
        """Count ways in which operators were computed."""
        with self._lock:
            for way, count in ways.items():
                self._stats.ways[way] = self._stats.ways.get(way, 0) + count

    def set_density(self, density: dict[str, float]) -> None:
        """Remember the densities of the mask in use."""
        with self._lock:
            self._stats.density = dict(density)

    def snapshot(self, bytes_stored: int) -> Stats:
        """A copy of the counters as they are now."""
        with self._lock:
            taken = copy.deepcopy(self._stats)
        taken.bytes_stored = bytes_stored
        return taken

    def reset(self) -> None:
        """Start again from zero."""
        with self._lock:
            self._stats = Stats()
