"""The command that compares methods, with the model that comes along and few steps."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fisedit_compile.bench.quality.task import Networks
from fisedit_compile.cli.eval import outlined
from fisedit_compile.cli.main import main


class PlainSession:
    """Stands for a session that generates: it does so without compiling, which this test has no use for."""

    def __init__(self, networks: Networks) -> None:
        self._networks = networks

    def generate(self, prompt: str, **arguments: Any) -> Any:
        return SimpleNamespace(image=self._networks.plain(prompt, **arguments).images[0])


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as raised:
        main(["eval", *words])
    told = capsys.readouterr()
    assert isinstance(raised.value.code, int)
    return raised.value.code, told.out, told.err


def test_it_writes_a_table_numbers_and_a_sheet_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Networks, "session", lambda networks: ("", PlainSession(networks)))
    output = tmp_path / "evaluation"
    words = [
        "--output",
        str(output),
        "--rows",
        "crop-and-stitch",
        "--kinds",
        "recolour",
        "--steps",
        "2",
        "--device",
        "cpu",
    ]
    code, out, _ = run(capsys, *words, "--count", "1")
    assert code == 0
    for text in ("success", "PSNR", "recall", "dense", "crop-and-stitch", "speed-up", "edits that succeeded"):
        assert text in out
    table = json.loads((output / "table.json").read_text())
    assert [row["row"] for row in table["rows"]] == ["dense", "crop-and-stitch"]
    stitched = table["rows"][1]
    assert stitched["edits"] == 1 and stitched["outside"]["value"] == "inf" and stitched["recall"]["value"] == 1.0
    assert 0 < stitched["dense_steps"]["value"] < 2 and table["settings"]["steps"] == 2
    names = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    pictures = ("base", "dense", "crop-and-stitch", "crop-and-stitch-mask")
    assert names == {
        *("settings.json", "results.jsonl", "table.json", "sheet.png"),
        *(f"pictures/recolour-000/{name}.png" for name in pictures),
    }
    with Image.open(output / "sheet.png") as sheet:
        assert sheet.width > 4 * 160
    before = (output / "results.jsonl").read_bytes()
    assert run(capsys, *words, "--count", "1")[0] == 0
    assert (output / "results.jsonl").read_bytes() == before
    words[words.index("--steps") + 1] = "3"
    code, _, error = run(capsys, *words)
    assert code == 1 and "other settings (steps: 2 there, 3 now)" in error


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--rows", "painted,guessed"], "got guessed"),
        (["--rows", ","], "got none"),
        (["--kinds", "paint"], "got paint"),
        (["--kinds", ","], "got none"),
        (["--count", "0"], "count"),
        (["--steps", "1"], "steps"),
    ],
)
def test_what_does_not_exist_is_refused_before_anything_is_made(
    words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = run(capsys, "--output", str(tmp_path / "new"), *words)
    assert code and told in error
    assert not (tmp_path / "new").exists()


def test_outlines_are_drawn_inside_the_mask() -> None:
    picture, mask = Image.new("RGB", (8, 8)), np.zeros((8, 8), dtype=bool)
    mask[2:6, 0:5] = True
    drawn = np.asarray(outlined(picture, mask)).any(axis=2)
    expected = mask.copy()
    expected[3:5, 0:4] = False  # the picture's edge is no outline
    assert np.array_equal(drawn, expected)
