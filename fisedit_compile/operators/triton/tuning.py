"""Block choices that were measured, kept in a file, and preferred to the model's.

``FISEDIT_AUTOTUNE=1`` measures each new kind of convolution once, on a GPU only; the file ``blocks.json`` in the cache
folder keeps the result by chip and by problem, sizes rounded up to powers of two.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fisedit_compile.operators.triton.blocks import (
    ConvBlocks,
    ConvChoice,
    ConvProblem,
    candidates,
    choose,
    estimate,
    estimate_dense,
)
from fisedit_compile.operators.triton.chips import Chip
from fisedit_compile.operators.triton.devices import one_capture
from fisedit_compile.operators.triton.sources import write_atomically
from fisedit_compile.options import cache_folder

logger = logging.getLogger(__name__)

#: Candidates that are measured, the most promising ones by the model.
MEASURED = 16
#: Calls before timing, in a row while timing, and how often these are timed.
WARM_UP, CALLS, REPEATS = 3, 20, 5


def problem_key(problem: ConvProblem, chip: Chip) -> str:
    """What measured choices are kept by."""
    sizes = problem.bucket()
    dtype = str(problem.dtype).removeprefix("torch.") + ("-tf32" if problem.tensor_float else "")
    return (
        f"{chip.name}|{dtype}|{sizes.inputs}->{sizes.outputs}|taps {sizes.taps}|groups {sizes.groups}"
        f"|rows {sizes.total} of {sizes.dense_total} from {sizes.source_total}"
    )


class BlockTable:
    """Measured choices by :func:`problem_key`, in a file that several processes may write."""

    def __init__(self, path: Path) -> None:
        """``path``: of the file; it need not exist."""
        self.path = path
        self._lock = threading.Lock()
        self._entries: dict[str, dict[str, Any]] | None = None

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            entries = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError:
            logger.warning("%s is no JSON file; its block choices are not used", self.path)
            return {}
        return entries if isinstance(entries, dict) else {}

    def get(self, key: str) -> tuple[ConvBlocks, float] | None:
        """The measured blocks and their seconds, or None."""
        with self._lock:
            if self._entries is None:
                self._entries = self._read()
            entry = self._entries.get(key)
        if entry is None:
            return None
        return ConvBlocks(**entry["blocks"]), float(entry["seconds"])

    def put(self, key: str, blocks: ConvBlocks, seconds: float) -> None:
        """Keep a measured choice; what other processes wrote since is kept too."""
        with self._lock:
            self._entries = self._read() | {key: {"blocks": asdict(blocks), "seconds": seconds}}
            write_atomically(self.path, json.dumps(self._entries, indent=1, sort_keys=True) + "\n")


_tables: dict[Path, BlockTable] = {}
# What each convolution of this process uses; another mask is other problems, so it does not grow for ever.
_choices: dict[tuple[ConvProblem, Chip], ConvChoice] = {}
KEPT = 16384


def block_table() -> BlockTable:
    """The table of the cache folder."""
    path = cache_folder() / "blocks.json"
    return _tables.setdefault(path, BlockTable(path))


def best_choice(
    problem: ConvProblem, chip: Chip, work: Callable[[ConvBlocks], Callable[[], Any]] | None = None
) -> ConvChoice:
    """The measured choice for a problem if there is one, else the model's.

    Args:
        problem: what to choose for.
        chip: where it runs.
        work: from block sizes to what computes with them on that chip; measured when ``FISEDIT_AUTOTUNE=1`` and there
            is a GPU and nothing was measured yet.
    """
    choice = _choices.get((problem, chip))
    # Somebody may have asked before without means to measure: that must not keep the model's choice for good.
    if choice is None or (choice.source == "model" and work is not None and _measures()):
        if len(_choices) >= KEPT:
            _choices.clear()
        choice = _choices[problem, chip] = _find(problem, chip, work)
    return choice


def _measures() -> bool:
    """Whether choices are to be measured, and can be."""
    return os.environ.get("FISEDIT_AUTOTUNE") == "1" and torch.cuda.is_available()


def forget_choices() -> None:
    """Look at the file and the model again, for instance after measuring."""
    _choices.clear()
    _tables.clear()


def _find(problem: ConvProblem, chip: Chip, work: Callable[[ConvBlocks], Callable[[], Any]] | None) -> ConvChoice:
    table, key = block_table(), problem_key(problem, chip)
    known = table.get(key)
    if known is None and work is not None and _measures():
        known = tune(problem, chip, lambda blocks: gpu_seconds([work(blocks)]))
        table.put(key, *known)
    if known is not None and known[0] in candidates(problem, chip):
        return ConvChoice(known[0], known[1], estimate_dense(problem, chip), "measured")
    return choose(problem, chip)


def tune(problem: ConvProblem, chip: Chip, seconds: Callable[[ConvBlocks], float]) -> tuple[ConvBlocks, float]:
    """Measure the most promising candidates.

    Args:
        problem, chip: what to choose for.
        seconds: measures one candidate.

    Returns:
        The fastest, and its time.
    """
    ranked = sorted(candidates(problem, chip), key=lambda blocks: estimate(problem, blocks, chip))
    measured = {blocks: seconds(blocks) for blocks in ranked[:MEASURED]}
    best = min(measured, key=lambda blocks: measured[blocks])
    logger.info("measured %d choices for %s: %s", len(measured), problem, best)
    return best, measured[best]


def gpu_seconds(runs: Sequence[Callable[[], Any]]) -> float:
    """Median seconds of a call on the current GPU; the calls take turns, and caches are as the call before leaves them.

    They are captured and replayed: a host that asks for small kernels one by one is slower than they are, and its time
    would be what is measured.
    """
    for run in [*runs] * WARM_UP:
        run()
    graph, count = torch.cuda.CUDAGraph(), max(1, CALLS // len(runs)) * len(runs)
    # PyTorch's own stream for captures is one of the GPU that was current when it was first needed.
    with one_capture(), torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
        for number in range(count):
            runs[number % len(runs)]()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPEATS)]
    graph.replay()
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) / 1e3 / count for start, end in events)


def median(values: Iterable[float]) -> float:
    """The upper median."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2]
