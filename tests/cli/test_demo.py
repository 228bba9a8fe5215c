"""The demo, with the model that comes with the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fisedit_compile.cli.main import main


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "demo"
    with pytest.raises(SystemExit) as raised:
        main(["demo", "--output", str(output), "--steps", "4", "--device", "cpu"])
    assert raised.value.code == 0
    names = {path.name for path in output.iterdir()}
    assert names == {
        *("base.png", "mask.png", "edited.png", "dense.png"),
        *("mask-2.png", "edited-2.png", "dense-2.png", "sheet.png"),
    }
    base, recoloured = (np.asarray(Image.open(output / name)) for name in ("base.png", "edited-2.png"))
    assert base.shape == (128, 128, 3)
    changed = (base != recoloured).any(axis=2)
    assert changed.any() and not changed[:50].any() and not changed[:, :30].any()
    told = capsys.readouterr().out
    for row in ("sparse steps", "speed-up over plain", "PSNR inside, to dense"):
        assert row in told
    outside = next(line for line in told.splitlines() if "difference outside" in line)
    assert [cell.strip() for cell in outside.split("│")[2:5]] == ["", "0", "0"]
