"""The one door to operators: which implementation computes one, and how often each was taken.

An option decides where it asks for an implementation, then what was measured on this machine, then a cost model. Where
none of them says anything, the implementation of the highest rank runs that supports the arguments.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Generic

from fisedit_compile.operators.library import Arguments, Implementation, Measuring, Operator, named
from fisedit_compile.operators.records import costs


def call(operator: Operator[Arguments], arguments: Arguments) -> Any:
    """Compute an operator by the implementation that is chosen.

    Raises:
        ValueError: an option asks for an implementation that does not support the arguments, or none does; with
            reasons.
    """
    return choose(operator, arguments).run(arguments)


def compute(implementation: Implementation[Arguments], arguments: Arguments) -> Any:
    """Compute by an implementation that :func:`choose` chose for these arguments."""
    return implementation.run(arguments)


def choose(operator: Operator[Arguments], arguments: Arguments) -> Implementation[Arguments]:
    """The implementation that computes an operator with these arguments; a choice between several is counted.

    Raises:
        ValueError: as :func:`call` does.
    """
    if _by_rank(operator):
        for implementation in operator.highest_first:
            if implementation.supports is None or implementation.supports(arguments) is None:
                return implementation
        raise _unsupported(operator, arguments)
    asked = operator.asked(arguments) if operator.asked is not None else None
    if asked is not None:
        return _asked_for(operator, asked, arguments)
    able = [one for one in operator.implementations if one.supports is None or one.supports(arguments) is None]
    if len(able) > 1:
        replaced = [one.replaces for one in able if one.replaces is not None]
        able = [one for one in able if one.name not in replaced] if replaced else able
    if len(able) == 1:
        return able[0]
    if not able:
        raise _unsupported(operator, arguments)
    chosen = _measured(operator, arguments, able) or _expected(operator, arguments, able) or able[-1]
    if operator.counted is not None and not chosen.counts:
        taken.note(f"{operator.counted}: {chosen.name}")
    return chosen


def _by_rank(operator: Operator[Any]) -> bool:
    """Whether ranks alone decide."""
    return operator.measuring is None and operator.asked is None and not operator.models


def _asked_for(operator: Operator[Arguments], name: str, arguments: Arguments) -> Implementation[Arguments]:
    implementation = next((known for known in operator.implementations if known.name == name), None)
    if implementation is None:
        known = ", ".join(known.name for known in operator.implementations)
        raise ValueError(f"{name} was asked for {operator}, which has {known}")
    reason = None if implementation.supports is None else implementation.supports(arguments)
    if reason is not None:
        raise ValueError(f"{name} was asked for {operator}, but {reason}")
    return implementation


def _unsupported(operator: Operator[Arguments], arguments: Arguments) -> ValueError:
    reasons = [f"{one.name}: {one.supports(arguments)}" for one in operator.implementations if one.supports is not None]
    return ValueError(f"nothing computes {operator} with these arguments ({'; '.join(reasons)})")


def _measured(
    operator: Operator[Arguments], arguments: Arguments, able: Sequence[Implementation[Arguments]]
) -> Implementation[Arguments] | None:
    """The one that was, or now is, measured to be the fastest; None where nothing is measured."""
    measuring = operator.measuring
    case = measuring.case(arguments) if measuring is not None else None
    if measuring is None or case is None:
        return None
    fastest = costs.known(measuring.name, case, tuple([one.name for one in able]))
    if fastest is None:
        ways = {one.name: _Timed(measuring, arguments, one.run) for one in able}
        fastest = costs.fastest(measuring.name, case, ways)
    return next(one for one in able if one.name == fastest)


class _Timed(Generic[Arguments]):
    """What is timed of an implementation; an example is made at the first, untimed run."""

    def __init__(self, measuring: Measuring[Arguments], arguments: Arguments, run: Callable[[Arguments], Any]) -> None:
        self._make = lambda: measuring.timed(arguments, run)
        self._timed: Callable[[], object] | None = None

    def __call__(self) -> object:
        if self._timed is None:
            self._timed = self._make()
        return self._timed()


def _expected(
    operator: Operator[Arguments], arguments: Arguments, able: Sequence[Implementation[Arguments]]
) -> Implementation[Arguments] | None:
    """The one that a cost model expects to be the fastest; None where no model knows."""
    names = [one.name for one in able]
    for model in operator.models:
        name = model.expected(arguments, names)
        if name is not None:
            return able[names.index(name)]
    return None


@cache
def function(operator: Operator[Any]) -> Callable[..., Any]:
    """A function with the operator's arguments, which chooses at each call."""
    if _by_rank(operator):
        return _highest(operator, operator.highest_first)
    return _named_after(operator, named(operator.arguments, partial(call, operator)))


def lowered(operator: Operator[Any]) -> Callable[..., Any]:
    """What a lowered graph calls for an operator: a plain function where only one implementation can ever run. Of those
    that are chosen by rank, only those are asked that can run in this process."""
    usable = tuple(implementation for implementation in operator.highest_first if implementation.usable())
    if _by_rank(operator) or len(usable) == 1:
        return _highest(operator, usable)
    return function(operator)


@cache
def _highest(operator: Operator[Any], implementations: tuple[Implementation[Any], ...]) -> Callable[..., Any]:
    """A function that computes by the first of some implementations that supports its arguments; by a single one in any
    case."""
    ways = [(one.supports, one.run) for one in implementations]

    def first(arguments: Any) -> Any:
        for supports, run in ways:
            if supports is None or supports(arguments) is None:
                return run(arguments)
        raise _unsupported(operator, arguments)

    return _named_after(operator, named(operator.arguments, first if len(ways) > 1 else ways[0][1]))


def _named_after(operator: Operator[Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """Graphs name their calls by the functions."""
    function.__name__ = function.__qualname__ = operator.name
    function.__doc__ = operator.arguments.__doc__
    return function


class Taken(threading.local):
    """How often each way was taken in this thread, since somebody last asked."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def note(self, way: str) -> None:
        """Count a way."""
        self._counts[way] += 1

    def add(self, counts: Mapping[str, int]) -> None:
        """Count several ways."""
        self._counts.update(counts)

    @contextmanager
    def apart(self) -> Iterator[Counter[str]]:
        """Count what is taken inside by itself; the counts are what is yielded."""
        before, self._counts = self._counts, Counter()
        try:
            yield self._counts
        finally:
            self._counts = before

    def drain(self) -> Counter[str]:
        """The counts, which begin anew."""
        counts, self._counts = self._counts, Counter()
        return counts


taken = Taken()
