"""The order in which variants are timed, and what is counted as what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fisedit_compile.bench.timing import Timing, Variant, measure


def test_variants_are_interleaved_and_take_turns_at_being_first() -> None:
    log: list[str] = []

    @contextmanager
    def context() -> Iterator[None]:
        log.append("enter")
        yield
        log.append("leave")

    variants = [
        Variant("a", lambda number: log.append(f"a{number}")),
        Variant("b", lambda number: log.append(f"b{number}"), context),
    ]
    told: list[str] = []
    timings = measure(variants, calls=2, repeats=3, device=torch.device("cpu"), progress=told.append)
    first, second = ["a0", "a1"], ["enter", "b0", "b1", "leave"]
    assert log == [*first, *second, *second, *first, *first, *second]
    assert told == ["a", "b", "b", "a", "a", "b"]
    assert {name: len(timing.calls) for name, timing in timings.items()} == {"a": 6, "b": 6}
    assert {name: len(timing.contexts) for name, timing in timings.items()} == {"a": 3, "b": 3}
    assert all(seconds >= 0 for timing in timings.values() for seconds in (*timing.calls, *timing.contexts))


def test_a_timing_is_told_by_its_median() -> None:
    timing = Timing([3.0, 1.0, 2.0, 50.0, 2.5], [0.5, 0.1, 0.2])
    assert timing.median == 2.5
    assert timing.spread == (1.0, 50.0)
    assert timing.context == 0.2
