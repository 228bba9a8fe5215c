"""Run cases of the registry, keep their numbers, render all of them into RESULTS.md.

python benchmarks/run.py --list
python benchmarks/run.py sd15-512-square [further cases]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fisedit_compile.bench.unet import Result, run_unet
from registry import CASES

RESULTS = Path(__file__).parent / "results"
HEADINGS = ("variant", "call", "speed-up", "arithmetic", "achieved", "loaded", "set-up", "error")


def failures(name: str, result: Result) -> list[str]:
    """What falls below the gate of a case."""
    least = CASES[name].least
    return [
        f"{name}: {row.speed_up:.2f}x at density {row.density:g}, expected at least {least[row.density]:g}x"
        for row in result.sparse
        if row.density in least and row.speed_up < least[row.density]
    ]


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def render(name: str, numbers: dict[str, Any]) -> str:
    """One case as a section of RESULTS.md."""
    settings = numbers["settings"]
    size = "own size" if settings["size"] is None else f"{settings['size']}x{settings['size']} pixels"
    best = min(row["seconds"] for row in numbers["dense"])
    lines = [
        f"## {name}",
        "",
        f"{settings['model']} U-Net, {size}, batch {settings['batch']}, "
        f"{settings['dtype']}, {settings['shape']} masks (seed {settings['seed']}), norm {settings['norm']}, "
        f"lowering {settings['lowering']}; medians of {settings['calls']} calls x {settings['repeats']} rounds.",
        "",
        "On " + ", ".join(f"{key} {value}" for key, value in numbers["machine"].items()) + ".",
        "",
        f"{numbers['macs'] / 1e9:.0f} G multiply-accumulates a call, {100 * numbers['sparse_mac_fraction']:.1f} % of "
        f"them on rows. First call after `torch.compile` {numbers['first_call']:.1f} s; recorded calls "
        f"{numbers['first_record']:.2f} s (first) and {numbers['record']:.2f} s; recording "
        f"{numbers['bytes_recorded'] / settings['calls'] / 2**20:.0f} MiB a call.",
        "",
        _line(*HEADINGS),
        _line("---", *["---:"] * (len(HEADINGS) - 1)),
    ]
    for row in numbers["dense"]:
        times = f"{best / row['seconds']:.2f}x"
        lines.append(_line(f"dense, {row['name']}", _milliseconds(row["seconds"]), times, "1.0x", "", "", "", ""))
    for row in numbers["sparse"]:
        lines.append(
            _line(
                f"fisedit, {100 * row['density']:g} %",
                _milliseconds(row["seconds"]),
                f"{row['speed_up']:.2f}x",
                f"{row['arithmetic']:.1f}x",
                f"{100 * row['achieved']:.0f} %",
                f"{row['bytes_loaded'] / 2**20:.0f} MiB",
                _milliseconds(row["context"]),
                f"{row['deviation']:.0e}",
            )
        )
    return "\n".join([*lines, ""])


def main() -> int:
    """Run the cases named on the command line; 1 when one misses its gate."""
    parser = argparse.ArgumentParser(description="Run benchmark cases.")
    parser.add_argument("case", nargs="*", help="names of cases")
    parser.add_argument("--list", action="store_true", help="show all cases")
    arguments = parser.parse_args()
    if arguments.list or not arguments.case:
        print("\n".join(CASES))
        return 0
    unknown = sorted(set(arguments.case) - set(CASES))
    if unknown:
        parser.error(f"unknown case {', '.join(unknown)}; expected some of {', '.join(CASES)}")
    failed = []
    for name in arguments.case:
        result = run_unet(CASES[name].settings, lambda step, name=name: print(f"{name}: {step}", file=sys.stderr))  # type: ignore[misc]
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(result.as_dict(), indent=2) + "\n", encoding="utf-8")
        print(render(name, result.as_dict()), flush=True)
        failed += failures(name, result)
    print("\n".join(failed) or "all gates passed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
