"""CostTable: what was measured decides, and is remembered by processes that come later."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path

import pytest
import torch

from fisedit_compile.operators import choosing as choices
from fisedit_compile.operators.choosing import PROCESSES, RUNS, CostTable, describe_count
from fisedit_compile.options import cache_folder


class Clock:
    """A clock that ways move forward, and ways that count their runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, unit: float = 1e-3, **times: float) -> None:
        self.now, self.runs = 0.0, dict.fromkeys(times, 0)
        self.seconds = {name: unit * time for name, time in times.items()}
        monkeypatch.setattr(choices.time, "perf_counter", lambda: self.now)

    def way(self, name: str):
        def run() -> torch.Tensor:
            self.now += self.seconds[name]
            self.runs[name] += 1
            return torch.full((1,), float(list(self.seconds).index(name)))

        return run

    def choose(self, table: CostTable, case: str = "case") -> str:
        ways = {name: self.way(name) for name in self.seconds}
        return list(self.seconds)[int(table.choose("operator", case, ways))]


def test_the_fastest_is_chosen_and_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, table = Clock(monkeypatch, usual=3.0, other=2.0, third=5.0), CostTable(tmp_path / "costs.jsonl")
    assert clock.choose(table) == "other"
    assert clock.runs == {"usual": RUNS + 1, "other": RUNS + 2, "third": RUNS + 1}
    assert clock.choose(table) == "other" and clock.runs["usual"] == RUNS + 1
    assert table.times("operator", "case") == pytest.approx({"usual": 3e-3, "other": 2e-3, "third": 5e-3})
    assert list(table.entries()) == ["operator case"]


def test_what_takes_long_is_timed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, unit=1.0, usual=3.0, other=2.0)
    assert clock.choose(CostTable(tmp_path / "costs.jsonl")) == "other"
    assert clock.runs == {"usual": 2, "other": 3}, "once untimed, once timed, and the fastest to be used"


def test_the_usual_way_wins_unless_another_is_clearly_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = CostTable(tmp_path / "costs.jsonl")
    assert Clock(monkeypatch, usual=1.0, other=0.97).choose(table, "close") == "usual"
    assert Clock(monkeypatch, usual=1.0, other=0.9).choose(table, "far") == "other"


def test_a_few_processes_measure_and_the_smallest_times_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder" / "costs.jsonl"
    # Something else ran while the first process measured the usual way.
    assert Clock(monkeypatch, usual=3.0, other=2.0).choose(CostTable(path)) == "other"
    for _ in range(PROCESSES - 1):
        clock, table = Clock(monkeypatch, usual=1.0, other=2.5), CostTable(path)
        assert [clock.choose(table) for _ in range(2)] == ["usual", "usual"]
        assert clock.runs == {"usual": RUNS + 3, "other": RUNS + 1}
    assert CostTable(path).times("operator", "case") == pytest.approx({"usual": 1e-3, "other": 2e-3})
    clock = Clock(monkeypatch, usual=9.0, other=0.1)
    assert clock.choose(CostTable(path)) == "usual" and clock.runs == {"usual": 1, "other": 0}


def test_a_new_way_measures_all_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = CostTable(tmp_path / "costs.jsonl")
    Clock(monkeypatch, usual=3.0, other=2.0).choose(table)
    clock = Clock(monkeypatch, usual=3.0, other=2.0, third=1.0)
    assert clock.choose(table) == "third" and clock.runs["usual"] == RUNS + 1


def test_a_new_way_is_confirmed_like_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "costs.jsonl"
    for _ in range(PROCESSES):
        Clock(monkeypatch, usual=3.0, other=2.0).choose(CostTable(path))
    # Something else ran while the first process measured the new way.
    assert Clock(monkeypatch, usual=3.0, other=2.0, third=4.0).choose(CostTable(path)) == "other"
    assert Clock(monkeypatch, usual=3.0, other=2.0, third=1.0).choose(CostTable(path)) == "third"


