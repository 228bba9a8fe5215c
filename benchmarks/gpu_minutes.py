"""A few minutes of a GPU, spent on what tells most: ``python benchmarks/gpu.py --minutes 9 --output FOLDER``.

Each piece of work is a process of its own with a share of the time, so that one that crashes, hangs or finds a wrong
result takes nothing from the others. What no longer fits is left out, and the report says so. After each piece
``gpu.json`` and ``gpu.md`` are written anew: whoever is interrupted has what was measured until then.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fisedit_compile.bench.unet import describe_machine
from kernel_checks import states

FOLDER = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "diffusers", "transformers", "numpy", "fisedit-compile")
#: Lines of a piece's output that the report keeps where it failed.
KEPT = 30


@dataclass(frozen=True)
class Work:
    """A piece of work.

    Attributes:
        name: of the files it leaves.
        title: for people.
        needs: seconds that it is expected to take; it is left out where fewer are left.
        command: what is run; ``{output}`` stands for the path of its result.
        summary: its result as lines of Markdown.
    """

    name: str
    title: str
    needs: float
    command: tuple[str, ...]
    summary: Callable[[Path], list[str]]


@dataclass
class Outcome:
    """What became of a piece of work: ``done``, ``failed``, ``stopped`` (out of time) or ``left out``."""

    name: str
    title: str
    state: str
    seconds: float = 0.0
    why: str = ""
    result: Any = None
    lines: list[str] = field(default_factory=list)


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", name, *arguments)


def _fisedit(*arguments: str) -> tuple[str, ...]:
    return _module("fisedit_compile.cli.main", *arguments, "--output", "{output}")


def _tests(*paths: str) -> tuple[str, ...]:
    workers = str(min(8, os.cpu_count() or 1))
    return _module("pytest", "-q", "--maxfail=20", "-n", workers, "--dist", "worksteal", *paths)


#: A U-Net with all kinds of layers, for dry runs.
SMALL_UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 16,
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
    "norm_num_groups": 8,
}


def works(device: str, folder: Path, dry: bool) -> list[Work]:
    """Everything there is to do, what tells most first. Expected times are of a large GPU, compiling included.

    Args:
        device: to measure on.
        folder: of the report, where a dry run finds its small network.
        dry: tiny sizes.
    """
    half = "fp32" if dry else "fp16"
    on = ("--device", device, "--dtype", half)

    def unet(model: str, size: int, densities: str, repeats: int, *more: str) -> tuple[str, ...]:
        counts = ("--calls", "1" if dry else "4", "--repeats", str(repeats))
        shown = ("--model", str(folder / "small"), "--size", "128") if dry else ("--model", model, "--size", str(size))
        return _fisedit("bench", "unet", *shown, "--densities", densities, *counts, *on, *more)

    def edit(model: str, tier: str) -> tuple[str, ...]:
        sizes = ("--model", model, "--steps", "50", "--timed-steps", "50", "--repeats", "2")
        return _fisedit("bench", "edit", *sizes, "--tier", tier, *on)

    checks = (sys.executable, str(FOLDER / "benchmarks" / "kernel_checks.py"), "--device", device)
    checks += ("--output", "{output}", "--seconds", "120", *(("--dry-run",) if dry else ()))
    repeats = 1 if dry else 10
    found = [
        Work("kernels", "Every operator with the kernel it chooses, once", 60, checks, kernel_lines),
        Work("sdxl", "SDXL at 1024, eager", 70, unet("sdxl", 1024, "0.05,0.2", repeats), unet_lines),
        Work("sd15", "Stable Diffusion 1.5 at 512, eager", 45, unet("sd15", 512, "0.05,0.2", repeats), unet_lines),
        Work(
            "sd15_compiled",
            "Stable Diffusion 1.5 at 512, beside torch.compile",
            110,
            unet("sd15", 512, "0.05,0.2", repeats, "--inductor"),
            unet_lines,
        ),
        Work(
            "sdxl_compiled",
            "SDXL at 1024, beside torch.compile",
            150,
            unet("sdxl", 1024, "0.05,0.2", repeats, "--inductor"),
            unet_lines,
        ),
        Work("edit", "One whole edit with CUDA graphs, Stable Diffusion 1.5", 70, edit("sd15", "device"), edit_lines),
        Work("edit_host", "The same with recordings in the host's memory", 80, edit("sd15", "host"), edit_lines),
    ]
    if dry:
        return [work for work in found if work.name in ("kernels", "sd15")]
    return [
        *found,
        Work("replay", "Tests of CUDA graphs and tiers", 60, _tests(*GPU_TESTS["semantics"]), no_lines),
        Work("tests", "Tests of the kernels", 120, _tests(*GPU_TESTS["kernels"]), no_lines),
    ]


#: Tests that run on the GPU, by part of the long program.
GPU_TESTS = {
    "kernels": (
        *("tests/operators/triton", "--deselect=tests/operators/triton/test_compilation.py"),
        *("tests/executing/test_replay.py", "tests/runtime/test_tiers.py"),
    ),
    "semantics": tuple(f"tests/semantics/test_{name}.py" for name in ("replay", "tiers", "properties")),
}


def no_lines(output: Path) -> list[str]:
    """Nothing but that it passed."""
    return []


def kernel_lines(output: Path) -> list[str]:
    """Cases that are right are counted; all others are listed."""
    found = states(output)
    right = sum(last["state"] == "right" for last in found.values())
    lines = [f"{right} of {len(found)} right."]
    for name, last in found.items():
        if last["state"] == "wrong":
            lines.append(f"* wrong: {name}, off by {last['error']:.2g}; the smallest that is: {last['smallest']}")
        elif last["state"] != "right":
            lines.append(f"* {last['state']}: {name} ({last.get('why', 'never ended')})")
    return lines


def unet_lines(output: Path) -> list[str]:
    """A table of the variants."""
    found = json.loads(output.read_text(encoding="utf-8"))
    rows = [(f"dense, {row['name']}", row["seconds"], None, None) for row in found["dense"]]
    rows += [
        (f"fisedit, {100 * row['density']:g} %", row["seconds"], row["speed_up"], row["deviation"])
        for row in found["sparse"]
    ]
    lines = ["| variant | ms | over the best dense | error |", "| --- | --- | --- | --- |"]
    for name, seconds, speed_up, deviation in rows:
        shown = "" if speed_up is None else f"{speed_up:.2f}x"
        error = "" if deviation is None else f"{deviation:.1e}"
        lines.append(f"| {name} | {1e3 * seconds:.2f} | {shown} | {error} |")
    return lines


def edit_lines(output: Path) -> list[str]:
    """A table of stages."""
    found = json.loads(output.read_text(encoding="utf-8"))
    variants = list(found["seconds"])
    lines = [f"| stage | {' | '.join(variants)} |", f"| --- |{' --- |' * len(variants)}"]
    stages = dict.fromkeys(stage for seconds in found["seconds"].values() for stage in seconds)
    for stage in stages:
        taken = [found["seconds"][variant].get(stage) for variant in variants]
        lines.append(f"| {stage} | {' | '.join('' if each is None else f'{each:.3f} s' for each in taken)} |")
    return lines


def _read(path: Path) -> Any:
    """The result of a piece of work, lines of JSON or one value; None where there is none."""
    if not path.exists():
        return None
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return list(states(path).values())
    return json.loads(text)


def perform(work: Work, folder: Path, left: float) -> Outcome:
    """Do one piece of work within ``left`` seconds, or leave it out."""
    if work.needs > left:
        why = f"needs about {work.needs:.0f} s, {max(left, 0):.0f} s were left"
        return Outcome(work.name, work.title, "left out", why=why)
    output = folder / f"{work.name}.{'jsonl' if work.summary is kernel_lines else 'json'}"
    log = folder / f"{work.name}.log"
    command = [part.replace("{output}", str(output)) for part in work.command]
    environment = os.environ | {"FISEDIT_TEST_DEVICE": "cuda", "TRITON_INTERPRET": "0"}
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as lines:
        try:
            done = subprocess.run(
                command, cwd=FOLDER, env=environment, stdout=lines, stderr=lines, timeout=left, check=False
            )
            state, why = ("done", "") if done.returncode == 0 else ("failed", f"exit status {done.returncode}")
        except subprocess.TimeoutExpired:
            state, why = "stopped", f"not done in {left:.0f} s"
    outcome = Outcome(work.name, work.title, state, time.monotonic() - started, why, _read(output))
    if outcome.result is not None:
        outcome.lines = work.summary(output)
    if state != "done":
        outcome.lines += ["```", *log.read_text(encoding="utf-8", errors="replace").splitlines()[-KEPT:], "```"]
    return outcome


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


def write_report(folder: Path, machine: Mapping[str, str], outcomes: Sequence[Outcome]) -> None:
    """Write ``gpu.json`` and ``gpu.md``, for whoever looks at once and for whoever comes later."""
    content = {"machine": dict(machine), "versions": versions(), "work": [asdict(outcome) for outcome in outcomes]}
    (folder / "gpu.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    settings = ", ".join(f"{name} {value}" for name, value in {**machine, **versions()}.items())
    lines = [f"# A few minutes of {machine.get('accelerator', machine['processor'])}", "", f"{settings}.", ""]
    for outcome in outcomes:
        taken = f" ({outcome.seconds:.0f} s)" if outcome.seconds else ""
        because = f": {outcome.why}" if outcome.why else ""
        lines += [f"## {outcome.title}", "", f"{outcome.state}{because}{taken}", "", *outcome.lines, ""]
    (folder / "gpu.md").write_text("\n".join(lines), encoding="utf-8")


def spend(minutes: float, folder: Path, device: torch.device, dry: bool) -> int:
    """Do as much as fits into ``minutes``.

    Args:
        minutes: from now on.
        folder: for the report and what each piece of work leaves; made where it is not there.
        device: to measure on.
        dry: tiny sizes, whose times mean nothing.

    Returns:
        0 where everything that was begun is done, else 1.
    """
    end = time.monotonic() + 60 * minutes
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    machine, outcomes = describe_machine(device), list[Outcome]()
    if dry:
        small = folder / "small" / "unet" / "config.json"
        small.parent.mkdir(parents=True, exist_ok=True)
        small.write_text(json.dumps(SMALL_UNET), encoding="utf-8")
    for work in works(str(device), folder, dry):
        print(f"{work.title} ...", flush=True)
        outcome = perform(work, folder, end - time.monotonic())
        outcomes.append(outcome)
        write_report(folder, machine, outcomes)
        print("\n".join([f"{outcome.state} {outcome.why} ({outcome.seconds:.0f} s)", *outcome.lines]), flush=True)
    print(f"written: {folder / 'gpu.md'} and {folder / 'gpu.json'}")
    return 0 if all(outcome.state in ("done", "left out") for outcome in outcomes) else 1
