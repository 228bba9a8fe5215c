"""CostTable: what was measured decides, and is remembered by processes that come later."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from fisedit_compile.operators import records
from fisedit_compile.operators.records import PROCESSES, RUNS, CostTable, Record, machine, typical_count
from fisedit_compile.options import cache_folder


class Case(NamedTuple):
    """A case of one field."""

    name: str


class Clock:
    """A clock that ways move forward, and ways that count their runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, unit: float = 1e-3, **times: float) -> None:
        self.now, self.runs = 0.0, dict.fromkeys(times, 0)
        self.seconds = {name: unit * time for name, time in times.items()}
        monkeypatch.setattr(records.time, "perf_counter", lambda: self.now)

    def way(self, name: str):
        def run() -> torch.Tensor:
            self.now += self.seconds[name]
            self.runs[name] += 1
            return torch.full((1,), float(list(self.seconds).index(name)))

        return run

    def choose(self, table: CostTable, case: str = "case") -> str:
        return table.fastest("operator", Case(case), {name: self.way(name) for name in self.seconds})


def entries(table: CostTable) -> dict[str, dict[str, float]]:
    """Times by the name of the case."""
    return {case.name: times for case, times in table.entries("operator", Case).items()}


def test_the_fastest_is_chosen_and_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, table = Clock(monkeypatch, usual=3.0, other=2.0, third=5.0), CostTable(tmp_path / "measured.jsonl")
    assert clock.choose(table) == "other"
    assert clock.runs == {"usual": RUNS + 1, "other": RUNS + 1, "third": RUNS + 1}
    assert clock.choose(table) == "other" and clock.runs["usual"] == RUNS + 1
    assert entries(table) == {"case": pytest.approx({"usual": 3e-3, "other": 2e-3, "third": 5e-3})}


def test_what_takes_long_is_timed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, unit=1.0, usual=3.0, other=2.0)
    assert clock.choose(CostTable(tmp_path / "measured.jsonl")) == "other"
    assert clock.runs == {"usual": 2, "other": 2}, "once untimed, once timed"


def test_the_usual_way_wins_unless_another_is_clearly_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = CostTable(tmp_path / "measured.jsonl")
    assert Clock(monkeypatch, usual=1.0, other=0.97).choose(table, "close") == "usual"
    assert Clock(monkeypatch, usual=1.0, other=0.9).choose(table, "far") == "other"


def test_a_few_processes_measure_and_the_smallest_times_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder" / "measured.jsonl"
    # Something else ran while the first process measured the usual way.
    assert Clock(monkeypatch, usual=3.0, other=2.0).choose(CostTable(path)) == "other"
    for _ in range(PROCESSES - 1):
        clock, table = Clock(monkeypatch, usual=1.0, other=2.5), CostTable(path)
        assert [clock.choose(table) for _ in range(2)] == ["usual", "usual"]
        assert clock.runs == {"usual": RUNS + 1, "other": RUNS + 1}
    assert entries(CostTable(path)) == {"case": pytest.approx({"usual": 1e-3, "other": 2e-3})}
    clock = Clock(monkeypatch, usual=9.0, other=0.1)
    assert clock.choose(CostTable(path)) == "usual" and clock.runs == {"usual": 0, "other": 0}


def test_a_new_way_measures_all_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = CostTable(tmp_path / "measured.jsonl")
    Clock(monkeypatch, usual=3.0, other=2.0).choose(table)
    clock = Clock(monkeypatch, usual=3.0, other=2.0, third=1.0)
    assert clock.choose(table) == "third" and clock.runs["usual"] == RUNS + 1


def test_a_new_way_is_confirmed_like_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "measured.jsonl"
    for _ in range(PROCESSES):
        Clock(monkeypatch, usual=3.0, other=2.0).choose(CostTable(path))
    # Something else ran while the first process measured the new way.
    assert Clock(monkeypatch, usual=3.0, other=2.0, third=4.0).choose(CostTable(path)) == "other"
    assert Clock(monkeypatch, usual=3.0, other=2.0, third=1.0).choose(CostTable(path)) == "third"


def test_machines_have_tables_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "measured.jsonl"
    Clock(monkeypatch, usual=3.0, other=2.0).choose(CostTable(path))
    monkeypatch.setattr(records, "machine", lambda: "another machine")
    clock = Clock(monkeypatch, usual=1.0, other=2.0)
    assert clock.choose(CostTable(path)) == "usual" and clock.runs["other"] == RUNS + 1
    assert len({json.loads(line)["machine"] for line in path.read_text().split("\n")[1:]}) == 2


