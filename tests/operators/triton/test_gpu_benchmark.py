"""The program for a machine with a GPU, as far as it goes without one."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fisedit_compile.bench.conv_shapes import ConvShape
from fisedit_compile.bench.edit import Result, Settings
from support.kernel_cases import DEVICE
from support.tree import ROOT

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="goes through the program on a processor, with kernels")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = ROOT / "benchmarks" / "gpu.py"
    specification = importlib.util.spec_from_file_location("gpu_benchmark", path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, specification.name, module)
    specification.loader.exec_module(module)
    return module


def test_convolutions_alone(
    benchmark: ModuleType, kernels_run: None, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark.main(["convolutions", "--dry-run"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 4 to 8 | 64 |")]
    assert [row.split(" | ")[2] for row in rows] == ["square", "ragged"]
    aten, arguments = benchmark.conv_rows_aten, benchmark.ConvRows
    monkeypatch.setattr(benchmark.conv, "conv_rows", lambda *call: 1.1 * aten(arguments(*call)))
    with pytest.raises(SystemExit, match="a convolution is off by 0.1"):
        benchmark.main(["convolutions", "--dry-run"])


def test_networks(benchmark: ModuleType, capsys: pytest.CaptureFixture) -> None:
    benchmark.main(["networks", "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1:4] for line in lines if line.startswith("| scenes")] == [
        ["eager, channels last", "", ""],
        ["fisedit, launches one by one", "square", "0.1"],
        ["fisedit, launches one by one", "ragged", "0.1"],
        ["fisedit, CUDA graphs", "square", "0.1"],
        ["fisedit, CUDA graphs", "ragged", "0.1"],
    ]


def test_whole_edits(benchmark: ModuleType, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = benchmark.whole

    def run_edit(settings: Settings) -> Result:
        settings.check()
        seconds = {"dense steps": 2.0 if settings.tier == "host" else 1.0, "total": 3.0}
        return Result(settings, {}, dict.fromkeys((whole.DENSE, whole.USER, whole.AUTOMATIC), seconds))

    monkeypatch.setattr(whole, "run_edit", run_edit)
    benchmark.edits(benchmark.Run(torch.device("cpu"), torch.float16, 1), ["sd15"])
    lines = capsys.readouterr().out.splitlines()
    for tier, taken in (("device", "1.000"), ("host", "2.000")):
        assert f"| sd15 | {tier} | dense steps | {taken} | {taken} | {taken} |" in lines
        assert f"| sd15 | {tier} | total | 3.000 | 3.000 | 3.000 |" in lines
        assert f"| sd15 | {tier} | decode |  |  |  |" in lines


def test_sharing_rows_are_timed_where_they_can_be_chosen(benchmark: ModuleType, kernels_run: None) -> None:
    run = benchmark.Run(torch.device("cpu"), torch.float32, 1)
    halo, table, _ = benchmark._plan(ConvShape(16, 16, 9, 256, 256), "square", 0.5, run.device)
    rows, recorded = torch.randn(1, 128, 16), torch.randn(1, 256, 16)
    call = (rows, recorded, halo, table, torch.randn(16, 144), torch.randn(16), 1)
    problem = benchmark.conv.problem_of(rows, recorded, table, call[4], 1)
    small = benchmark.conv.ConvBlocks(16, 16, 16)
    found = benchmark.candidates(problem, benchmark.chip_of(run.device))
    (shared, *_) = [blocks for blocks in found if blocks.share]
    assert benchmark._sharing(run, problem, benchmark.replace(shared, share=False), [call]) > 0
    assert benchmark._sharing(run, problem, small, [call]) is None


@pytest.mark.parametrize("failing", ["memcheck", "racecheck", None])
def test_sanitizing_ends_the_program_where_something_is_found(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failing: str | None
) -> None:
    commands = []

    def run(command: list[str], env: dict[str, str], **options: object) -> subprocess.CompletedProcess:
        commands.append(command)
        assert env["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        return subprocess.CompletedProcess(command, int(command[2] == failing))

    monkeypatch.setattr(benchmark.shutil, "which", lambda name: f"/opt/{name}")
    monkeypatch.setattr(benchmark.subprocess, "run", run)
    folder = ROOT
    if failing is None:
        benchmark.sanitize()
        assert [command[2] for command in commands] == ["memcheck", "racecheck"]
        assert all((folder / part).is_file() for command in commands for part in command if part.endswith(".py"))
    else:
        with pytest.raises(SystemExit, match=f"--tool {failing} found an error"):
            benchmark.sanitize()


@pytest.mark.parametrize("part", ["kernels", "semantics"])
@pytest.mark.parametrize("failing", [False, True])
def test_tests_run_on_the_gpu_and_end_the_program_where_one_fails(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, part: str, failing: bool
) -> None:
    def run(command: list[str], env: dict[str, str], **options: object) -> subprocess.CompletedProcess:
        assert (env["FISEDIT_TEST_DEVICE"], env["TRITON_INTERPRET"]) == ("cuda", "0")
        paths = [given.removeprefix("--deselect=") for given in command if "tests/" in given]
        assert paths and all((benchmark.FOLDER / path).exists() for path in paths)
        return subprocess.CompletedProcess(command, int(failing))

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    if failing:
        with pytest.raises(SystemExit, match=f"{part}: tests fail"):
            benchmark.check(part)
    else:
        benchmark.check(part)


def test_without_a_sanitizer_it_says_so(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(benchmark.shutil, "which", lambda name: None)
    benchmark.sanitize()
    assert "not installed" in capsys.readouterr().out


def test_wrong_use(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["everything"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="there is no GPU"):
        benchmark.main(["convolutions"])


def test_convolutions_of_public_networks() -> None:
    """Channels and resolutions of Stable Diffusion 1.5 at 512 pixels.

    In a process of its own: creators of tensors that are replaced, as in all tests, do not follow the device ``meta``.
    """
    program = "from fisedit_compile.bench.conv_shapes import *\nprint([conv_shapes(m) for m in ('sd15', 'sdxl')])"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    shapes, larger = eval(done.stdout, {"ConvShape": ConvShape})
    assert ConvShape(4, 320, 9, 64 * 64, 64 * 64) in shapes, "the first"
    assert ConvShape(320, 320, 9, 64 * 64, 32 * 32) in shapes, "a downsampling one"
    assert ConvShape(640, 640, 9, 64 * 64, 64 * 64) in shapes, "an upsampling one"
    assert ConvShape(2560, 1280, 9, 8 * 8, 8 * 8) in shapes, "behind a skip connection"
    assert all(shape.taps == 9 for shape in shapes) and len(shapes) > 15
    assert ConvShape(320, 320, 9, 128 * 128, 128 * 128) in larger
