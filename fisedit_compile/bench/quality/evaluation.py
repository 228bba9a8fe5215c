"""The run: case after case, each by all rows, so that a machine that slows down does so for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fisedit_compile.bench.quality.cases import EditCase, edit_cases
from fisedit_compile.bench.quality.folder import ResultFolder
from fisedit_compile.bench.quality.measures import Measures, measure, require_torchmetrics
from fisedit_compile.bench.quality.rows import DENSE, Row
from fisedit_compile.bench.quality.task import Networks, Task
from fisedit_compile.scenes import EditKind

WARM_STEPS = 2
"""Scheduler steps of the edits that warm up: one dense one and one sparse one, where the mask is found."""


@dataclass(frozen=True)
class Result:
    """A finished edit of a row."""

    row: Row
    case: EditCase
    measures: Measures


def plan(rows: Sequence[Row], kinds: Sequence[EditKind], count: int | None) -> list[tuple[EditCase, list[Row]]]:
    """Which rows make which edits.

    Args:
        rows: the dense one first.
        kinds: of edits.
        count: edits of every row; None: each row's own number.
    """
    counts = {row.name: row.count if count is None else count for row in rows}
    cases = edit_cases(kinds, max(counts.values()))
    return [(case, [row for row in rows if number < counts[row.name]]) for number, case in enumerate(cases)]


def evaluate(
    networks: Networks,
    folder: ResultFolder,
    work: Sequence[tuple[EditCase, Sequence[Row]]],
    progress: Callable[[str], object] = lambda text: None,
) -> list[Result]:
    """Make all edits that are not finished, and return the numbers of all.

    Args:
        networks: that make them.
        folder: where they are kept.
        work: see :func:`plan`; every case's first row is the dense one.
        progress: told what is being made.

    Raises:
        OptionError: the folder has other edits.
        MissingPackageError: torchmetrics is not installed.
        PipelineError: the base of an edit is another picture than before.
    """
    require_torchmetrics()
    found = {(case.name, row.name): folder.find(case, row.name) for case, rows in work for row in rows}
    pending = [row for case, rows in work for row in rows if found[case.name, row.name] is None]
    results = []
    warm = False
    for number, (case, rows) in enumerate(work, 1):
        missing = [row for row in rows if found[case.name, row.name] is None]
        if missing and not warm:
            progress("warming up")
            warm_up(networks, case, list(dict.fromkeys(pending)))
            warm = True
        task = Task(networks, case, folder.picture(case, "base"), folder.picture(case, DENSE.name))
        for row in missing:
            progress(f"{case.name} ({number} of {len(work)}), {row.name}")
            folder.save_base(case, task.base)
            outcome = row.make(task)
            if row is DENSE:
                task.dense = outcome.picture
            assert task.dense is not None
            measures = measure(case, task.base, task.dense, task.region, outcome)
            folder.add(case, row.name, outcome, measures)
            found[case.name, row.name] = measures
        networks.release()
        for row in rows:
            measures_of = found[case.name, row.name]
            assert measures_of is not None
            results.append(Result(row, case, measures_of))
    return results


def warm_up(networks: Networks, case: EditCase, rows: Sequence[Row]) -> None:
    """Make an edit of few steps by every row and throw it away: what happens once in a process counts for no edit.

    Args:
        networks: that make it.
        case: the edit.
        rows: the methods.
    """
    task = Task(networks, case, steps=WARM_STEPS)
    task.dense = DENSE.make(task).picture
    for row in rows:
        if row is not DENSE:
            row.make(task)