def test_processes_keep_what_others_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "measured.jsonl"
    first, second = CostTable(path), CostTable(path)
    assert entries(first) == entries(second) == {}
    Clock(monkeypatch, usual=3.0, other=2.0).choose(first, "one")
    Clock(monkeypatch, usual=3.0, other=2.0).choose(second, "two")
    assert set(entries(CostTable(path))) == {"one", "two"}


def line(**changes: object) -> str:
    """A line of the file, with other values of some of its fields."""
    right = {"operator": "o", "case": {}, "implementation": "i", "seconds": 1.0, "machine": "m", "parameters": {}}
    return json.dumps(right | changes)


BROKEN = [
    *("", "[]", "3", '{"machine": "m"}', '{"mach', "\x00\xff"),
    *(line(seconds=seconds) for seconds in (None, "1", -1.0, float("nan"), float("inf"))),
    *(line(case=case) for case in ("words", [], {"rows": [1]}, {"rows": None})),
    *(line(operator=3), line(implementation=None), line(machine={}), line(parameters=[]), line(more=1)),
    # As versions before this one kept them.
    '{"machine": "m", "case": "product about 38 rows, 20->5 float32", "seconds": {"packed": 0.001}}',
]


@pytest.mark.parametrize("content", BROKEN)
def test_broken_lines_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    path = tmp_path / "measured.jsonl"
    Clock(monkeypatch, usual=3.0, other=2.0).choose(CostTable(path), "before")
    with path.open("a", encoding="latin-1") as file:
        file.write(f"\n{content}")
    Clock(monkeypatch, usual=3.0, other=2.0).choose(CostTable(path), "after")
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger=records.__name__):
        found = entries(CostTable(path))
    assert list(found) == ["before", "after"]
    assert found["after"] == pytest.approx({"usual": 3e-3, "other": 2e-3})
    assert ("1 of 5 lines" in caplog.text) == bool(content)


def test_a_line_is_a_record_and_a_record_a_line() -> None:
    record = Record("o", {"rows": 38, "dtype": "float32", "last": True}, "i", 0.25, "m", {"warps": 4})
    assert Record.parse(record.line()) == record
    assert Record.parse(line().encode()) == Record("o", {}, "i", 1.0, "m")


def test_cases_of_other_fields_are_left_out(tmp_path: Path) -> None:
    table = CostTable(tmp_path / "measured.jsonl")
    fields: list[dict] = [{"name": "mine"}, {"name": "more", "rows": 3}, {"rows": 3}, {}]
    table.add(Record("operator", case, "usual", 1.0, machine()) for case in fields)
    assert entries(table) == entries(CostTable(table.path)) == {"mine": {"usual": 1.0}}
    assert len(table.path.read_bytes().splitlines()) == 1 + len(fields), "a line for each, on new ones"


def test_what_was_decided_holds_for_these_implementations_and_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = CostTable(tmp_path / "measured.jsonl")
    clock = Clock(monkeypatch, usual=3.0, other=2.0)
    assert clock.choose(table) == "other"
    assert table.fastest("operator", Case("case"), {"usual": clock.way("usual")}) == "usual"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert Clock(monkeypatch, usual=1.0, other=2.0).choose(table) == "usual"
    table.forget()
    assert Clock(monkeypatch, usual=1.0, other=2.0).choose(table) == "usual"
    assert set(table.entries("operator", Case)) == {Case("case")}


def test_a_file_that_cannot_be_read_is_told_and_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger=records.__name__):
        assert entries(CostTable(tmp_path)) == {}
    assert "cannot read measured times" in caplog.text


def test_a_folder_that_cannot_be_written_is_told_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    table = CostTable(tmp_path / "file" / "measured.jsonl")
    clock = Clock(monkeypatch, usual=3.0, other=2.0)
    with caplog.at_level(logging.WARNING, logger=records.__name__):
        assert clock.choose(table) == "other"
    assert "cannot keep measured times" in caplog.text
    assert clock.choose(table) == "other" and clock.runs["usual"] == RUNS + 1, "it is remembered in this process"


def test_threads_agree(tmp_path: Path) -> None:
    table, results = CostTable(tmp_path / "measured.jsonl"), []

    def work(number: int) -> None:
        ways = {"usual": lambda: torch.zeros(1), "other": lambda: torch.zeros(1)}
        results.append(table.fastest("operator", Case(f"case {number % 3}"), ways))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 12 and len(entries(CostTable(table.path))) == 3


def test_where_tables_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FISEDIT_CACHE_DIR", str(tmp_path))
    assert cache_folder() == tmp_path and CostTable().path == tmp_path / "measured.jsonl"
    monkeypatch.delenv("FISEDIT_CACHE_DIR")
    assert cache_folder().name == "fisedit-compile"


def test_typical_counts() -> None:
    assert typical_count(0) == typical_count(1) == 1 and typical_count(1000) == typical_count(1010)
    assert typical_count(100) != typical_count(130)
