"""Check and measure on a machine with an NVIDIA GPU: operators, tests, convolutions alone, networks, whole edits.

python benchmarks/gpu.py --minutes 9 --output FOLDER    # what tells most, in so many minutes; leaves a report
python benchmarks/gpu.py                       # everything; hours, most of it compiling
python benchmarks/gpu.py kernels edits --models sd15    # parts of it, for one network
python benchmarks/gpu.py convolutions --dry-run    # the same code on a CPU with tiny sizes; its times mean nothing

Numbers come after correctness: a part that finds a wrong result ends the program. Every result is printed as soon as it
is known, so a program that is stopped has not run in vain. FISEDIT_AUTOTUNE=1 measures block sizes while it runs; a
second run then uses them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import fisedit_compile as fisedit
from fisedit_compile.bench import edit as whole
from fisedit_compile.bench.conv_shapes import MODELS, ConvShape, conv_shapes
from fisedit_compile.bench.masks import make_mask
from fisedit_compile.bench.networks import build_unet, example_inputs
from fisedit_compile.bench.unet import DTYPES, describe_machine
from fisedit_compile.operators import pack_conv_weight
from fisedit_compile.operators.convolution import triton as conv
from fisedit_compile.operators.convolution.aten import conv_rows as conv_rows_aten
from fisedit_compile.operators.convolution.spec import ConvRows
from fisedit_compile.operators.triton import naive
from fisedit_compile.operators.triton.blocks import candidates
from fisedit_compile.operators.triton.chips import chip_of
from fisedit_compile.operators.triton.pointwise import add_bias
from fisedit_compile.operators.triton.reads import reads_cache
from fisedit_compile.operators.triton.tuning import best_choice, gpu_seconds
from fisedit_compile.runtime.plans import build_plan
from fisedit_compile.runtime.spec import Domain, PlanInput, Stencil
from fisedit_compile.runtime.tiers import TIERS
from gpu_minutes import GPU_TESTS as TESTS
from gpu_minutes import spend

PARTS = ("kernels", "semantics", "sanitizer", "convolutions", "networks", "edits")
#: Most processes that test beside each other, and failures after which they stop and show them.
WORKERS, FAILURES = 8, 10
DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.6)
SHAPES = ("square", "ragged")
FOLDER = Path(__file__).resolve().parents[1]
#: Different inputs that a measurement goes through, so that none finds its own in the caches.
ROTATED = 4


@dataclass(frozen=True)
class Run:
    """Where and how long to measure."""

    device: torch.device
    dtype: torch.dtype
    repeats: int
    densities: Sequence[float] = DENSITIES

    def kernel_seconds(self, calls: Sequence[Callable[[], object]]) -> float:
        """Median seconds of a call on the GPU alone, without what asking for it costs the host."""
        return gpu_seconds(calls) if self.device.type == "cuda" else self.seconds(calls)

    def seconds(self, calls: Sequence[Callable[[], object]]) -> float:
        """Median seconds of a call, taken in turn after two rounds to warm up."""
        for _ in range(2):
            for call in calls:
                call()
        if self.device.type != "cuda":
            found = []
            for call in [*calls] * self.repeats:
                started = time.perf_counter()
                call()
                found.append(time.perf_counter() - started)
            return statistics.median(found)
        pairs = []
        for call in [*calls] * self.repeats:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize(self.device)
        return statistics.median(start.elapsed_time(end) / 1e3 for start, end in pairs)


def line(*cells: object) -> None:
    """One row of a table in Markdown."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def _environment() -> dict[str, str]:
    return os.environ | {"FISEDIT_TEST_DEVICE": "cuda", "TRITON_INTERPRET": "0"}


def check(part: str) -> None:
    """Operators against the plain reference, or networks against the masked one, on the GPU."""
    workers = str(min(WORKERS, os.cpu_count() or 1))
    command = [sys.executable, "-m", "pytest", "-v", f"--maxfail={FAILURES}", "--durations=10"]
    # Neighbours share compiled networks and mostly stay with one process.
    command += ["-n", workers, "--dist", "worksteal", *TESTS[part]]
    if subprocess.run(command, cwd=FOLDER, env=_environment(), check=False).returncode:
        sys.exit(f"{part}: tests fail on the GPU; its times mean nothing")


