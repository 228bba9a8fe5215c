"""A runtime whose recordings give way to another's."""

from __future__ import annotations

import pytest

from fisedit_compile.errors import BudgetError, UnknownBaseError
from fisedit_compile.runtime import Runtime
from support.fake_network import FakeNetwork, inputs, run


def record(runtime: Runtime, name: str, calls: int = 1) -> None:
    network = FakeNetwork(runtime)
    with runtime.record(name):
        run(network, inputs(calls))


def test_both_count_towards_one_budget_and_one_gives_way() -> None:
    trial = Runtime()
    record(trial, "one")
    size = trial.stats.bytes_stored
    assert trial.bytes_of("one") == size
    runtime = Runtime(budget=2 * size)
    other = runtime.expendable()
    record(runtime, "needed")
    record(other, "first")
    assert runtime.stats.bytes_stored == other.stats.bytes_stored == 2 * size
    with pytest.raises(BudgetError):
        record(other, "second")
    assert other.bases == ("first",), "what can be done without drops nothing for its own kind"
    record(runtime, "more")
    assert other.bases == () and runtime.bases == ("needed", "more")
    with pytest.raises(BudgetError):
        record(runtime, "too much")
    assert runtime.stats.bytes_stored == 2 * size


def test_contexts_of_the_two_may_be_nested() -> None:
    runtime = Runtime()
    other = runtime.expendable()
    network, inner = FakeNetwork(runtime), FakeNetwork(other)
    with runtime.record("outer"):
        run(network, inputs(1))
        with other.record("inner"):
            run(inner, inputs(1))
    assert runtime.bases == ("outer",) and other.bases == ("inner",)


def test_bytes_of_an_unknown_base() -> None:
    with pytest.raises(UnknownBaseError):
        Runtime().bytes_of("nothing")


def test_when_the_first_call_began() -> None:
    runtime = Runtime()
    network = FakeNetwork(runtime)
    with runtime.record("base") as recording:
        assert recording.first_call is None
        run(network, inputs(1))
        first = recording.first_call
        run(network, inputs(1))
        assert first is not None and recording.first_call == first
