"""``fisedit bench``: dense and sparse calls of a network, side by side."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fisedit_compile.cli import bench_whole, options

if TYPE_CHECKING:
    from rich.table import Table

    from fisedit_compile.bench.unet import Result

app = typer.Typer(help="Measure dense and sparse calls side by side.", no_args_is_help=True)
app.command()(bench_whole.edit)
app.command()(bench_whole.ablation)


Shape = options.MaskShape
DataType = options.ShortType


class Lowering(StrEnum):
    """How the graphs of an edit run."""

    PLAIN = "plain"
    INDUCTOR = "inductor"


@app.callback()
def root() -> None:
    """Measure dense and sparse calls side by side."""


@app.command()
def unet(
    model: Annotated[
        str,
        typer.Option(
            help="sd15, sd21, sdxl or scenes; or the folder of a diffusers pipeline, of which only the U-Net's "
            "configuration is read. Weights are random.",
            metavar="NAME",
        ),
    ] = "sd15",
    size: Annotated[
        int | None, typer.Option(help="Side of the picture in pixels; the model's own when left out.", min=8)
    ] = None,
    densities: Annotated[
        str, typer.Option(help="Shares of active positions at the resolution of the latents, with commas between.")
    ] = "0.01,0.02,0.05,0.1,0.2,0.5",
    dtype: Annotated[DataType, typer.Option(help="Type of the weights.")] = DataType.FP32,
    shape: Annotated[
        Shape, typer.Option(help="Shape of the masks; ragged ones are like those found by comparing pictures.")
    ] = Shape.SQUARE,
    inductor: Annotated[bool, typer.Option("--inductor", help="Also measure torch.compile's own backend.")] = False,
    calls: Annotated[int, typer.Option(help="Different recorded calls that edits go through.", min=1)] = 4,
    repeats: Annotated[int, typer.Option(help="Rounds over all variants.", min=1)] = 5,
    norm: Annotated[options.Norm, typer.Option(help="Statistics of group norms in an edit.")] = options.Norm.EXACT,
    lowering: Annotated[Lowering, typer.Option(help="How sparse graphs run.")] = Lowering.PLAIN,
    storage: Annotated[
        DataType | None, typer.Option(help="Type in which feature maps are recorded; as computed when left out.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Batch of a call; 2 is one picture with guidance.", min=1)] = 2,
    device: options.Device = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, inputs and masks.", min=0)] = 0,
    threads: Annotated[
        int | None, typer.Option(help="Threads of the processor; PyTorch's choice when left out.", min=1)
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Also write all numbers to this JSON file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also plot to this file, such as plot.png: time against density, or size.")
    ] = None,
    sizes: Annotated[
        str | None,
        typer.Option(
            help="Measure several sides of the picture, with commas between, with an edited area of as many pixels in "
            "all; the one density is that of the smallest."
        ),
    ] = None,
) -> None:
    """Measure a U-Net: dense in several ways, and sparsely at several densities of the mask.

    All variants run in one process, round after round. Before a density is timed its results are checked.
    """
    shares = parse_densities(densities)
    sweep = parse_sizes(sizes, size, shares)
    options.quiet()
    import json
    from dataclasses import replace

    import torch
    from rich.console import Console

    from fisedit_compile.bench import plots
    from fisedit_compile.bench.unet import Settings, run_unet

    if plot is not None:
        plots.check_target(plot)
    if threads is not None:
        torch.set_num_threads(threads)
    settings = Settings(
        model=model,
        size=size,
        densities=shares,
        shape=shape.value,
        dtype=dtype.value,
        device=str(options.choose_device(device)),
        batch=batch,
        norm=norm.value,
        lowering=lowering.value,
        storage=None if storage is None else storage.value,
        inductor=inductor,
        calls=calls,
        repeats=repeats,
        seed=seed,
    )
    console = Console()
    several = []
    for side, share in sweep or ((size, None),):
        chosen = replace(settings, size=side, densities=shares if share is None else (share,))
        with Console(stderr=True).status("starting") as status:
            result = run_unet(chosen, status.update)
        for line in summary(result):
            console.print(line, highlight=False)
        console.print(table(result))
        several.append(result.as_dict())
    if output is not None:
        numbers = several if sweep else several[0]
        output.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    if plot is not None and sweep:
        plots.plot_sizes(several, plot)
    elif plot is not None:
        plots.plot_densities(several[0], plot)


def parse_densities(text: str) -> tuple[float, ...]:
    """Numbers above 0 and at most 1, with commas between.

    Raises:
        typer.BadParameter: the text is something else.
    """
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        shares = ()
    if not shares or not all(0.0 < share <= 1.0 for share in shares):
        raise typer.BadParameter(
            f"expected numbers above 0 and at most 1 such as 0.05,0.2; got {text!r}", param_hint="--densities"
        )
    return shares


def parse_sizes(text: str | None, size: int | None, shares: tuple[float, ...]) -> tuple[tuple[int, float], ...]:
    """Sides of the picture, smallest first, each with the density that keeps the edited area; empty without a text.

    Raises:
        typer.BadParameter: the text is something else, a single size was given as well, or not exactly one density.
    """
    if text is None:
        return ()
    try:
        sides = sorted({int(part) for part in text.split(",")})
    except ValueError:
        sides = []
    if not sides or sides[0] < 8:
        raise typer.BadParameter(f"expected numbers such as 256,512,768; got {text!r}", param_hint="--sizes")
    if size is not None or len(shares) != 1:
        raise typer.BadParameter("give no --size with it, and exactly one density", param_hint="--sizes")
    return tuple((side, shares[0] * (sides[0] / side) ** 2) for side in sides)


def _seconds(value: float) -> str:
    return f"{value * 1000:.2f} ms" if value < 0.1 else f"{value:.3f} s"


def summary(result: Result) -> list[str]:
    """What was measured, on what, and what happens once, in lines."""
    settings = result.settings
    size = "own size" if settings.size is None else f"{settings.size}x{settings.size}"
    machine = ", ".join(f"{name} {value}" for name, value in result.machine.items())
    return [
        f"{settings.model} U-Net, {size}, batch {settings.batch}, {settings.dtype}, {settings.shape} masks, "
        f"norm {settings.norm}, lowering {settings.lowering}",
        machine,
        f"{result.macs / 1e9:.1f} G multiply-accumulates a call, "
        f"{100 * result.sparse_mac_fraction:.1f} % of them on rows",
        f"first call after torch.compile {_seconds(result.first_call)}; recorded calls {_seconds(result.first_record)} "
        f"(first), {_seconds(result.record)} (later); {result.bytes_recorded / 2**20:.0f} MiB for "
        f"{settings.calls} calls",
        f"products of large matrices reach {result.peak / 1e12:.3g} TFLOP/s",
        f"set-up of an edit {_seconds(max(row.context for row in result.sparse))}",
        f"medians of {settings.calls} calls x {settings.repeats} interleaved rounds",
    ]


def table(result: Result) -> Table:
    """One row for each variant; speed-ups are over the fastest dense one."""
    from rich import box
    from rich.table import Table

    found = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    found.add_column("variant", no_wrap=True)
    for heading in ("call", "speed-up", "saved", "achieved", "peak", "loaded", "error"):
        found.add_column(heading, justify="right", no_wrap=True)
    best = result.best_dense.seconds
    for dense in result.dense:
        found.add_row(
            f"dense, {dense.name}",
            _seconds(dense.seconds),
            f"{best / dense.seconds:.2f}x",
            "1.0x",
            "",
            f"{100 * dense.of_peak:.0f} %",
        )
    for sparse in result.sparse:
        found.add_row(
            f"fisedit, {100 * sparse.density:g} %",
            _seconds(sparse.seconds),
            f"{sparse.speed_up:.2f}x",
            f"{sparse.arithmetic:.1f}x",
            f"{100 * sparse.achieved:.0f} %",
            f"{100 * sparse.of_peak:.0f} %",
            f"{sparse.bytes_loaded / 2**20:.0f} MiB",
            f"{sparse.deviation:.0e}",
        )
    return found