def sanitize() -> None:
    """Kernels once more under NVIDIA's compute-sanitizer, where it is installed: accesses outside of tensors, and races
    inside of programs."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("compute-sanitizer is not installed: neither memory accesses nor races were checked", flush=True)
        return
    # Each tensor gets memory of its own, else one could read into the next without being noticed.
    environment = _environment() | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    tests = [
        f"tests/operators/triton/test_{name}_kernel{'' if name == 'conv' else 's'}.py"
        for name in ("conv", "norm", "row")
    ]
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "1", "--target-processes", "all"]
        command += [sys.executable, "-m", "pytest", "-v", "-n", "0", *tests]
        if subprocess.run(command, cwd=FOLDER, env=environment, check=False).returncode:
            sys.exit(f"compute-sanitizer --tool {check} found an error; times mean nothing")


def _window(source: Domain, target: Domain) -> Stencil:
    stride = source.height // target.height
    values = {f"{name}_{axis}": value for name, value in (("stride", stride), ("padding", 1)) for axis in "yx"}
    return Stencil.of("window", source, target, kernel_height=3, kernel_width=3, dilation_y=1, dilation_x=1, **values)


def _plan(shape: ConvShape, mask_shape: str, density: float, device: torch.device) -> tuple[Tensor, Tensor, Domain]:
    """Halo, table and the source's domain for a mask at the source's resolution."""
    side, target_side = int(shape.source**0.5), int(shape.target**0.5)
    source, target = Domain(side, side), Domain(target_side, target_side)
    stencil = _window(source, target)
    plan = build_plan(make_mask(mask_shape, density, side, side)[None], [], [stencil], device)
    halo, table = (plan.tensor(PlanInput(kind, stencil)) for kind in ("halo", "table"))
    if halo is None or table is None:
        raise ValueError(f"{stencil} has no table")
    return halo, table, source


def convolutions(run: Run, shapes: Sequence[ConvShape]) -> None:
    """Sparse convolutions alone: against cuDNN on the whole map, gathering with a matrix product, the product alone of
    factors that lie side by side, and the roofline."""
    chip = chip_of(run.device)
    times = ("dense us", "gathered us", "kernel us", "sharing us", "product us", "roofline us")
    line("channels", "positions", "mask", "active", *times, "choice")
    line(*["---"] * 11)
    for shape in (shape for shape in shapes if shape.taps == 9):
        side = int(shape.source**0.5)
        weight = torch.randn(shape.outputs, shape.inputs, 3, 3, device=run.device, dtype=run.dtype)
        weight /= (9 * shape.inputs) ** 0.5
        packed, bias = pack_conv_weight(weight, False, 1), torch.randn(shape.outputs, device=run.device).to(run.dtype)
        maps = [
            torch.randn(2, side, side, shape.inputs, device=run.device, dtype=run.dtype).permute(0, 3, 1, 2)
            for _ in range(ROTATED)
        ]
        last = weight.contiguous(memory_format=torch.channels_last)
        stride = side // int(shape.target**0.5)
        dense = run.kernel_seconds([partial(torch.conv2d, map, last, bias, stride, 1) for map in maps])
        for mask_shape in SHAPES:
            for density in run.densities:
                halo, table, domain = _plan(shape, mask_shape, density, run.device)
                count = max(2, round(density * domain.size))
                calls = []
                for map in maps:
                    recorded = map.permute(0, 2, 3, 1).flatten(1, 2)
                    rows = torch.randn(2, count, shape.inputs, device=run.device, dtype=run.dtype)
                    calls.append((rows, recorded, halo, table, packed, bias, 1))
                _agree(conv.conv_rows(*calls[0]), calls[0])
                gathered = run.kernel_seconds([partial(conv_rows_aten, ConvRows(*call)) for call in calls])
                kernel = run.kernel_seconds([partial(conv.conv_rows, *call) for call in calls])
                factors = [torch.randn(2 * table.shape[1], packed.shape[1], device=run.device, dtype=run.dtype)]
                factors += [torch.randn_like(factors[0]) for _ in range(ROTATED - 1)]
                product = run.kernel_seconds(
                    [partial(torch.nn.functional.linear, factor, packed, bias) for factor in factors]
                )
                problem = conv.problem_of(*calls[0][:2], table, packed, 1)
                choice = best_choice(problem, chip)
                sharing = _sharing(run, problem, choice.blocks, calls)
                moved = (packed.numel() + problem.source_total * problem.inputs + problem.total * problem.outputs) * 2
                limit = max(problem.operations / chip.flops(run.dtype, True), moved / chip.bandwidth)
                seconds = (dense, gathered, kernel, sharing, product, limit)
                times = ["" if each is None else f"{each * 1e6:.1f}" for each in seconds]
                channels = f"{shape.inputs} to {shape.outputs}"
                line(channels, shape.source, mask_shape, f"{density:g}", *times, choice)


def _sharing(run: Run, problem: conv.ConvProblem, blocks: conv.ConvBlocks, calls: Sequence[tuple]) -> float | None:
    """Seconds of the chosen kernel with rows that share what they read; None where they do not."""
    blocks = replace(blocks, share=True)
    if blocks not in candidates(problem, chip_of(run.device)):
        return None
    shared = []
    for rows, recorded, halo, table, weight, bias, groups in calls:
        reads = reads_cache.get(halo, table, rows.shape[1])
        call = conv.ConvCall(rows, recorded, reads, weight, groups, epilogue=add_bias(conv.NOTHING), operands=(bias,))
        shared.append(partial(conv.run_conv, call, blocks))
    return run.kernel_seconds(shared)


def _agree(result: Tensor, call: tuple) -> None:
    """End the program when a few rows differ from the plain reference."""
    rows, recorded, halo, table, *others = call
    few = table[:, :2]
    expected = naive.conv_rows(rows[:1], recorded[:1], halo[:1], few[:1], *others)
    error = float((result[:1, :2].float() - expected).abs().max() / expected.abs().max())
    if not error < 2e-2:
        sys.exit(f"a convolution is off by {error:.2g}")


def networks(run: Run, models: Sequence[str], dense_modes: Sequence[str | None]) -> None:
    """Whole networks with two samples: dense in several ways, and edits."""
    line("network", "variant", "mask", "active", "ms", "of the best dense")
    line(*["---"] * 6)
    for name in models:
        model = build_unet(name, run.dtype, run.device).to(memory_format=torch.channels_last)
        calls = [example_inputs(name, dtype=run.dtype, device=run.device, seed=seed) for seed in range(ROTATED)]
        with torch.no_grad():
            best = _dense(run, name, model, calls, dense_modes)
            for cuda_graphs in (False, True):
                _edits(run, name, model, calls, best, cuda_graphs)


def _calls(network: Callable[..., object], calls: Sequence) -> list[Callable[[], object]]:
    return [partial(network, *args, **keywords) for args, keywords in calls]


def _dense(run: Run, name: str, model: nn.Module, calls: Sequence, modes: Sequence[str | None]) -> float:
    """Fastest seconds of the dense variants, each of which is printed, with its speed beside the fastest so far."""
    best = float("inf")
    variants: dict[str, Callable[[], Callable[..., object]]] = {"eager, channels last": lambda: model}
    for mode in modes:
        variants[f"torch.compile, {mode or 'default'}"] = partial(torch.compile, model, mode=mode)
    for variant, make in variants.items():
        torch.compiler.reset()
        seconds = run.seconds(_calls(make(), calls))
        best = min(best, seconds)
        line(name, variant, "", "", f"{seconds * 1e3:.2f}", f"{best / seconds:.2f}x")
    return best


def _launches(call: Callable[[], object]) -> int:
    """Kernels that a call launches on the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA)


