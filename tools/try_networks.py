"""Try the compiler on networks of other projects, with random weights at small sizes.

    python tools/try_networks.py --json results.json
    python tools/try_networks.py --only spandrel/SwinIR --seconds 300
    python tools/try_networks.py --summary results.json

The projects must be installed; the networks of those that are not are passed over. Each network is recorded on one
picture and edited with two masks, in a process and a time of its own. It is ``right`` if

* every call was masked, or a warning says why not;
* what lies outside the mask is the recording, bit by bit, in outputs whose size is the picture's, and beyond the
  positions beside the mask where it is a multiple or a part of that;
* a mask of everything gives the network's own result on the new picture;
* a picture that did not change gives the recording;
* positions that depend on nothing outside the mask (found by NaN and by other values there) equal the network's own
  result on the new picture inside and the recorded one outside of the mask.

``WRONG`` says what does not hold, ``REFUSED`` that the package raised an error of its own, ``CRASHED`` that something
else was raised, ``SLOW`` that the time ran out, ``UNUSABLE`` that the network does not run by itself.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch

import fisedit_compile as fisedit
from fisedit_compile.errors import FisEditError
from foreign_checks import Checks
from foreign_networks import SOURCES, Foreign, networks

STATES = ("right", "WRONG", "REFUSED", "CRASHED", "SLOW", "UNUSABLE")
SHARE = 0.9
"""Networks whose sparse share lies below are listed."""


class Heard(logging.Handler):
    """What was warned of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        self.messages.append(record.getMessage())


class Outcome:
    """What became of one network. As a context it keeps whatever is raised: a foreign network may raise anything, and
    each error is a row of the table.

    Attributes:
        row: state, share and all else that is printed.
        stage: the state if something is raised that is no error of the package.
    """

    def __init__(self, foreign: Foreign) -> None:
        self.row: dict[str, Any] = {"source": foreign.source, "name": foreign.name, "size": list(foreign.size)}
        self.stage = "UNUSABLE"
        self._started = time.perf_counter()

    def __enter__(self) -> Outcome:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> bool:
        self.row["seconds"] = time.perf_counter() - self._started
        if not isinstance(error, Exception):
            return False
        text = first_line(error)
        if isinstance(error, FisEditError) or isinstance(error.__cause__, FisEditError):
            self.row |= {"state": "REFUSED", "text": text}
        else:
            self.row |= {"state": self.stage, "text": f"{type(error).__name__}: {text}"}
        return True


def attempt(foreign: Foreign) -> dict[str, Any]:
    """Build, record, edit and judge one network."""
    torch.manual_seed(0)
    heard = Heard()
    logging.getLogger("fisedit_compile").addHandler(heard)
    with Outcome(foreign) as outcome, warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        checks = Checks(foreign)
        outcome.stage = "CRASHED"
        wrong = checks.run()
        report = fisedit.explain(checks.compiled, checks.new, *checks.others)
        messages = [*heard.messages, *(str(one.message) for one in caught if "fisedit" in one.filename)]
        if checks.unmasked and not messages:
            wrong.append(f"{checks.unmasked} calls were not masked, without a warning")
        outcome.row |= {
            "state": "WRONG" if wrong else "right",
            "text": "; ".join(wrong),
            "share": report.sparse_mac_fraction if report.total_macs else None,
            "dense": Counter(miss.target for miss in report.dense_nodes).most_common(),
            "lost": Counter(miss.target for miss in report.lost).most_common(),
            "inside": checks.inside,
            "fringe": checks.fringe,
            "change": checks.change,
            "unmasked": checks.unmasked,
            "warnings": messages[:3],
        }
    logging.getLogger("fisedit_compile").removeHandler(heard)
    return outcome.row


