"""Plots of what ``fisedit bench unet`` measured: time against density, and time against resolution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fisedit_compile.errors import MissingPackageError, OptionError

#: Colours that people with colour vision deficiency can tell apart.
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#666666"


def require_matplotlib() -> Any:
    """``matplotlib.figure.Figure``; it needs no display.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError("matplotlib", "plots", extra="plot") from error
    return Figure


def check_target(path: Path) -> None:
    """Find out before a long measurement whether a plot can be written.

    Raises:
        MissingPackageError: matplotlib is not installed.
        OptionError: it does not know the file's ending.
    """
    known = require_matplotlib()().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise OptionError(f"cannot plot to {path}; expected a file ending in one of {', '.join(sorted(known))}")


def plot_densities(numbers: Mapping[str, Any], path: Path) -> None:
    """Seconds of a call against the active share, with the best dense call and the arithmetic bound.

    The bound is the best dense call divided by the saved arithmetic: what a sparse call would take if each of its
    multiply-accumulates were as fast as a dense one.

    Args:
        numbers: ``Result.as_dict()`` of ``fisedit_compile.bench.unet``, or its JSON file's content.
        path: of the picture; its ending decides the format.
    """
    rows = sorted(numbers["sparse"], key=lambda row: row["density"])
    dense = min(row["seconds"] for row in numbers["dense"])
    shares = [100 * row["density"] for row in rows]
    figure = require_matplotlib()(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.axhline(dense, color=GREY, linestyle="--", label="best dense call")
    bound = [dense / row["arithmetic"] for row in rows]
    axes.plot(shares, bound, color=ORANGE, linestyle=":", marker=".", label="arithmetic bound")
    _measured(axes, shares, rows, "fisedit, median and range")
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain_ticks(axes, shares, [f"{share:g}" for share in shares])
    axes.set_xlabel("active positions at the latents, %")
    axes.set_title(f"{_title(numbers['settings'])}, {_size(numbers['settings'])}", fontsize="medium")
    _finish(figure, axes, path)


def plot_sizes(several: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Seconds of a call against the picture's side, with an edited area of a fixed number of pixels.

    Args:
        several: one ``Result.as_dict()`` of ``fisedit_compile.bench.unet`` for each size, of one density each.
        path: of the picture; its ending decides the format.
    """
    several = sorted(several, key=lambda numbers: numbers["settings"]["size"])
    sides = [numbers["settings"]["size"] for numbers in several]
    rows = [numbers["sparse"][0] for numbers in several]
    dense = [min(row["seconds"] for row in numbers["dense"]) for numbers in several]
    figure = require_matplotlib()(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(sides, dense, color=GREY, linestyle="--", marker="s", label="best dense call")
    bound = [seconds / row["arithmetic"] for seconds, row in zip(dense, rows, strict=True)]
    axes.plot(sides, bound, color=ORANGE, linestyle=":", marker=".", label="arithmetic bound")
    _measured(axes, sides, rows, "fisedit, median and range")
    axes.set_yscale("log")
    labels = [f"{side}\n{100 * row['density']:.3g} %" for side, row in zip(sides, rows, strict=True)]
    _plain_ticks(axes, sides, labels)
    axes.set_xlabel("side of the picture in pixels, and active share")
    area = round((rows[0]["density"] ** 0.5) * sides[0])
    axes.set_title(f"{_title(several[0]['settings'])}, an area of {area}x{area} pixels edited", fontsize="medium")
    _finish(figure, axes, path)


def _measured(axes: Any, places: Sequence[float], rows: Sequence[Mapping[str, float]], label: str) -> None:
    seconds = [row["seconds"] for row in rows]
    below = [row["seconds"] - row["fastest"] for row in rows]
    above = [row["slowest"] - row["seconds"] for row in rows]
    axes.errorbar(places, seconds, yerr=(below, above), color=BLUE, marker="o", capsize=3, label=label)


def _plain_ticks(axes: Any, places: Sequence[float], labels: Sequence[str]) -> None:
    axes.set_xticks(places, labels)
    axes.set_xticks([], minor=True)


def _finish(figure: Any, axes: Any, path: Path) -> None:
    axes.set_ylabel("seconds of a call")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(True, which="both", linewidth=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _title(settings: Mapping[str, Any]) -> str:
    return f"{settings['model']} U-Net, batch {settings['batch']}, {settings['dtype']}, {settings['shape']} masks"


def _size(settings: Mapping[str, Any]) -> str:
    return "own size" if settings["size"] is None else f"{settings['size']}x{settings['size']}"
