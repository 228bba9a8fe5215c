"""Checking every operator once, what is done about wrong ones, and the report of a few minutes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import gpu_minutes
import kernel_checks
from fisedit_compile.operators import OPERATORS
from kernel_checks import MAKERS, Case, cases, error_of, smallest_wrong, states, supervise

CPU = torch.device("cpu")


def test_all_operators_with_kernels_are_checked() -> None:
    with_kernels = {
        operator.name
        for operator in OPERATORS.values()
        if any(known.name == "triton" for known in operator.implementations)
    }
    assert with_kernels == set(MAKERS) == {case.operator for case in cases(dry=False)}


@pytest.mark.parametrize("case", cases(dry=True), ids=lambda case: case.operator)
def test_right_operators_are_right(case: Case) -> None:
    assert error_of(case, CPU) < 1e-5


def test_a_wrong_operator_is_made_smaller_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(case: Case, arguments: list[Any], device: torch.device) -> torch.Tensor:
        map, index = arguments
        return map[:, index[0]] + (map.shape[2] > 16)

    monkeypatch.setattr(kernel_checks, "computed", wrong)
    case = Case("gather_rows", "fp32", side=16, inputs=64, heads=1)
    monkeypatch.setattr(kernel_checks, "cases", lambda dry: [case])
    kernel_checks.check_all(CPU, tmp_path / "lines.jsonl", True, frozenset())
    (found,) = states(tmp_path / "lines.jsonl").values()
    assert found["state"] == "wrong" and found["error"] > 0.1
    smallest = found["smallest"]
    assert (smallest["batch"], smallest["side"], smallest["inputs"]) == (1, 4, 32)
    with safe_open(str(tmp_path / found["file"]), "pt") as file:
        assert json.loads(file.metadata()["case"]) == smallest
        assert file.get_tensor("argument_0").shape == (1, 16, 32)


def test_results_that_are_not_finite_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_checks, "computed", lambda *arguments: torch.full((1,), math.nan))
    assert not kernel_checks.is_right(Case("gather_rows", "fp32", side=8, inputs=16), CPU)


def test_making_smaller_ends_where_nothing_is_wrong_any_more() -> None:
    case = Case("conv_rows", "fp32", side=64, inputs=64, outputs=64, heads=1)
    found = smallest_wrong(case, lambda small: small.outputs >= 32 and small.side >= 16)
    assert (found.batch, found.side, found.outputs, found.inputs) == (1, 16, 32, 8)
    assert smallest_wrong(case, lambda small: False) == case


CRASHES = """
import json, os, sys
path, names = sys.argv[1], ["first", "second", "third"]
done = {json.loads(line)["case"] for line in open(path)} if os.path.exists(path) else set()
for name in names:
    if name in done:
        continue
    with open(path, "a") as lines:
        print(json.dumps({"case": name, "state": "started"}), file=lines)
    if name == "second":
        os._exit(7)
    with open(path, "a") as lines:
        print(json.dumps({"case": name, "state": "right"}), file=lines)
"""


def test_a_case_that_ends_the_process_is_noted_and_the_others_go_on(tmp_path: Path) -> None:
    output = tmp_path / "lines.jsonl"
    found = supervise([sys.executable, "-c", CRASHES, str(output)], output, 3, 60.0)
    assert [last["state"] for last in found.values()] == ["right", "crashed", "right"]
    assert found["second"]["why"] == "exit status 7"


def test_processes_that_do_nothing_are_not_started_for_ever(tmp_path: Path) -> None:
    assert supervise([sys.executable, "-c", ""], tmp_path / "lines.jsonl", 3, 60.0) == {}


def work(program: str, **settings: Any) -> gpu_minutes.Work:
    """A piece of work that a program in Python does."""
    chosen = {"name": "work", "title": "Some work", "needs": 1.0, "summary": lambda path: [path.read_text()]}
    return gpu_minutes.Work(command=(sys.executable, "-c", program, "{output}"), **(chosen | settings))


WRITES = "import sys; open(sys.argv[1], 'w').write('[1]'); print('printed', flush=True)"


def test_work_is_done_and_summed_up(tmp_path: Path) -> None:
    outcome = gpu_minutes.perform(work(WRITES), tmp_path, 60.0)
    assert (outcome.state, outcome.result, outcome.lines) == ("done", [1], ["[1]"])


def test_work_that_no_longer_fits_is_left_out(tmp_path: Path) -> None:
    outcome = gpu_minutes.perform(work(WRITES, needs=30.0), tmp_path, 20.0)
    assert (outcome.state, outcome.why, outcome.lines) == ("left out", "needs about 30 s, 20 s were left", [])
    assert not list(tmp_path.iterdir())


def test_work_that_fails_shows_its_end_and_keeps_its_result(tmp_path: Path) -> None:
    outcome = gpu_minutes.perform(work(f"{WRITES}; sys.exit('no such kernel')"), tmp_path, 60.0)
    assert (outcome.state, outcome.why) == ("failed", "exit status 1")
    assert outcome.lines == ["[1]", "```", "printed", "no such kernel", "```"]


def test_work_that_hangs_is_stopped(tmp_path: Path) -> None:
    outcome = gpu_minutes.perform(work("import time; time.sleep(60)", needs=0.1), tmp_path, 0.5)
    assert (outcome.state, outcome.why) == ("stopped", "not done in 0 s")


def test_a_failure_does_not_keep_others_from_being_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = [work("import sys; sys.exit(3)", name="bad", title="Bad"), work(WRITES, name="good", title="Good")]
    monkeypatch.setattr(gpu_minutes, "works", lambda device, folder, dry: pieces)
    assert gpu_minutes.spend(1.0, tmp_path / "report", CPU, True) == 1
    content = json.loads((tmp_path / "report" / "gpu.json").read_text())
    assert [outcome["state"] for outcome in content["work"]] == ["failed", "done"]
    assert content["versions"]["torch"] == torch.__version__ and content["machine"]["threads"]
    text = (tmp_path / "report" / "gpu.md").read_text()
    assert "## Bad\n\nfailed: exit status 3" in text and "## Good\n\ndone" in text


def test_whole_edits_are_a_table_of_stages(tmp_path: Path) -> None:
    path = tmp_path / "edit.json"
    path.write_text(json.dumps({"seconds": {"dense": {"steps": 2.0, "total": 3.0}, "fisedit": {"total": 0.5}}}))
    assert gpu_minutes.edit_lines(path) == [
        "| stage | dense | fisedit |",
        "| --- | --- | --- |",
        "| steps | 2.000 s |  |",
        "| total | 3.000 s | 0.500 s |",
    ]


def test_the_tests_that_a_gpu_runs_are_there() -> None:
    for paths in gpu_minutes.GPU_TESTS.values():
        assert all((gpu_minutes.FOLDER / path.removeprefix("--deselect=")).exists() for path in paths)


def test_the_dry_run_goes_through_everything(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", str(gpu_minutes.FOLDER / "benchmarks" / "gpu.py")]
    command += ["--minutes", "6", "--dry-run", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {work["name"]: work for work in json.loads((tmp_path / "gpu.json").read_text())["work"]}
    assert {name: work["state"] for name, work in found.items()} == dict.fromkeys(("kernels", "sd15"), "done")
    assert all(last["state"] == "right" for last in found["kernels"]["result"])
    assert found["sd15"]["result"]["sparse"][0]["seconds"] > 0
    text = (tmp_path / "gpu.md").read_text()
    assert f"{len(MAKERS)} of {len(MAKERS)} right." in text and "| fisedit, 5 % |" in text