def first_line(error: BaseException) -> str:
    """The first line of a message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def attempt_apart(foreign: Foreign, send: Connection) -> None:
    """As ``attempt``, in a process of its own."""
    send.send(attempt(foreign))


def warm() -> None:
    """Compile a small network, so that the forked processes find imported what compiling imports."""
    with torch.no_grad():
        attempt(Foreign("torch", "Conv2d", lambda: torch.nn.Conv2d(3, 3, 3, padding=1), (8, 10)))


def bounded(foreign: Foreign, seconds: float) -> dict[str, Any]:
    """Try a network in a forked process, which is ended when its time is over.

    Forked, because importing the projects takes longer than most networks; it is safe as nothing has run on other
    threads by then.
    """
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=attempt_apart, args=(foreign, send))
    process.start()
    send.close()
    row = {"source": foreign.source, "name": foreign.name, "size": list(foreign.size), "seconds": seconds}
    try:
        if not receive.poll(seconds):
            return row | {"state": "SLOW", "text": f"not done in {seconds:.0f} s"}
        return dict(receive.recv())
    except EOFError:
        return row | {"state": "CRASHED", "text": "the process ended"}
    finally:
        process.kill()
        process.join()


def table_row(result: dict[str, Any]) -> str:
    """One network in one line."""
    share = result.get("share")
    shown = "-" if share is None else f"{share:.3f}"
    dense = ", ".join(f"{name.removeprefix('aten.')} {count}" for name, count in result.get("dense", ())[:3])
    lost = ", ".join(f"{name.removeprefix('aten.')} {count}" for name, count in result.get("lost", ())[:2])
    size = "x".join(map(str, result["size"]))
    parts = [
        f"{result['source']}/{result['name']}",
        size,
        result["state"],
        shown,
        f"inside {result.get('inside', '-')}",
    ]
    parts += [
        f"dense: {dense or '-'}",
        f"lost: {lost or '-'}",
        f"{result['seconds']:.0f} s",
        result.get("text", "")[:300],
    ]
    return " | ".join(parts)


def summary(results: Sequence[dict[str, Any]]) -> str:
    """Results by source, what stays dense, and the networks with a low share, as Markdown."""
    lines = [f"| source | networks | {' | '.join(STATES[:-1])} | median share |", "| --- " * (len(STATES) + 2) + "|"]
    used = [result for result in results if result["state"] != "UNUSABLE"]
    for source in [*dict.fromkeys(result["source"] for result in used), "all"]:
        rows = [result for result in used if source in (result["source"], "all")]
        counts = Counter(result["state"] for result in rows)
        shares = [result["share"] for result in rows if result.get("share") is not None]
        middle = f"{median(shares):.3f}" if shares else "-"
        lines.append(f"| {source} | {len(rows)} | {' | '.join(str(counts[s]) for s in STATES[:-1])} | {middle} |")
    for key, title in (("dense", "Stays dense, in how many networks"), ("lost", "Positions are lost behind")):
        counts = Counter(name for result in used for name, _ in result.get(key, ()))
        lines += ["", f"{title}: " + ", ".join(f"`{name}` {count}" for name, count in counts.most_common(12))]
    lines += ["", f"Shares below {SHARE}:", ""]
    for result in sorted(used, key=lambda result: result.get("share") or 0.0):
        if result.get("share") is not None and result["share"] < SHARE:
            lost = ", ".join(f"`{name}`" for name, _ in result["lost"][:2])
            dense = ", ".join(f"`{name}`" for name, _ in result["dense"][:3])
            lines.append(f"* {result['source']} {result['name']} {result['share']:.2f}: {dense}; lost {lost or 'none'}")
    return "\n".join(lines)


def main() -> int:
    """Run the command line; 1 if a network was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="parts of source/name")
    parser.add_argument("--sources", nargs="*", default=list(SOURCES), choices=SOURCES, help="projects")
    parser.add_argument("--seconds", type=float, default=120, help="for each network")
    parser.add_argument("--json", type=Path, help="where results are kept; those that are there are not tried again")
    parser.add_argument("--here", action="store_true", help="without processes of their own, for a debugger")
    parser.add_argument("--summary", type=Path, help="print a summary of results, and try nothing")
    arguments = parser.parse_args()
    if arguments.summary is not None:
        print(summary(json.loads(arguments.summary.read_text(encoding="utf-8"))))
        return 0
    torch.set_num_threads(1)
    kept = arguments.json is not None and arguments.json.exists()
    results = json.loads(arguments.json.read_text(encoding="utf-8")) if kept else []
    known = {(result["source"], result["name"]) for result in results}
    found = networks(arguments.sources)
    if not arguments.here:
        warm()
    for foreign in found:
        label = f"{foreign.source}/{foreign.name}"
        if arguments.only and not any(part in label for part in arguments.only):
            continue
        if (foreign.source, foreign.name) not in known:
            results.append(attempt(foreign) if arguments.here else bounded(foreign, arguments.seconds))
            print(table_row(results[-1]), flush=True)
            if arguments.json is not None:
                arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(summary(results))
    return 1 if any(result["state"] == "WRONG" for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
