"""The demo, with the model that comes with the package; its sheet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fisedit_compile.cli.demo import draw_photo, painted_mask
from fisedit_compile.cli.demo_sheet import ACCENT, CHANGE_FACTOR, SIDE, SheetRow, change, demo_sheet, outlined
from fisedit_compile.cli.main import main


def pixels(path: Path) -> NDArray[np.int_]:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "demo"
    with pytest.raises(SystemExit) as raised:
        main(["demo", "--output", str(output), "--steps", "4", "--device", "cpu"])
    assert raised.value.code == 0
    of_edits = {f"{name}{suffix}.png" for name in ("mask", "edited", "dense") for suffix in ("", "-2", "-3")}
    assert {path.name for path in output.iterdir()} == {"base.png", "photo.png", "sheet.png", *of_edits}

    base, swapped = pixels(output / "base.png"), pixels(output / "edited-2.png")
    # The mask is made of the latents' cells, each of four pixels, so it may reach so far beyond the brush.
    brush = np.asarray(painted_mask((base.shape[1], base.shape[0]))) > 0
    rows, columns = np.flatnonzero(brush.any(axis=1)), np.flatnonzero(brush.any(axis=0))
    changed = (base != swapped).any(axis=2)
    assert changed.any()
    assert not changed[: rows[0] - 4].any() and not changed[:, : columns[0] - 4].any()

    photo, edited, dense = (pixels(output / f"{name}.png") for name in ("photo", "edited-3", "dense-3"))
    outside = (pixels(output / "mask-3.png") == np.floor(0.6 * photo + 0.5)).all(axis=2)
    assert 0.3 < outside.mean() < 1
    assert (edited == photo)[outside].all() and (dense == photo)[outside].all()
    assert (edited != photo).any() and (dense != photo).any() and (edited != dense).any()

    told = capsys.readouterr().out
    assert "plain pipeline cannot open photos" in " ".join(told.split())
    lines = {line[:24].strip(): line[24:].split() for line in told.splitlines()}
    assert {"sparse steps", "PSNR inside, to dense"} < set(lines)
    assert lines["steps, sparse"] == ["0", "4", "4", "0", "4"]
    assert lines["difference outside"] == ["0", "0", "0"]
    _, words, painted, _, photo_edit = map(float, lines["total"])
    ratios = [float(ratio.rstrip("x")) for ratio in lines["speed-up"]]
    twins = map(float, lines["dense twin, total"])
    expected = [twin / own for twin, own in zip(twins, (words, painted, photo_edit), strict=True)]
    assert ratios == pytest.approx(expected, rel=0.05, abs=0.01)


def test_an_output_that_is_no_folder_is_refused_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as raised:
        main(["demo", "--output", str(tmp_path / "file")])
    assert raised.value.code == 1
    told = capsys.readouterr()
    assert "file" in told.err and not told.out


@pytest.mark.parametrize("size", [(128, 128), (256, 256), (256, 192)])
def test_what_is_painted_and_drawn_follows_the_pipelines_size(size: tuple[int, int]) -> None:
    mask = np.asarray(painted_mask(size)) > 127
    assert mask.shape == size[::-1]
    assert mask.mean() == pytest.approx(np.pi / 4 * (50 / 128) * (52 / 128), rel=0.05)
    assert draw_photo(size, 3).size == size


@pytest.fixture
def row() -> SheetRow:
    base = Image.new("RGB", (64, 32), (100, 100, 100))
    mask = Image.new("L", base.size, 0)
    mask.paste(255, (0, 0, 16, 32))
    edited = base.copy()
    edited.paste((100, 110, 103), (0, 0, 16, 32))
    return SheetRow("heading", "prompts", base, mask, edited, edited, "begun", "found", "fast", "slow")


def test_changes_are_multiplied_and_black_where_there_are_none(row: SheetRow) -> None:
    shown = np.asarray(change(row.base, row.edited))
    factor = SIDE // 32
    assert shown.shape == (32 * factor, 64 * factor, 3)
    assert (shown[:, : 16 * factor] == 10 * CHANGE_FACTOR).all() and not shown[:, 16 * factor :].any()


def test_the_outline_follows_the_inside_of_the_mask(row: SheetRow) -> None:
    shown = np.asarray(outlined(row.base, row.mask))
    red = (shown == ACCENT).all(axis=2)
    edge = 16 * (SIDE // 32)
    # The picture's own border is no edge of the mask.
    assert red[:, edge - 2 : edge].all() and red.sum() == 2 * shown.shape[0]
    assert (shown[:, : edge - 2] == 100).all() and (shown[:, edge:] > 180).all()


def test_the_sheet_shows_all_pictures_of_all_rows(row: SheetRow) -> None:
    sheet = demo_sheet([row, row])
    shown = np.asarray(sheet)
    factor = SIDE // 32
    changed = (shown == 10 * CHANGE_FACTOR).all(axis=2)
    assert changed.sum() == 2 * 2 * 16 * 32 * factor**2
    assert sheet.width > 6 * 64 * factor and sheet.height > 2 * SIDE


def test_large_pictures_are_not_enlarged_on_the_sheet(row: SheetRow) -> None:
    large = Image.new("RGB", (300, 300))
    assert change(large, large).size == (300, 300)
