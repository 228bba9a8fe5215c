"""The door: an option, then measured times, then a cost model, then ranks; and what is counted of the choices."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest

from fisedit_compile.operators import choosing, library
from fisedit_compile.operators.choosing import call, choose, compute, function, lowered, taken
from fisedit_compile.operators.library import CostModel, Implementation, Measuring, Operator
from support.choices import favour


class Number(NamedTuple):
    """A number.

    Attributes:
        value: below zero only the usual implementation computes.
        asked: for which implementation an option asks.
    """

    value: int
    asked: str | None = None


class Size(NamedTuple):
    """What times depend on."""

    value: int


@pytest.fixture(autouse=True)
def none_of_these_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "OPERATORS", dict(library.OPERATORS))


def operator(**more: Any) -> Operator[Number]:
    """An operator with three implementations, whose results are their names."""
    made: Operator[Number] = Operator("number", Number, stands_for=object(), **more)
    for rank, name in enumerate(("usual", "special", "most special")):
        add(made, name, rank)
    return made


def add(made: Operator[Number], name: str, rank: int, **more: Any) -> None:
    def supports(given: Number) -> str | None:
        return f"{given.value} is below zero" if given.value < 0 else None

    check = None if rank == 0 else supports
    made.add(Implementation(made, name, lambda given: (name, given.value), check, rank, **more))


def measuring(case: Any = lambda given: Size(given.value)) -> Measuring[Number]:
    return Measuring("numbers", case, lambda given, run: lambda: run(given._replace(value=0)))


def test_ranks_decide_where_nothing_else_does() -> None:
    taken.drain()
    made = operator()
    assert [call(made, Number(value)) for value in (1, -1)] == [("most special", 1), ("usual", -1)]
    assert function(made)(3) == function(made)(value=3) == function(made)(3, None) == ("most special", 3)
    assert not taken.drain()


def test_what_was_measured_comes_before_models_and_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    made = operator(measuring=measuring(), counted="numbers")
    made.models.append(CostModel(made, lambda given, names: "usual"))
    table = favour(monkeypatch, "special")
    taken.drain()
    assert call(made, Number(7)) == ("special", 7)
    assert table.asked == [("numbers", Size(7), ("usual", "special", "most special"))]
    assert table.results == [{name: (name, 0) for name in ("usual", "special", "most special")}]
    assert call(made, Number(-7)) == ("usual", -7) and len(table.asked) == 1, "there is no choice"
    assert taken.drain() == {"numbers: special": 1}


def test_a_decision_is_not_measured_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    made, ran = operator(measuring=measuring()), []
    made.add(Implementation(made, "noted", lambda given: ran.append(given), rank=3))
    monkeypatch.setattr(choosing, "costs", choosing.costs.__class__(tmp_path / "measured.jsonl"))
    first = choose(made, Number(7))
    measured = len(ran)
    assert all(choose(made, Number(7)) is first for _ in range(3)) and len(ran) == measured > 0
    choose(made, Number(8))
    assert len(ran) == 2 * measured


def test_a_model_decides_what_is_not_measured() -> None:
    def expected(given: Number, names: Sequence[str]) -> str | None:
        assert list(names) == ["usual", "special", "most special"]
        return "special" if given.value > 5 else None

    made = operator(measuring=measuring(lambda given: None), counted="numbers")
    made.models.append(CostModel(made, expected))
    taken.drain()
    assert [choose(made, Number(value)).name for value in (7, 3, -1)] == ["special", "most special", "usual"]
    assert taken.drain() == {"numbers: special": 1, "numbers: most special": 1}


def test_an_option_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    made = operator(measuring=measuring(), asked=lambda given: given.asked)
    table = favour(monkeypatch, "special")
    assert call(made, Number(7, "usual")) == ("usual", 7) and not table.asked
    assert call(made, Number(7)) == ("special", 7)
    with pytest.raises(ValueError, match="special was asked for operator number, but -7 is below zero"):
        call(made, Number(-7, "special"))
    with pytest.raises(ValueError, match="other was asked for operator number, which has usual, special, most special"):
        call(made, Number(7, "other"))


def test_one_may_take_the_place_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    made = operator(measuring=measuring())
    add(made, "better", 3, replaces="special")
    table = favour(monkeypatch, "better")
    assert call(made, Number(7)) == ("better", 7)
    assert table.asked[0].names == ("usual", "most special", "better")


def test_what_counts_itself_is_not_counted() -> None:
    made = operator(measuring=measuring(lambda given: None), counted="numbers")
    add(made, "careful", 3, counts=True)
    taken.drain()
    assert call(made, Number(7)) == ("careful", 7) and not taken.drain()


@pytest.mark.parametrize("measured", [False, True])
def test_where_nothing_computes_the_reasons_are_told(measured: bool) -> None:
    made: Operator[Number] = Operator("lost", Number, stands_for=object(), measuring=measuring() if measured else None)
    for rank, name in ((1, "one"), (2, "other")):
        add(made, name, rank)
    for attempt in (lambda: call(made, Number(-3)), lambda: function(made)(-3), lambda: lowered(made)(-3)):
        with pytest.raises(ValueError, match=r"nothing computes operator lost .*one: -3 is below zero; other: -3 is"):
            attempt()


def test_lowered_graphs_leave_out_what_cannot_run() -> None:
    made: Operator[Number] = Operator("number", Number, stands_for=object())
    add(made, "usual", 0)
    add(made, "elsewhere", 1, usable=lambda: False)
    assert lowered(made)(3) == ("usual", 3) and function(made)(3) == ("elsewhere", 3)
    assert lowered(made).__name__ == "number" and lowered(made).__doc__ == Number.__doc__
    add(made, "here", 2)
    assert lowered(made)(3) == ("here", 3) and lowered(made)(-3) == ("usual", -3)


def test_who_chose_may_compute_later() -> None:
    made = operator()
    assert compute(choose(made, Number(4)), Number(4)) == ("most special", 4)


def test_names_are_taken_once_and_operators_are_whole() -> None:
    made = operator()
    with pytest.raises(ValueError, match="has an implementation special already"):
        add(made, "special", 5)
    with pytest.raises(ValueError, match="either a shape or an operator"):
        Operator("nothing", Number)


def test_what_was_taken_is_counted_for_each_thread() -> None:
    taken.drain()
    taken.note("operator: other")
    taken.add({"operator: other": 1, "operator: usual": 1})
    seen = []
    thread = threading.Thread(target=lambda: seen.append(taken.drain()))
    thread.start()
    thread.join()
    assert seen == [{}]
    assert taken.drain() == {"operator: other": 2, "operator: usual": 1} and taken.drain() == {}