def _edits(run: Run, name: str, model: nn.Module, calls: Sequence, best: float, cuda_graphs: bool) -> None:
    torch.compiler.reset()
    runtime = fisedit.Runtime()
    options = {"runtime": runtime, "cuda_graphs": cuda_graphs}
    compiled = torch.compile(model, backend="fisedit", options=options)
    latents = calls[0][0][0]
    variant = "fisedit, CUDA graphs" if cuda_graphs else "fisedit, launches one by one"
    with runtime.record("base"):
        recorded = [compiled(*args, **kwargs)[0].clone() for args, kwargs in calls]
    for mask_shape in SHAPES:
        for density in run.densities:
            mask = make_mask(mask_shape, density, *latents.shape[-2:])
            with runtime.edit("base", mask=mask):
                for (args, kwargs), before in zip(calls, recorded, strict=True):
                    same = compiled(*args, **kwargs)[0]
                    if not float((same - before).abs().max() / before.abs().max()) < 5e-2:
                        sys.exit(f"{name}: an edit that changes nothing changes the output")
            seconds = _edit_seconds(run, runtime, compiled, calls, mask)
            line(name, variant, mask_shape, f"{density:g}", f"{seconds * 1e3:.2f}", f"{best / seconds:.2f}x")
    print(f"{variant}: ways of the sparse calls: {dict(runtime.stats.ways)}", flush=True)
    if run.device.type == "cuda":
        with runtime.edit("base", mask=make_mask("square", 0.05, *latents.shape[-2:])):
            args, kwargs = calls[0]
            print(f"{variant}: {_launches(partial(compiled, *args, **kwargs))} kernels in a call at 0.05", flush=True)
            for args, kwargs in calls[1:]:
                compiled(*args, **kwargs)


