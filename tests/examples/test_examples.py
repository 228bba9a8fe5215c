"""Every script in examples/ runs, and does what it says."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from support.tree import ROOT

FOLDER = ROOT / "examples"


def load(name: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where PyTorch's compiler looks names up
    spec.loader.exec_module(module)
    return module


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_every_example_is_tested() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    names = [path.stem for path in FOLDER.glob("*.py")]
    assert len(names) == 8 and all(f'load("{name}")' in source for name in names)


def test_own_network(capsys: pytest.CaptureFixture[str]) -> None:
    load("own_network").main()
    told = capsys.readouterr().out
    assert "in 10 calls" in told and "the same: True" in told
    assert float(told.rpartition(": ")[2]) > 0.01


def test_painted_edit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("painted_edit").main(tmp_path, steps=3)
    base, blue, yellow = (pixels(tmp_path / f"{name}.png") for name in ("base", "blue", "yellow"))
    # Far from the painted ellipse.
    assert np.array_equal(base[:40], blue[:40]) and np.array_equal(base[:40], yellow[:40])
    assert not np.array_equal(base, blue) and not np.array_equal(blue, yellow)
    assert "back at: a blue ball" in capsys.readouterr().out


def test_edit_by_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("edit_by_words").main(tmp_path, steps=3)
    assert not np.array_equal(pixels(tmp_path / "base.png"), pixels(tmp_path / "fireworks.png"))
    assert "the mask covers" in capsys.readouterr().out


def test_edit_photo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("edit_photo").main(tmp_path, steps=3)
    photo, mask, edited = (pixels(tmp_path / f"{name}.png") for name in ("photo", "photo-mask", "photo-blue"))
    assert photo.shape == edited.shape == (300, 300, 3)
    assert np.array_equal(photo[mask == 0], edited[mask == 0]) and not np.array_equal(photo, edited)
    assert "left at the seam" in capsys.readouterr().out


def test_strokes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("strokes").main(tmp_path, steps=4)
    sample, painted, melted = (pixels(tmp_path / f"{name}.png") for name in ("sample", "painted", "melted"))
    # Three pixels around the ellipse.
    assert np.array_equal(sample[:17], melted[:17]) and np.array_equal(sample[:, 34:], melted[:, 34:])
    assert not np.array_equal(painted[20:35, 12:31], melted[20:35, 12:31])
    assert "of the pixels could change" in capsys.readouterr().out


def test_save_explanation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("save_explanation").main(tmp_path)
    numbers = json.loads((tmp_path / "explanation.json").read_text())
    assert numbers["sparse share"] == 1.0 and numbers["dense operators"] == []
    costs = list(numbers["arithmetic of an edit, of a dense call"].values())
    assert costs == sorted(costs) and 0 < costs[0] < 0.05
    assert "multiply-accumulates" in (tmp_path / "explanation.txt").read_text()
    assert (tmp_path / "flow.svg").read_text().startswith("<svg")
    assert "of the arithmetic" in capsys.readouterr().out


def test_label_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("label_map").main(tmp_path, widths=(3, 1), size=64, repeats=1)
    told = capsys.readouterr().out
    assert told.startswith("100.0% of the arithmetic is sparse") and told.count("bit by bit the same: True") == 2
    assert all(f"width {width}: 5.9% of the picture changed" in told for width in (3, 1)) and "times as fast" in told
    for width in (3, 1):
        before, edited, dense = (
            pixels(tmp_path / f"width-{width}-{name}.png") for name in ("before", "edited", "dense")
        )
        car = np.zeros((64, 64), dtype=bool)
        car[42:54, 22:42] = True
        assert np.array_equal(before[~car], edited[~car]) and not np.array_equal(before[car], edited[car])
        # The edit is nearer to what the generator makes of the new map than the picture before.
        distances = [np.abs(picture[car].astype(float) - dense[car]).mean() for picture in (edited, before)]
        assert distances[0] < 0.5 * distances[1]


def test_segmentation(capsys: pytest.CaptureFixture[str]) -> None:
    load("segmentation").main(width=4, size=64)
    told = capsys.readouterr().out
    assert "100.0% of the arithmetic is sparse" in told and "outside, the same classes: True" in told
    assert "times as fast" in told
    assert float(told.partition("of the dense run: ")[2].partition("%")[0]) > 90
    assert int(told.rpartition(": ")[2]) > 0
