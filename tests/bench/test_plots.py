"""Plots of made-up numbers: what is drawn, and what is refused before anything is measured."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image

from fisedit_compile.bench import plots
from fisedit_compile.cli.bench import parse_sizes
from fisedit_compile.errors import MissingPackageError, OptionError

pytest.importorskip("matplotlib")


def numbers(size: int | None = 512, densities: tuple[float, ...] = (0.02, 0.1, 0.2)) -> dict[str, Any]:
    return {
        "settings": {"model": "sd15", "size": size, "batch": 2, "dtype": "fp32", "shape": "square"},
        "dense": [{"name": "eager", "seconds": 6.3}, {"name": "channels last", "seconds": 6.2}],
        "sparse": [
            {"density": d, "seconds": 8 * d, "fastest": 7.5 * d, "slowest": 9 * d, "arithmetic": 0.9 / d}
            for d in densities
        ],
    }


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The axes of every figure that is finished."""
    found: list[Any] = []
    finish = plots._finish

    def spy(figure: Any, axes: Any, path: Path) -> None:
        found.append(axes)
        finish(figure, axes, path)

    monkeypatch.setattr(plots, "_finish", spy)
    return found


def test_time_against_density(tmp_path: Path, drawn: list[Any]) -> None:
    path = tmp_path / "new" / "plot.png"
    plots.plot_densities(numbers(densities=(0.1, 0.02)), path)
    assert Image.open(path).width > 600
    lines = {line.get_label(): line for line in drawn[0].get_lines()}
    assert list(lines["best dense call"].get_ydata()) == [6.2, 6.2]
    bound = lines["arithmetic bound"]
    assert list(bound.get_xdata()) == [2.0, 10.0]
    assert list(bound.get_ydata()) == pytest.approx([6.2 * 0.02 / 0.9, 6.2 * 0.1 / 0.9])
    labels = [text.get_text() for text in drawn[0].get_legend().get_texts()]
    assert labels == ["best dense call", "arithmetic bound", "fisedit, median and range"]


def test_time_against_size_is_sorted_and_names_the_area(tmp_path: Path, drawn: list[Any]) -> None:
    several = [numbers(512, (0.04,)), numbers(256, (0.16,))]
    plots.plot_sizes(several, tmp_path / "plot.svg")
    lines = {line.get_label(): line for line in drawn[0].get_lines()}
    assert list(lines["best dense call"].get_xdata()) == [256, 512]
    assert "102x102 pixels" in drawn[0].get_title()
    assert "<svg" in (tmp_path / "plot.svg").read_text()


def test_an_ending_that_cannot_be_written(tmp_path: Path) -> None:
    plots.check_target(tmp_path / "plot.pdf")
    with pytest.raises(OptionError, match="ending in one of .*png"):
        plots.check_target(tmp_path / "plot.docx")


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = builtins.__import__

    def without(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return usual(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingPackageError, match=r"matplotlib.*fisedit-compile\[plot\]"):
        plots.check_target(Path("plot.png"))


def test_sizes_keep_the_edited_area() -> None:
    assert parse_sizes(None, None, (0.1, 0.2)) == ()
    assert parse_sizes("512, 256", None, (0.2,)) == ((256, 0.2), (512, 0.05))


@pytest.mark.parametrize(
    ("text", "size", "shares"),
    [("a", None, (0.1,)), ("", None, (0.1,)), ("256", 256, (0.1,)), ("256", None, (0.1, 0.2))],
)
def test_sizes_that_make_no_sense(text: str, size: int | None, shares: tuple[float, ...]) -> None:
    with pytest.raises(typer.BadParameter):
        parse_sizes(text, size, shares)