def _edit_seconds(run: Run, runtime: fisedit.Runtime, compiled: Callable, calls: Sequence, mask: Tensor) -> float:
    """Median seconds of a call; an edit goes through all recorded calls, entering it is not counted."""
    times = []
    for _ in range(run.repeats + 1):
        pairs = []
        with runtime.edit("base", mask=mask):
            for args, kwargs in calls:
                if run.device.type == "cuda":
                    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    start.record()
                    compiled(*args, **kwargs)
                    end.record()
                    # Not waited for: as in a pipeline, and as for the dense calls, the host runs ahead.
                    pairs.append((start, end))
                else:
                    started = time.perf_counter()
                    compiled(*args, **kwargs)
                    times.append(time.perf_counter() - started)
        if pairs:
            torch.cuda.synchronize(run.device)
        times += [start.elapsed_time(end) / 1e3 for start, end in pairs]
    return statistics.median(times[len(calls) :])


def edits(run: Run, models: Sequence[str]) -> None:
    """Whole edits of 50 steps through pipelines, by where recordings are kept."""
    line("pipeline", "recordings", "stage", "dense pipeline s", "given mask s", "automatic mask s")
    line(*["---"] * 6)
    dtype = next(name for name, known in DTYPES.items() if known == run.dtype)
    for name in models:
        for tier in TIERS:
            settings = whole.Settings(
                model=name, device=str(run.device), dtype=dtype, tier=tier, timed_steps=50, repeats=2
            )
            seconds = whole.run_edit(settings).seconds
            for stage in (*whole.STAGES, "total"):
                taken = [seconds[variant].get(stage) for variant in (whole.DENSE, whole.USER, whole.AUTOMATIC)]
                line(name, tier, stage, *("" if each is None else f"{each:.3f}" for each in taken))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--densities", nargs="+", type=float, default=list(DENSITIES))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--dense-modes",
        nargs="*",
        default=["default", "max-autotune"],
        help="of torch.compile, to compare networks with",
    )
    parser.add_argument("--minutes", type=float, help="do what tells most in so many minutes")
    parser.add_argument("--output", type=Path, default=Path("gpu-report"), help="folder of the report of --minutes")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; expected some of {', '.join(PARTS)}")
    if chosen.dry_run:
        run = Run(torch.device("cpu"), torch.float32, 1, (0.1,))
    elif torch.cuda.is_available():
        run = Run(torch.device("cuda", 0), torch.float16, chosen.repeats, chosen.densities)
    else:
        sys.exit("there is no GPU; --dry-run shows that the code runs")
    if chosen.minutes is not None:
        sys.exit(spend(chosen.minutes, chosen.output, run.device, chosen.dry_run))
    print({**describe_machine(run.device), "chip": str(chip_of(run.device))}, flush=True)
    parts = chosen.parts or PARTS
    for part in TESTS:
        if part in parts and not chosen.dry_run:
            check(part)
    if "sanitizer" in parts and not chosen.dry_run:
        sanitize()
    if "convolutions" in parts:
        shapes = (
            [ConvShape(4, 8, 9, 64, 64)]
            if chosen.dry_run
            else dict.fromkeys(shape for model in chosen.models for shape in conv_shapes(model))
        )
        convolutions(run, list(shapes))
    if "networks" in parts:
        modes = [] if chosen.dry_run else [None if mode == "default" else mode for mode in chosen.dense_modes]
        networks(run, ["scenes"] if chosen.dry_run else chosen.models, modes)
    if "edits" in parts and not chosen.dry_run:
        edits(run, chosen.models)


if __name__ == "__main__":
    main()
