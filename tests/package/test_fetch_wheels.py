"""Which wheels are fetched for a machine without a network."""

from __future__ import annotations

from pathlib import Path

import pytest

from fetch_wheels import main, missing


def test_what_is_there_and_what_pytorch_brings_is_left_out() -> None:
    pinned = ["# tested", "numpy==2.4.0", "Markdown_It.Py==3.0", "torch==2.13.0", "triton==3.6.0", "tqdm==4.67.1"]
    assert missing(pinned, ["markdown-it-py==4.0.0", "numpy==2.1.0"]) == ["tqdm==4.67.1"]


def test_nothing_to_fetch(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "there.txt"
    path.write_text((Path(__file__).parents[2] / "constraints.txt").read_text())
    assert main(["--installed", str(path)]) == 0
    assert "nothing is missing" in capsys.readouterr().out


def test_what_is_missing_is_asked_of_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    class Done:
        returncode = 3

    monkeypatch.setattr("fetch_wheels.subprocess.run", lambda command, check: commands.append(command) or Done())
    path = tmp_path / "there.txt"
    path.write_text("\n".join(_pins()[1:]))
    assert main(["--installed", str(path), "--output", str(tmp_path), "--python", "3.12"]) == 3
    (command,) = commands
    assert (
        command[-1] == _pins()[0] and "3.12" in command and "--no-deps" in command and "--only-binary=:all:" in command
    )


def _pins() -> list[str]:
    lines = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line and line[0] != "#" and not line.startswith(("torch==", "triton=="))]
