"""Block choices that were measured, kept with all other measurements, and preferred to the model's.

``FISEDIT_AUTOTUNE=1`` measures each new kind of convolution once, on a GPU only; a record keeps the result by chip and
by problem, sizes rounded up to powers of two.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch

from fisedit_compile.operators.records import Record, costs, dtype_name
from fisedit_compile.operators.triton.blocks import (
    BlockChoice,
    ConvBlocks,
    ConvProblem,
    candidates,
    choose,
    estimate,
    estimate_dense,
)
from fisedit_compile.operators.triton.chips import Chip
from fisedit_compile.operators.triton.devices import one_capture

logger = logging.getLogger(__name__)

#: Under which names measured choices are kept.
OPERATOR, IMPLEMENTATION = "conv_rows", "triton"
#: Candidates that are measured, the most promising ones by the model.
MEASURED = 16
#: Calls before timing, in a row while timing, and how often these are timed.
WARM_UP, CALLS, REPEATS = 3, 20, 5


class KernelCase(NamedTuple):
    """What measured choices are kept by, with sizes that depend on the mask rounded up to powers of two.

    Attributes:
        inputs, outputs, taps, groups: of the convolution.
        rows, positions, sources: target rows and positions of all samples, and distinct source positions.
        dtype: of rows and weights.
        tensor_float: whether float32 is multiplied as TF32.
    """

    inputs: int
    outputs: int
    taps: int
    groups: int
    rows: int
    positions: int
    sources: int
    dtype: str
    tensor_float: bool

    @staticmethod
    def of(problem: ConvProblem) -> KernelCase:
        """The case of a problem."""
        sizes = problem.bucket()
        return KernelCase(
            sizes.inputs,
            sizes.outputs,
            sizes.taps,
            sizes.groups,
            sizes.total,
            sizes.dense_total,
            sizes.source_total,
            dtype_name(problem.dtype),
            problem.tensor_float,
        )


# What each convolution of this process uses; another mask is other problems, so it does not grow for ever.
_choices: dict[tuple[ConvProblem, Chip], BlockChoice] = {}
KEPT = 16384


def best_choice(
    problem: ConvProblem, chip: Chip, work: Callable[[ConvBlocks], Callable[[], Any]] | None = None
) -> BlockChoice:
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
    """Look at the records and the model again, for instance after measuring."""
    _choices.clear()


def keep(problem: ConvProblem, chip: Chip, blocks: ConvBlocks, seconds: float) -> None:
    """Keep a measured choice."""
    case = KernelCase.of(problem)._asdict()
    costs.add([Record(OPERATOR, case, IMPLEMENTATION, seconds, chip.name, asdict(blocks))])


def measured(problem: ConvProblem, chip: Chip) -> tuple[ConvBlocks, float] | None:
    """The fastest blocks that were measured and still are candidates, and their seconds; None where there are none."""
    records = costs.records(OPERATOR, KernelCase.of(problem), chip.name)
    if not records:
        return None
    known = [(blocks, asdict(blocks)) for blocks in candidates(problem, chip)]
    found = [(blocks, one.seconds) for one in records for blocks, given in known if given == one.parameters]
    return min(found, key=lambda choice: choice[1], default=None)


def _find(problem: ConvProblem, chip: Chip, work: Callable[[ConvBlocks], Callable[[], Any]] | None) -> BlockChoice:
    known = measured(problem, chip)
    if known is None and work is not None and _measures():
        known = tune(problem, chip, lambda blocks: gpu_seconds([work(blocks)]))
        keep(problem, chip, *known)
    if known is not None:
        return BlockChoice(known[0], known[1], estimate_dense(problem, chip), "measured")
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
