"""What an evaluation comes to: for every row its measures with their intervals, and its difference to other rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fisedit_compile.bench.quality.evaluation import Result
from fisedit_compile.bench.quality.intervals import Estimate, Statistic, estimate, paired_difference
from fisedit_compile.bench.quality.measures import Measures
from fisedit_compile.bench.quality.rows import DENSE, Row
from fisedit_compile.scenes import EDIT_KINDS, EditKind

Value = Callable[[Measures], float | None]


def _success(measures: Measures) -> float:
    return 100.0 * measures.success


#: Column, how it is summed up, and the measure. PSNR has medians, since it may be infinite.
COLUMNS: Mapping[str, tuple[Statistic, Value]] = {
    "success": ("mean", _success),
    "psnr": ("median", lambda measures: measures.psnr),
    "ssim": ("mean", lambda measures: measures.ssim),
    "background": ("median", lambda measures: measures.background),
    "outside": ("least", lambda measures: measures.outside),
    "recall": ("mean", lambda measures: measures.recall),
    "area": ("mean", lambda measures: measures.area),
    "share": ("mean", lambda measures: None if measures.share is None else 100.0 * measures.share),
    "dense_steps": ("mean", lambda measures: measures.dense_steps),
    "seconds": ("median", lambda measures: measures.seconds),
}
#: What rows are compared by, case by case.
COMPARED = ("success", "psnr", "ssim")


@dataclass(frozen=True)
class RowSummary:
    """What a row comes to.

    Attributes:
        row: the method.
        count: of its edits.
        columns: the estimates of :data:`COLUMNS`, and ``speed_up``: the median of the dense edit's seconds over the
            row's, edit by edit. None where a row has no such number.
        differences: by the name of another row and a name of :data:`COMPARED` the mean difference to it, over the edits
            that both made; success in percentage points.
        by_kind: of each kind of edits how many succeeded, and how many there were.
        unchanged: of the edits that ask for nothing how many gave the base itself, and how many there were.
    """

    row: Row
    count: int
    columns: Mapping[str, Estimate | None]
    differences: Mapping[str, Mapping[str, Estimate | None]]
    by_kind: Mapping[EditKind, tuple[int, int]]
    unchanged: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain values that JSON can hold; an infinite number is the text ``inf``."""
        return {
            "row": self.row.name,
            "meaning": self.row.meaning,
            "edits": self.count,
            **{name: _plain(found) for name, found in self.columns.items()},
            "differences": {
                other: {name: _plain(found) for name, found in numbers.items()}
                for other, numbers in self.differences.items()
            },
            "by_kind": {kind: {"succeeded": right, "edits": count} for kind, (right, count) in self.by_kind.items()},
            "unchanged": {"identical": self.unchanged[0], "edits": self.unchanged[1]},
        }


def summarise(results: Sequence[Result]) -> list[RowSummary]:
    """A summary of every row, in the order in which the rows come."""
    rows = list(dict.fromkeys(result.row for result in results))
    found = {row.name: {one.case.name: one for one in results if one.row is row} for row in rows}
    return [_summary(row, found) for row in rows]


def _summary(row: Row, found: Mapping[str, Mapping[str, Result]]) -> RowSummary:
    own = found[row.name]
    columns = {name: _estimate(own.values(), *how) for name, how in COLUMNS.items()}
    dense = found.get(DENSE.name, {})
    ratios = [
        dense[name].measures.seconds / one.measures.seconds
        for name, one in own.items()
        if name in dense and one.measures.seconds
    ]
    columns["speed_up"] = estimate(ratios, "median")
    differences = {
        name: {column: _difference(own, other, COLUMNS[column][1]) for column in COMPARED}
        for name, other in found.items()
        if name != row.name
    }
    kinds = {kind: [one.measures for one in own.values() if one.case.kind == kind] for kind in EDIT_KINDS}
    by_kind = {kind: (sum(one.success for one in ones), len(ones)) for kind, ones in kinds.items() if ones}
    nothing = kinds["unchanged"]
    unchanged = sum(one.identical for one in nothing), len(nothing)
    return RowSummary(row, len(own), columns, differences, by_kind, unchanged)


def _estimate(results: Any, statistic: Statistic, value: Value) -> Estimate | None:
    values = [value(one.measures) for one in results]
    return estimate([one for one in values if one is not None], statistic)


def _difference(own: Mapping[str, Result], other: Mapping[str, Result], value: Value) -> Estimate | None:
    pairs = [(value(one.measures), value(other[name].measures)) for name, one in own.items() if name in other]
    known = [(left, right) for left, right in pairs if left is not None and right is not None]
    return paired_difference([left for left, _ in known], [right for _, right in known])


def _plain(found: Estimate | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {name: "inf" if value == math.inf else value for name, value in asdict(found).items()}
