"""Measured choices: kept in a file, preferred where they are known, measured on a GPU only."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from fisedit_compile.operators.records import CostTable
from fisedit_compile.operators.triton import tuning
from fisedit_compile.operators.triton.blocks import ConvBlocks, ConvProblem, candidates, choose
from fisedit_compile.operators.triton.chips import KNOWN_CHIPS
from fisedit_compile.operators.triton.tuning import KernelCase, best_choice, keep, tune

CHIP = KNOWN_CHIPS[8, 0]
PROBLEM = ConvProblem(400, 8192, 500, 320, 320, 9)


@pytest.fixture(autouse=True)
def own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "measured.jsonl"
    look_again(monkeypatch, path)
    return path


def look_again(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """As another process finds the records."""
    monkeypatch.setattr(tuning, "costs", CostTable(path))
    tuning.forget_choices()


def test_a_measured_choice_is_preferred_and_outlives_the_process(
    own_table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert best_choice(PROBLEM, CHIP) == choose(PROBLEM, CHIP)
    other = next(blocks for blocks in candidates(PROBLEM, CHIP) if blocks != choose(PROBLEM, CHIP).blocks)
    keep(PROBLEM, CHIP, other, 1.25e-5)
    look_again(monkeypatch, own_table)
    found = best_choice(PROBLEM, CHIP)
    assert (found.blocks, found.seconds, found.source) == (other, 1.25e-5, "measured")
    assert str(found).endswith("(measured)")


def test_the_fastest_of_several_records_counts(own_table: Path) -> None:
    first, second, third = candidates(PROBLEM, CHIP)[:3]
    for blocks, seconds in ((first, 3e-6), (second, 1e-6), (third, 2e-6), (second, 4e-6)):
        keep(PROBLEM, CHIP, blocks, seconds)
    assert tuning.measured(PROBLEM, CHIP) == (second, 1e-6)
    assert tuning.measured(PROBLEM, KNOWN_CHIPS[8, 6]) is None


def test_it_holds_for_sizes_nearby_and_one_chip() -> None:
    near, far = ConvProblem(300, 8192, 400, 320, 320, 9), ConvProblem(3000, 8192, 400, 320, 320, 9)
    keep(PROBLEM, CHIP, choose(PROBLEM, CHIP).blocks, 1e-6)
    assert KernelCase.of(near) == KernelCase.of(PROBLEM) != KernelCase.of(far)
    assert best_choice(near, CHIP).source == "measured"
    assert best_choice(far, CHIP).source == best_choice(PROBLEM, KNOWN_CHIPS[8, 6]).source == "model"


def test_a_choice_that_is_no_candidate_any_more_is_not_used() -> None:
    keep(PROBLEM, CHIP, ConvBlocks(1024, 1024, 64), 1e-6)
    assert best_choice(PROBLEM, CHIP).source == "model"


def test_a_broken_file_is_said_and_ignored(own_table: Path, caplog: pytest.LogCaptureFixture) -> None:
    own_table.write_text("{")
    assert best_choice(PROBLEM, CHIP).source == "model"
    assert "1 of 1 lines" in caplog.text and "no measured times" in caplog.text


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