def test_machines_have_tables_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "costs.jsonl"
    Clock(monkeypatch, usual=3.0, other=2.0).choose(CostTable(path))
    monkeypatch.setattr(choices, "machine", lambda: "another machine")
    clock = Clock(monkeypatch, usual=1.0, other=2.0)
    assert clock.choose(CostTable(path)) == "usual" and clock.runs["other"] == RUNS + 1
    assert len({json.loads(line)["machine"] for line in path.read_text().split("\n")[1:]}) == 2


def test_processes_keep_what_others_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "costs.jsonl"
    first, second = CostTable(path), CostTable(path)
    assert first.entries() == second.entries() == {}
    Clock(monkeypatch, usual=3.0, other=2.0).choose(first, "one")
    Clock(monkeypatch, usual=3.0, other=2.0).choose(second, "two")
    assert set(CostTable(path).entries()) == {"operator one", "operator two"}


BROKEN = ["", "[]", "3", '{"machine": "m"}', '{"machine": "m", "case": "c", "seconds": [1]}', '{"mach', "\x00\xff"]


@pytest.mark.parametrize("content", BROKEN)
def test_broken_lines_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    path = tmp_path / "costs.jsonl"
    Clock(monkeypatch, usual=3.0, other=2.0).choose(CostTable(path), "before")
    with path.open("a", encoding="latin-1") as file:
        file.write(f"\n{content}")
    Clock(monkeypatch, usual=3.0, other=2.0).choose(CostTable(path), "after")
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger=choices.__name__):
        entries = CostTable(path).entries()
    assert list(entries) == ["operator before", "operator after"]
    assert entries["operator after"] == pytest.approx({"usual": 3e-3, "other": 2e-3})
    assert ("1 of 3 lines" in caplog.text) == bool(content)


def test_a_file_that_cannot_be_read_is_told_and_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger=choices.__name__):
        assert CostTable(tmp_path).entries() == {}
    assert "cannot read measured times" in caplog.text


def test_a_folder_that_cannot_be_written_is_told_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    table = CostTable(tmp_path / "file" / "costs.jsonl")
    clock = Clock(monkeypatch, usual=3.0, other=2.0)
    with caplog.at_level(logging.WARNING, logger=choices.__name__):
        assert clock.choose(table) == "other"
    assert "cannot keep measured times" in caplog.text
    assert clock.choose(table) == "other" and clock.runs["usual"] == RUNS + 1, "it is remembered in this process"


def test_threads_agree(tmp_path: Path) -> None:
    table, results = CostTable(tmp_path / "costs.jsonl"), []

    def work(number: int) -> None:
        ways = {"usual": lambda: torch.zeros(1), "other": lambda: torch.zeros(1)}
        results.append(table.choose("operator", f"case {number % 3}", ways))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 12 and len(CostTable(table.path).entries()) == 3


def test_where_tables_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FISEDIT_CACHE_DIR", str(tmp_path))
    assert cache_folder() == tmp_path and CostTable().path == tmp_path / "costs.jsonl"
    monkeypatch.delenv("FISEDIT_CACHE_DIR")
    assert cache_folder().name == "fisedit-compile"


def test_counts_in_words() -> None:
    assert describe_count(0) == describe_count(1) == "about 1" and describe_count(1000) == describe_count(1010)
    assert describe_count(100) != describe_count(130)


def test_what_was_taken_is_counted_for_each_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choices.taken.drain()
    clock, table = Clock(monkeypatch, usual=3.0, other=2.0), CostTable(tmp_path / "costs.jsonl")
    clock.choose(table)
    clock.choose(table)
    clock.choose(table, "another")
    seen = []
    thread = threading.Thread(target=lambda: seen.append(choices.taken.drain()))
    thread.start()
    thread.join()
    assert seen == [{}]
    assert choices.taken.drain() == {"operator: other": 3} and choices.taken.drain() == {}
