"""Time several ways of doing the same calls so that none of them has an advantage.

All variants run in one process, round after round, and each round starts with another variant: a machine that slows
down or speeds up meanwhile does so for all. Within a round a variant goes through different calls, because repeating
one call would find its recorded tensors still in the processor's caches, which no edit of a picture does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch


def _no_context() -> AbstractContextManager[object]:
    return nullcontext()


@dataclass(frozen=True)
class Variant:
    """One way of doing the calls.

    Attributes:
        name: unique within a measurement.
        call: does the call of that number, from 0.
        context: entered around all calls of a round; a fresh one each time.
    """

    name: str
    call: Callable[[int], object]
    context: Callable[[], AbstractContextManager[object]] = _no_context


@dataclass
class Timing:
    """Seconds of every call of one variant, and of entering and leaving its context, round by round."""

    calls: list[float] = field(default_factory=list)
    contexts: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median seconds of a call."""
        return statistics.median(self.calls)

    @property
    def spread(self) -> tuple[float, float]:
        """The fastest and the slowest call, in seconds."""
        return min(self.calls), max(self.calls)

    @property
    def context(self) -> float:
        """Median seconds of entering and leaving the context once."""
        return statistics.median(self.contexts)


def synchronise(device: torch.device) -> None:
    """Wait for what was queued on an accelerator; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one execution, queued work included."""
    synchronise(device)
    started = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - started


def measure(
    variants: Sequence[Variant],
    calls: int,
    repeats: int,
    device: torch.device,
    progress: Callable[[str], object] = lambda name: None,
) -> dict[str, Timing]:
    """Time all variants, interleaved.

    Args:
        variants: each is assumed to be warm.
        calls: how many different calls a round of a variant makes.
        repeats: rounds.
        device: of the calls.
        progress: told the name of a variant before each of its rounds.

    Returns:
        ``calls * repeats`` samples for each variant, by its name.
    """
    timings = {variant.name: Timing() for variant in variants}
    for repeat in range(repeats):
        first = repeat % len(variants)
        for variant in (*variants[first:], *variants[:first]):
            progress(variant.name)
            timing = timings[variant.name]
            spent = 0.0
            synchronise(device)
            started = time.perf_counter()
            with variant.context():
                for number in range(calls):
                    seconds = timed(lambda: variant.call(number), device)  # noqa: B023  (called at once)
                    timing.calls.append(seconds)
                    spent += seconds
            synchronise(device)
            timing.contexts.append(time.perf_counter() - started - spent)
    return timings
