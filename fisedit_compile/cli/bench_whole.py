"""``fisedit bench edit`` and ``fisedit bench ablation``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fisedit_compile.cli import options

if TYPE_CHECKING:
    from rich.table import Table

    from fisedit_compile.bench.ablation import Result as AblationResult
    from fisedit_compile.bench.edit import Result as EditResult
    from fisedit_compile.bench.edit import Settings as EditSettings

Model = Annotated[str, typer.Option(help="sd15, sd21 or sdxl with random weights; or scenes, trained.", metavar="NAME")]
Size = Annotated[int | None, typer.Option(help="Side of the picture in pixels; the model's own when left out.", min=8)]
Density = Annotated[float, typer.Option(help="Share of active positions at the resolution of the latents.")]
Type = Annotated[options.ShortType, typer.Option(help="Type of the weights.")]
Shape = Annotated[options.MaskShape, typer.Option(help="Shape of the mask.")]
Repeats = Annotated[int, typer.Option(help="Rounds over all variants.", min=1)]
Seed = Annotated[int, typer.Option(help="Seed of weights, inputs and mask.", min=0)]
Threads = Annotated[int | None, typer.Option(help="Threads of the processor; PyTorch's choice when left out.", min=1)]
Output = Annotated[Path | None, typer.Option(help="Also write all numbers to this JSON file.")]


def edit(
    model: Model = "sd15",
    size: Size = None,
    density: Density = 0.1,
    shape: Shape = options.MaskShape.SQUARE,
    steps: Annotated[int, typer.Option(help="Steps of a whole edit.", min=2)] = 50,
    timed_steps: Annotated[
        int | None, typer.Option(help="Steps that are run, the others are extrapolated; 5 when left out.", min=2)
    ] = None,
    scheduler: Annotated[
        options.SchedulerName, typer.Option(help="Scheduler; lcm: of a latent consistency model.", case_sensitive=False)
    ] = options.SchedulerName.DDIM,
    dtype: Type = options.ShortType.FP32,
    norm: Annotated[options.Norm, typer.Option(help="Statistics of group norms in an edit.")] = options.Norm.EXACT,
    storage: Annotated[
        options.ShortType | None, typer.Option(help="Type in which feature maps are recorded; as computed if left out.")
    ] = None,
    tier: Annotated[options.Tier, typer.Option(help="Where feature maps are kept.")] = options.Tier.DEVICE,
    decoder: Annotated[
        options.BenchmarkDecoder, typer.Option(help="How edits are decoded; tiny: by AutoencoderTiny.")
    ] = options.BenchmarkDecoder.AUTO,
    repeats: Repeats = 3,
    device: options.Device = None,
    seed: Seed = 0,
    threads: Threads = None,
    output: Output = None,
) -> None:
    """Measure a whole edit by stage: text, steps, mask, decode; the dense pipeline against edit sessions.

    Few steps are run; what the U-Net's calls took is extrapolated to all steps, the other stages are as measured.
    """
    check_density(density)
    options.quiet()
    import torch
    from rich.console import Console

    from fisedit_compile.bench.edit import Settings, run_edit

    if threads is not None:
        torch.set_num_threads(threads)
    settings = Settings(
        model=model,
        size=size,
        density=density,
        shape=shape.value,
        steps=steps,
        timed_steps=min(5, steps) if timed_steps is None else timed_steps,
        scheduler=scheduler.value,
        dtype=dtype.value,
        device=str(options.choose_device(device)),
        norm=norm.value,
        storage=None if storage is None else storage.value,
        tier=tier.value,
        decoder=decoder.value,
        repeats=repeats,
        seed=seed,
    )
    with Console(stderr=True).status("starting") as status:
        result = run_edit(settings, status.update)
    console = Console()
    for line in edit_summary(result):
        console.print(line, highlight=False, markup=False)
    console.print(edit_table(result))
    write_numbers(output, result.as_dict())


def ablation(
    model: Model = "sd15",
    size: Size = None,
    density: Density = 0.1,
    shape: Shape = options.MaskShape.SQUARE,
    dtype: Type = options.ShortType.FP32,
    batch: Annotated[int, typer.Option(help="Batch of a call; 2 is one picture with guidance.", min=1)] = 2,
    inductor: Annotated[
        bool, typer.Option("--inductor", help="Compile the second dense row by PyTorch's compiler.")
    ] = False,
    calls: Annotated[int, typer.Option(help="Different recorded calls that edits go through.", min=1)] = 2,
    repeats: Repeats = 3,
    device: options.Device = None,
    seed: Seed = 0,
    threads: Threads = None,
    output: Output = None,
) -> None:
    """Measure a U-Net with the compiler's passes switched on one group after the other.

    Beside it stands the ablation that FISEdit's authors published, of their steps on their machine.
    """
    check_density(density)
    options.quiet()
    import torch
    from rich.console import Console

    from fisedit_compile.bench.ablation import Settings, run_ablation

    if threads is not None:
        torch.set_num_threads(threads)
    settings = Settings(
        model=model,
        size=size,
        density=density,
        shape=shape.value,
        dtype=dtype.value,
        device=str(options.choose_device(device)),
        batch=batch,
        inductor=inductor,
        calls=calls,
        repeats=repeats,
        seed=seed,
    )
    with Console(stderr=True).status("starting") as status:
        result = run_ablation(settings, status.update)
    console = Console()
    size_text = "own size" if size is None else f"{size}x{size}"
    mask_text = f"{settings.shape} mask, {100 * density:g} % active"
    console.print(
        f"{model} U-Net, {size_text}, batch {batch}, {settings.dtype}, {mask_text}", highlight=False, markup=False
    )
    console.print(machine_line(result.machine), highlight=False, markup=False)
    console.print(ablation_table(result))
    console.print(
        "dense, compiled: the backend's dense graph, which is PyTorch's own operators. Further rows add what runs on "
        "active positions only. FISEdit's rows are its authors' own numbers at 768x768 on their GPU: only ratios "
        "compare, and its kernels are others than ours.",
        highlight=False,
    )
    write_numbers(output, result.as_dict())


def check_density(density: float) -> None:
    """Refuse a share that is none.

    Raises:
        typer.BadParameter: it is not above 0 and at most 1.
    """
    if not 0.0 < density <= 1.0:
        raise typer.BadParameter(f"expected a number above 0 and at most 1, got {density}", param_hint="--density")


def write_numbers(output: Path | None, numbers: dict[str, object]) -> None:
    """Write numbers to a JSON file, if one was named."""
    if output is not None:
        output.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


def machine_line(machine: dict[str, str]) -> str:
    """What was measured on, in one line."""
    return ", ".join(f"{name} {value}" for name, value in machine.items())


def edit_summary(result: EditResult) -> list[str]:
    """What was measured, what was extrapolated, and what is not in the table."""
    settings = result.settings
    size = "own size" if settings.size is None else f"{settings.size}x{settings.size}"
    seam = "not measured" if result.seam is None else f"{result.seam:.3f}"
    return [
        f"{settings.model} pipeline, {size}, one picture with guidance, {settings.scheduler}, {settings.dtype}, "
        f"{settings.shape} mask, "
        f"{100 * result.active:.1f} % active, norm {settings.norm}",
        machine_line(result.machine),
        _steps_told(settings),
        f"the automatic variant is composed: finding a mask by probes, for {result.dense_steps:g} dense steps, and "
        f"{settings.steps} steps with the given mask",
        f"decoder: {result.decoder} ({result.decoder_reason}); greatest difference at the seam {seam}",
        f"before, once: {result.generation:.2f} s for the recorded run of {settings.timed_steps} steps, "
        f"{result.generation_setup:.2f} s for tracing and compiling; {result.cache_bytes / 2**20:.0f} MiB recorded, "
        f"{result.decoder_bytes / 2**20:.0f} MiB of it for the decode",
    ]


def _steps_told(settings: EditSettings) -> str:
    """How many steps were run, and what follows from it."""
    runs = f"medians of {settings.repeats} runs, taking turns"
    if settings.timed_steps == settings.steps:
        return f"all {settings.steps} steps were run; {runs}"
    return (
        f"{settings.timed_steps} steps were run and timed; U-Net steps are extrapolated to {settings.steps}, all other "
        f"stages are as measured; {runs}"
    )


def _plain_table() -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)


def edit_table(result: EditResult) -> Table:
    """One row for each stage, with its speed-up, and the total."""
    from fisedit_compile.bench.edit import STAGES

    table = _plain_table()
    table.add_column("stage", no_wrap=True)
    for name in result.seconds:
        table.add_column(name, justify="right")
    for stage in (*STAGES, "total"):
        cells = []
        for name, seconds in result.seconds.items():
            ratio = result.speed_up(name, stage) if stage not in ("dense steps", "prepare") else None
            cells.append(f"{seconds.get(stage, 0.0):.3f} s" + ("" if ratio is None else f" ({ratio:.2f}x)"))
        table.add_row(stage, *cells)
    return table


def ablation_table(result: AblationResult) -> Table:
    """Our rows, and beside them those of FISEdit that add the same."""
    from fisedit_compile.bench.ablation import PUBLISHED

    table = _plain_table()
    table.add_column("fisedit-compile", no_wrap=True)
    for heading in ("on rows", "call", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("FISEdit", no_wrap=True)
    for heading in ("it/s", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    baseline = PUBLISHED[0][1]
    for row in result.rows:
        own = row.name, f"{100 * row.on_rows:.1f} %", f"{row.seconds:.3g} s", f"{row.ratio:.2f}x"
        if row.published is None:
            table.add_row(*own)
            continue
        name, rate = PUBLISHED[row.published]
        table.add_row(*own, name, f"{rate:.2f}", f"{rate / baseline:.1f}x")
    return table
