"""The program for a machine with a GPU, as far as it goes without one."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fisedit_compile.bench.conv_shapes import ConvShape, conv_shapes


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
    specification = importlib.util.spec_from_file_location("gpu_benchmark", path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_convolutions_alone(
    benchmark: ModuleType, kernels_run: None, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark.main(["convolutions", "--dry-run"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 4 to 8 | 64 |")]
    assert [row.split(" | ")[2] for row in rows] == ["square", "ragged"]
    monkeypatch.setattr(benchmark.conv, "conv_rows", lambda *call: 1.1 * benchmark.conv_rows_aten(*call))
    with pytest.raises(SystemExit, match="a convolution is off by 0.1"):
        benchmark.main(["convolutions", "--dry-run"])


def test_networks(benchmark: ModuleType, capsys: pytest.CaptureFixture) -> None:
    benchmark.main(["networks", "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1:4] for line in lines if line.startswith("| scenes")] == [
        ["eager, channels last", "", ""],
        ["fisedit", "square", "0.1"],
        ["fisedit", "ragged", "0.1"],
    ]


def test_wrong_use(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["everything"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="there is no GPU"):
        benchmark.main(["convolutions"])


def test_convolutions_of_public_networks() -> None:
    """Channels and resolutions of Stable Diffusion 1.5 at 512 pixels."""
    shapes = conv_shapes("sd15")
    assert ConvShape(4, 320, 9, 64 * 64, 64 * 64) in shapes, "the first"
    assert ConvShape(320, 320, 9, 64 * 64, 32 * 32) in shapes, "a downsampling one"
    assert ConvShape(2560, 1280, 9, 8 * 8, 8 * 8) in shapes, "behind a skip connection"
    assert all(shape.taps == 9 for shape in shapes) and len(shapes) > 15
    assert ConvShape(320, 320, 9, 128 * 128, 128 * 128) in conv_shapes("sdxl")
