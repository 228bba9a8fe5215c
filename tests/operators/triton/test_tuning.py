"""Measured choices: kept in a file, preferred where they are known, measured on a GPU only."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from fisedit_compile.operators.triton import tuning
from fisedit_compile.operators.triton.blocks import ConvBlocks, ConvProblem, candidates, choose
from fisedit_compile.operators.triton.chips import KNOWN_CHIPS
from fisedit_compile.operators.triton.tuning import BlockTable, best_choice, problem_key, tune

CHIP = KNOWN_CHIPS[8, 0]
PROBLEM = ConvProblem(400, 8192, 500, 320, 320, 9)


@pytest.fixture(autouse=True)
def own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FISEDIT_CACHE_DIR", str(tmp_path))
    tuning.forget_choices()
    return tmp_path / "blocks.json"


def test_a_measured_choice_is_preferred_and_outlives_the_process(own_table: Path) -> None:
    assert best_choice(PROBLEM, CHIP) == choose(PROBLEM, CHIP)
    other = next(blocks for blocks in candidates(PROBLEM, CHIP) if blocks != choose(PROBLEM, CHIP).blocks)
    BlockTable(own_table).put(problem_key(PROBLEM, CHIP), other, 1.25e-5)
    tuning.forget_choices()
    found = best_choice(PROBLEM, CHIP)
    assert (found.blocks, found.seconds, found.source) == (other, 1.25e-5, "measured")
    assert str(found).endswith("(measured)")


def test_it_holds_for_sizes_nearby_and_one_chip(own_table: Path) -> None:
    near, far = ConvProblem(300, 8192, 400, 320, 320, 9), ConvProblem(3000, 8192, 400, 320, 320, 9)
    assert problem_key(near, CHIP) == problem_key(PROBLEM, CHIP) != problem_key(far, CHIP)
    assert problem_key(PROBLEM, CHIP) != problem_key(PROBLEM, KNOWN_CHIPS[8, 6])


def test_a_choice_that_is_no_candidate_any_more_is_not_used(own_table: Path) -> None:
    BlockTable(own_table).put(problem_key(PROBLEM, CHIP), ConvBlocks(1024, 1024, 64), 1e-6)
    assert best_choice(PROBLEM, CHIP).source == "model"


def test_what_others_wrote_stays(own_table: Path) -> None:
    first, second = BlockTable(own_table), BlockTable(own_table)
    assert first.get("a") is None and second.get("a") is None
    first.put("a", ConvBlocks(16, 16, 16), 1.0)
    second.put("b", ConvBlocks(32, 16, 16), 2.0)
    assert sorted(json.loads(own_table.read_text())) == ["a", "b"]
    assert second.get("a") == (ConvBlocks(16, 16, 16), 1.0)


def test_a_broken_file_is_said_and_ignored(own_table: Path, caplog: pytest.LogCaptureFixture) -> None:
    own_table.write_text("{")
    assert best_choice(PROBLEM, CHIP).source == "model"
    assert "is no JSON file" in caplog.text


def test_the_fastest_of_the_promising_wins() -> None:
    asked = []

    def seconds(blocks: ConvBlocks) -> float:
        asked.append(blocks)
        return 1.0 if blocks.rows == 32 else 2.0

    best, taken = tune(PROBLEM, CHIP, seconds)
    assert (best.rows, taken) == (32, 1.0)
    assert len(asked) == tuning.MEASURED and asked[0] == choose(PROBLEM, CHIP).blocks


def test_nothing_is_measured_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FISEDIT_AUTOTUNE", "1")
    monkeypatch.setattr(tuning.torch.cuda, "is_available", lambda: False)

    def work(blocks: ConvBlocks) -> None:
        raise AssertionError("measured")

    assert best_choice(PROBLEM, CHIP, work).source == "model"
    monkeypatch.setattr(tuning.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tuning, "gpu_seconds", lambda runs: float(runs[0].rows))
    tuning.forget_choices()
    measured = best_choice(PROBLEM, CHIP, lambda blocks: blocks)
    assert measured.source == "measured" and measured.blocks.rows == 16


def test_who_asks_without_means_to_measure_does_not_decide_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FISEDIT_AUTOTUNE", "1")
    monkeypatch.setattr(tuning.torch.cuda, "is_available", lambda: True)
    runs = []
    monkeypatch.setattr(tuning, "gpu_seconds", lambda given: runs.extend(given) or float(given[0].rows))
    assert best_choice(PROBLEM, CHIP).source == "model"
    assert best_choice(PROBLEM, CHIP, lambda blocks: blocks).source == "measured"
    measured = len(runs)
    assert best_choice(PROBLEM, CHIP, lambda blocks: blocks) == best_choice(PROBLEM, CHIP) and len(runs) == measured > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_time_of_the_host_is_not_measured() -> None:
    values = torch.zeros(1 << 10, device="cuda")

    def slowly() -> None:
        time.sleep(1e-3)
        values.add_(1.0)

    assert 0.0 < tuning.gpu_seconds([slowly]) < 5e-4
    # Capturing computes nothing.
    assert float(values[0]) == tuning.WARM_UP + (tuning.REPEATS + 1) * tuning.CALLS
