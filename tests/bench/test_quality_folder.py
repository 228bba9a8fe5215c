"""An evaluation that was killed goes on where it stopped, and its folder takes nothing of other settings."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fisedit_compile.bench.quality import evaluation
from fisedit_compile.bench.quality.cases import EditCase, edit_cases
from fisedit_compile.bench.quality.evaluation import evaluate
from fisedit_compile.bench.quality.folder import ResultFolder
from fisedit_compile.bench.quality.measures import Measures, Outcome
from fisedit_compile.bench.quality.rows import DENSE, Row
from fisedit_compile.bench.quality.task import DenseSteps, Task
from fisedit_compile.errors import OptionError, PipelineError
from fisedit_compile.scenes import parse_caption, render

CASES = edit_cases(["recolour", "unchanged"], 3)
IDENTITY = {"model": "drawn", "steps": 4}


class DrawingNetworks:
    """Stands for the networks: what it generates is drawn, and it counts what it was asked for."""

    def __init__(self, brighter: int = 0) -> None:
        self.arguments = {"num_inference_steps": 4}
        self.generated: Counter[str] = Counter()
        self._brighter = brighter

    def _drawn(self, prompt: str, generator: torch.Generator) -> Image.Image:
        pixels = render(parse_caption(prompt), generator.initial_seed())
        return Image.fromarray(np.minimum(pixels.astype(int) + self._brighter, 255).astype(np.uint8))

    def plain(self, prompt: str, generator: torch.Generator, num_inference_steps: int) -> Any:
        return SimpleNamespace(images=[self._drawn(prompt, generator)])

    def counting(self) -> Any:
        return nullcontext(DenseSteps(4.0))

    def release(self) -> None:
        """Nothing is recorded."""

    def session(self, **options: Any) -> tuple[str, Any]:
        return "", SimpleNamespace(generate=self._generate)

    def _generate(self, prompt: str, generator: torch.Generator, num_inference_steps: int) -> Any:
        self.generated[prompt] += 1
        return SimpleNamespace(image=self._drawn(prompt, generator))


def painting(made: list[str], stop: Callable[[str], bool] = lambda name: False) -> Row:
    """A row that pastes the asked-for region of the dense edit, and notes which cases it made."""

    def make(task: Task) -> Outcome:
        if stop(task.case.name):
            raise KeyboardInterrupt
        made.append(task.case.name)
        picture = task.base.copy()
        assert task.dense is not None
        picture.paste(task.dense, (0, 0), Image.fromarray(task.region.astype(np.uint8) * 255))
        return Outcome(picture, task.region, 0.5, 0.25)

    return Row("painting", "pastes", 3, make)


def measure(case: EditCase, base: Any, dense: Any, region: Any, outcome: Outcome) -> Measures:
    """Numbers that tell edits and rows apart; what they mean is tested elsewhere."""
    share = None if outcome.mask is None else float(outcome.mask.mean())
    steps, seconds = outcome.dense_steps, outcome.seconds
    return Measures(("colour",), math.inf, 0.5, case.seed, None, None, None, share, False, steps, seconds)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "warm_up", lambda *given: None)
    monkeypatch.setattr(evaluation, "measure", measure)


def run(path: Path, row: Row, networks: Any = None, cases: int = 3) -> list[evaluation.Result]:
    folder = ResultFolder(path, IDENTITY)
    return evaluate(networks or DrawingNetworks(), folder, [(case, [DENSE, row]) for case in CASES[:cases]])


def lines(path: Path) -> list[tuple[str, str]]:
    found = [json.loads(line) for line in (path / "results.jsonl").read_text().splitlines()]
    return [(values["case"], values["row"]) for values in found]


def test_a_run_that_was_interrupted_goes_on_and_makes_nothing_twice(tmp_path: Path) -> None:
    made: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, painting(made, lambda name: name == CASES[1].name))
    assert made == [CASES[0].name]
    assert lines(tmp_path) == [(CASES[0].name, "dense"), (CASES[0].name, "painting"), (CASES[1].name, "dense")]
    networks = DrawingNetworks()
    results = run(tmp_path, painting(made), networks)
    assert made == [case.name for case in CASES]
    assert sorted(lines(tmp_path)) == sorted((case.name, row) for case in CASES for row in ("dense", "painting"))
    # The finished case needs no base, and the one that was begun has its picture.
    assert networks.generated == Counter({CASES[2].prompt: 1})
    untouched = DrawingNetworks()
    again = run(tmp_path, painting(made), untouched)
    assert [(one.case, one.measures) for one in again] == [(one.case, one.measures) for one in results]
    assert made == [case.name for case in CASES] and not untouched.generated and len(lines(tmp_path)) == 6


def test_longer_evaluations_and_further_rows_go_on_in_the_same_folder(tmp_path: Path) -> None:
    made: list[str] = []
    run(tmp_path, painting(made), cases=1)
    run(tmp_path, painting(made))
    assert made == [case.name for case in CASES]
    other = Row("other", "the same under another name", 3, painting(made).make)
    run(tmp_path, other)
    assert made == 2 * [case.name for case in CASES] and len(lines(tmp_path)) == 9


def test_a_line_that_was_not_written_to_its_end_is_made_again(tmp_path: Path) -> None:
    made: list[str] = []
    run(tmp_path, painting(made))
    path = tmp_path / "results.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    (tmp_path / "pictures" / CASES[2].name / "painting.part").write_bytes(b"\x89PNG")
    run(tmp_path, painting(made))
    assert made == [*(case.name for case in CASES), CASES[2].name]
    assert len(lines(tmp_path)) == 6


def test_a_picture_that_is_gone_is_made_again(tmp_path: Path) -> None:
    made: list[str] = []
    first = run(tmp_path, painting(made), cases=1)
    (tmp_path / "pictures" / CASES[0].name / "painting.png").unlink()
    second = run(tmp_path, painting(made), cases=1)
    assert made == 2 * [CASES[0].name]
    assert [one.measures for one in second] == [one.measures for one in first]


def test_pictures_and_numbers_are_kept_as_they_were(tmp_path: Path) -> None:
    results = run(tmp_path, painting([]), cases=1)
    folder, (case, *_) = ResultFolder(tmp_path, IDENTITY), CASES
    for result in results:
        assert folder.find(case, result.row.name) == result.measures
    base, dense = (render(scene, case.seed) for scene in (case.before, case.after))
    assert np.array_equal(np.asarray(folder.picture(case, "base")), base)
    assert np.array_equal(np.asarray(folder.picture(case, "dense")), dense)
    mask = folder.mask(case, "painting")
    assert mask is not None and mask.any() and folder.mask(case, "dense") is None
    assert np.array_equal(np.asarray(folder.picture(case, "painting")), np.where(mask[..., None], dense, base))


@pytest.mark.parametrize("other", [{"model": "drawn otherwise", "steps": 4}, {"model": "drawn", "steps": 5}])
def test_another_model_or_setting_is_another_folder(tmp_path: Path, other: dict[str, Any]) -> None:
    run(tmp_path, painting([]), cases=1)
    before = (tmp_path / "results.jsonl").read_bytes()
    with pytest.raises(OptionError, match=r"has results of other settings \((model|steps): .* choose another --output"):
        ResultFolder(tmp_path, other)
    assert (tmp_path / "results.jsonl").read_bytes() == before


def test_another_edit_of_the_same_name_is_refused(tmp_path: Path) -> None:
    run(tmp_path, painting([]), cases=1)
    path = tmp_path / "results.jsonl"
    path.write_text(path.read_text().replace(f'"seed": {CASES[0].seed}', '"seed": 12345'))
    with pytest.raises(OptionError, match=rf"another edit as {CASES[0].name} \(seed: 12345 there"):
        run(tmp_path, painting([]), cases=1)


@pytest.mark.parametrize("line", ["no JSON", "[]", '{"case": "recolour-000", "row": "dense"}'])
def test_lines_that_are_no_results_are_refused(tmp_path: Path, line: str) -> None:
    run(tmp_path, painting([]), cases=1)
    path = tmp_path / "results.jsonl"
    path.write_text(f"{line}\n{path.read_text()}")
    with pytest.raises(OptionError, match="line 1 of .* is no result"):
        ResultFolder(tmp_path, IDENTITY)


def test_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(OptionError, match="holds files, but no evaluation"):
        ResultFolder(tmp_path, IDENTITY)
    with pytest.raises(OptionError, match="expected a folder, and .* is a file"):
        ResultFolder(tmp_path / "letter.txt", IDENTITY)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(OptionError, match="cannot be read"):
        ResultFolder(tmp_path, IDENTITY)
    assert (tmp_path / "letter.txt").read_text() == "dear"


def test_a_base_that_is_made_again_must_be_the_same(tmp_path: Path) -> None:
    def edit(task: Task) -> Outcome:
        task.session()
        return Outcome(task.base, None, 0.0, 1.0)

    session_row = Row("session", "edits the session's base", 3, edit)
    run(tmp_path, painting([]), cases=1)
    with pytest.raises(PipelineError, match="differs from the one made before by 9 of 255 levels"):
        run(tmp_path, session_row, DrawingNetworks(brighter=9), cases=1)
    run(tmp_path, session_row, DrawingNetworks(brighter=1), cases=1)


def test_the_asked_for_region_needs_the_dense_edit() -> None:
    with pytest.raises(PipelineError, match="recolour-000 needs the dense edit"):
        _ = Task(DrawingNetworks(), CASES[0]).region  # type: ignore[arg-type]
