"""The rows of the table: every method, under its name.  A new one is one entry of :data:`ROWS`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fisedit_compile.bench.quality import methods
from fisedit_compile.bench.quality.measures import Outcome
from fisedit_compile.bench.quality.task import Task
from fisedit_compile.errors import OptionError
from fisedit_compile.pipelines import AutomaticMask, Report

MANY, SOME = 200, 40
"""How many edits rows have: those that the project answers for, and those that it is compared with."""


@dataclass(frozen=True)
class Row:
    """A method.

    Attributes:
        name: in the table, in file names and on the command line.
        meaning: what it does, in a few words.
        count: how many edits it makes, unless told otherwise.
        make: the edit of a task. It is called once for each.
    """

    name: str
    meaning: str
    count: int
    make: Callable[[Task], Outcome]


def by_words(settings: AutomaticMask, **options: Any) -> Callable[[Task], Outcome]:
    """A session's edit by words alone.

    Args:
        settings: how the mask is found.
        **options: of the session.
    """

    def make(task: Task) -> Outcome:
        return _edited(task, {"automatic_mask": settings}, options)

    return make


def stabilised() -> Callable[[Task], Outcome]:
    """FISEdit's edits with stabilised dense steps, for which a session has to keep attention when it generates."""
    settings = AutomaticMask(method="fisedit", stabilised=True)
    return by_words(settings, automatic_mask=settings)


def painted(task: Task) -> Outcome:
    """A session's edit with the asked-for region as its mask."""
    return _edited(task, {"mask": task.region}, {})


def _edited(task: Task, how: dict[str, Any], options: dict[str, Any]) -> Outcome:
    """A session's edit of the task's base."""
    session = task.session(**options)
    started = time.perf_counter()
    edited = session.edit(task.case.edited_prompt, keep=False, **how)
    picture = edited.image
    seconds = time.perf_counter() - started
    mask: NDArray[np.bool_] = np.asarray(edited.mask_image) > 0
    return Outcome(picture, mask, dense_steps(edited.report), seconds)


def dense_steps(report: Report) -> float:
    """The dense steps of an edit, those of finding its mask included; a step may be several calls of the network."""
    calls = report.dense_calls + report.sparse_calls
    own = report.dense_calls * report.scheduler_steps / calls if calls else 0.0
    finding = report.finding
    return own if finding is None or finding.method != "probe" else own + finding.dense_steps


DENSE = Row("dense", "the plain pipeline, new prompt, same noise", MANY, methods.dense)

ROWS: tuple[Row, ...] = (
    DENSE,
    Row("sdedit", "SDEdit, strength 0.75", SOME, methods.sdedit),
    Row("diffedit", "DiffEdit", SOME, methods.diffedit),
    Row("prompt-to-prompt", "prompt-to-prompt, attention replaced", SOME, methods.prompt_to_prompt),
    Row("crop-and-stitch", "the box around the painted mask alone", SOME, methods.crop_and_stitch),
    Row("fisedit", "a session, mask found in the first steps", MANY, by_words(AutomaticMask(method="fisedit"))),
    Row("fisedit-stabilised", "the same, shared words keep their attention", MANY, stabilised()),
    Row("probe", "a session, mask found by probes", MANY, by_words(AutomaticMask())),
    Row("probe-4-pixels", "the same, grown by 4 pixels", SOME, by_words(AutomaticMask(growth_pixels=4))),
    Row("probe-hysteresis", "the same, with hysteresis", SOME, by_words(AutomaticMask(hysteresis=0.5))),
    Row("painted", "a session, painted mask", MANY, painted),
)


def rows_of(names: Sequence[str]) -> tuple[Row, ...]:
    """The rows of some names in the table's order; the dense one is always among them, as all others need it.

    Raises:
        OptionError: there is no name, or one that is not that of a row.
    """
    known = [row.name for row in ROWS]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise OptionError(f"expected names of rows out of {', '.join(known)}; got {', '.join(unknown) or 'none'}")
    return tuple(row for row in ROWS if row is DENSE or row.name in names)
