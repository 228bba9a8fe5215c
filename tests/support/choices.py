"""Tables of costs in which one implementation is always the fastest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest

from fisedit_compile.operators import choosing


class Asked(NamedTuple):
    """What a table was asked: operator, case and the names of implementations."""

    operator: str
    case: Any
    names: tuple[str, ...]


class Favour:
    """Takes the place of measured costs: of those implementations that a table is asked about, the favoured one is the
    fastest, else the usual one. Each that is asked about runs once, and ``results`` keeps what it returned."""

    def __init__(self, name: str, runs: bool = True) -> None:
        self.name, self.runs = name, runs
        self.asked: list[Asked] = []
        self.results: list[dict[str, Any]] = []

    def known(self, operator: str, case: Any, names: tuple[str, ...]) -> str | None:
        """As of ``CostTable``: everything is asked anew."""
        return None

    def fastest(self, operator: str, case: Any, ways: Mapping[str, Callable[[], Any]]) -> str:
        """As of ``CostTable``."""
        self.asked.append(Asked(operator, case, tuple(ways)))
        if self.runs:
            self.results.append({name: way() for name, way in ways.items()})
        return self.name if self.name in ways else next(iter(ways))


def favour(monkeypatch: pytest.MonkeyPatch, name: str, runs: bool = True) -> Favour:
    """Have an implementation be the fastest wherever it is measured."""
    table = Favour(name, runs)
    monkeypatch.setattr(choosing, "costs", table)
    return table
