"""Is each operator right on this device, with the implementation that it chooses by default? Each is computed once.

python benchmarks/kernel_checks.py --device cuda --output checks.jsonl

Results are compared with those of the processor in float32. Arguments are those of real networks at
a twentieth of the positions. A wrong result does not end the program: the case is made smaller for as long as it stays
wrong, and its tensors are written beside the output. A case that ends the process (a GPU that has read outside of its
memory answers nothing any more) is noted as crashed, and a new process goes on behind it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import fisedit_compile.operators  # noqa: F401  (registers them)
from fisedit_compile.bench.masks import make_mask
from fisedit_compile.bench.unet import DTYPES
from fisedit_compile.runtime.plans import build_plan
from fisedit_compile.runtime.spec import Domain, PlanInput, Stencil

#: Largest error as a share of the largest value. Products of float32 may be computed with the ten bits of TF32.
TOLERANCES = {"fp32": 2e-3, "fp16": 5e-3, "bf16": 3e-2}
#: Seconds for which one wrong case is made smaller.
PATIENCE = 20.0


@dataclass(frozen=True)
class Case:
    """An operator and the sizes of its arguments.

    Attributes:
        operator: its name.
        dtype: of maps and weights: fp32, fp16 or bf16.
        batch, side: samples, and rows and columns of the square map.
        density: share of active positions.
        inputs, outputs: channels.
        heads: of attention; ``inputs`` are channels of all of them.
        seed: of the values.
    """

    operator: str
    dtype: str
    batch: int = 2
    side: int = 64
    density: float = 0.05
    inputs: int = 320
    outputs: int = 320
    heads: int = 5
    seed: int = 0

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.operator} {self.dtype} {self.batch}x{self.side}x{self.side} {self.inputs}->{self.outputs}"


def cases(dry: bool) -> list[Case]:
    """All operators that have kernels, in all data types; tiny ones where ``dry``."""
    small: dict[str, Any] = {"side": 8, "inputs": 16, "outputs": 24, "heads": 2, "density": 0.2} if dry else {}
    names = sorted(MAKERS)
    types = ("fp32",) if dry else ("fp16", "bf16", "fp32")
    return [Case(operator, dtype, **small) for dtype in types for operator in names]


class Values:
    """Tensors of a case: the same on every device."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self._generator = torch.Generator().manual_seed(case.seed)
        domain = Domain(case.side, case.side)
        window = {f"{name}_{axis}": 1 for name in ("stride", "padding", "dilation") for axis in "yx"}
        self.stencil = Stencil.of("window", domain, domain, kernel_height=3, kernel_width=3, **window)
        mask = make_mask("square", case.density, case.side, case.side)[None]
        self._plan = build_plan(mask, [domain], [self.stencil], torch.device("cpu"))
        self.index = self.planned("index", domain)
        self.count = self.index.shape[1]
        self.size = domain.size

    def planned(self, kind: Any, of: Any) -> Tensor:
        """A tensor of the mask's plan."""
        found = self._plan.tensor(PlanInput(kind, of))
        if found is None:
            raise ValueError(f"the plan has no {kind} of {of}")
        return found

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normally distributed values; of the case's dtype unless another is given."""
        values = scale * torch.randn(shape, generator=self._generator)
        return values.to(dtype or DTYPES[self.case.dtype])

    def rows(self, channels: int) -> Tensor:
        """``[B, N, channels]``."""
        return self.normal(self.case.batch, self.count, channels)

    def map(self, channels: int) -> Tensor:
        """``[B, S, channels]``, in channels-first order as networks record it."""
        return self.normal(self.case.batch, channels, self.size).transpose(1, 2)


def _conv_rows(values: Values) -> list[Any]:
    case = values.case
    length = 9 * case.inputs
    weight = values.normal(case.outputs, length, scale=length**-0.5)
    halo, table = values.planned("halo", values.stencil), values.planned("table", values.stencil)
    rows, recorded = values.rows(case.inputs), values.map(case.inputs)
    return [rows, recorded, halo, table, weight, values.normal(case.outputs), 1]


def _conv_choice(values: Values) -> list[Any]:
    case = values.case
    rows, recorded, halo, table, weight, bias, _ = _conv_rows(values)
    dense = weight.view(case.outputs, 3, 3, case.inputs).permute(0, 3, 1, 2).contiguous()
    packed = [rows, recorded, halo, table, weight, bias]
    return [*packed, [], [], values.index, None, dense, case.side, case.side]


def _attention_rows(values: Values) -> list[Any]:
    case = values.case
    each = case.inputs // case.heads

    def split(tensor: Tensor) -> Tensor:
        return tensor.unflatten(2, (case.heads, each))

    rows = [split(values.rows(case.inputs)) for _ in range(3)]
    recorded = [split(values.map(case.inputs).contiguous()) for _ in range(2)]
    return [*rows, *recorded, values.index, None, None]


def _norm_apply(values: Values) -> list[Any]:
    case = values.case
    rows, center = values.rows(case.inputs), values.normal(case.batch, 8, dtype=torch.float32)
    count = values.size * (case.inputs // 8)
    totals = torch.stack(
        (values.normal(case.batch, 8, dtype=torch.float32), torch.full((case.batch, 8), float(count))), 1
    )
    return [rows, center, totals, values.normal(case.inputs), values.normal(case.inputs), 1e-5, count]


MAKERS: dict[str, Callable[[Values], list[Any]]] = {
    "attention_rows": _attention_rows,
    "conv_choice": _conv_choice,
    "conv_rows": _conv_rows,
    "gather_rows": lambda values: [values.map(values.case.inputs), values.index],
    "gather_taps": lambda values: [*_conv_rows(values)[:4], 0.0],
    "norm_apply": _norm_apply,
    "norm_partials": lambda values: [
        values.rows(values.case.inputs),
        values.normal(values.case.batch, 8, dtype=torch.float32),
    ],
    "scatter_rows": lambda values: [
        values.map(values.case.inputs),
        values.rows(values.case.inputs),
        values.index,
        None,
    ],
}
"""Arguments of each operator for a case, by the operator's name."""


def _convert(arguments: Sequence[Any], convert: Callable[[Tensor], Tensor]) -> list[Any]:
    return [
        convert(each) if isinstance(each, Tensor) else _convert(each, convert) if isinstance(each, list) else each
        for each in arguments
    ]


def _single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def computed(case: Case, arguments: Sequence[Any], device: torch.device) -> Tensor:
    """The operator's result on a device, as graphs of PyTorch's compiler call it: the implementation is chosen."""
    result: Tensor = _overload(case)(*_convert(arguments, lambda tensor: tensor.to(device)))
    return result


def _overload(case: Case) -> Any:
    return getattr(torch.ops.fisedit, case.operator).default


@torch.no_grad()
def error_of(case: Case, device: torch.device) -> float:
    """Largest difference from the processor's result, as a share of its largest value; NaN where one is not finite."""
    arguments = MAKERS[case.operator](Values(case))
    expected = _overload(case)(*_convert(arguments, _single))
    result = computed(case, arguments, device)
    difference = (result.float().cpu() - expected.float()).abs().max()
    return float(difference / expected.float().abs().max())


def is_right(case: Case, device: torch.device) -> bool:
    """Whether the error is within what the case's dtype allows; NaN is not."""
    return error_of(case, device) <= TOLERANCES[case.dtype]


def _smaller(case: Case) -> Iterator[Case]:
    """The case with one of its sizes halved."""
    if case.batch > 1:
        yield replace(case, batch=1)
    if case.side > 4:
        yield replace(case, side=case.side // 2, density=min(1.0, 2 * case.density))
    if case.heads > 1:
        yield replace(case, heads=1, inputs=case.inputs // case.heads // 8 * 8 or 8)
    if case.inputs // 2 % (8 * case.heads) == 0 and case.inputs > 8 * case.heads:
        yield replace(case, inputs=case.inputs // 2)
    if case.outputs > 8:
        yield replace(case, outputs=case.outputs // 2)


def smallest_wrong(case: Case, wrong: Callable[[Case], bool], patience: float = PATIENCE) -> Case:
    """Halve sizes of a wrong case for as long as some halving leaves it wrong, for ``patience`` seconds at most."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        found = next((small for small in _smaller(case) if wrong(small)), None)
        if found is None:
            return case
        case = found
    return case


def save_case(case: Case, path: Path) -> None:
    """Write a case's arguments to a safetensors file."""
    tensors = {
        f"argument_{number}": each.contiguous()
        for number, each in enumerate(MAKERS[case.operator](Values(case)))
        if isinstance(each, Tensor)
    }
    save_file(tensors, str(path), metadata={"case": json.dumps(asdict(case))})


def check_all(device: torch.device, output: Path, dry: bool, done: frozenset[str]) -> None:
    """Check every case that is not done; a line of JSON before each one and behind it."""
    with output.open("a", encoding="utf-8") as lines:

        def note(case: Case, **found: Any) -> None:
            lines.write(json.dumps({"case": case.name, **found}) + "\n")
            lines.flush()

        for case in (case for case in cases(dry) if case.name not in done):
            note(case, state="started")
            started = time.perf_counter()
            error = error_of(case, device)
            seconds = time.perf_counter() - started
            if error <= TOLERANCES[case.dtype]:
                note(case, state="right", error=error, seconds=seconds)
                continue
            small = smallest_wrong(case, lambda each: not is_right(each, device))
            path = output.with_name(f"wrong_{case.operator}_{case.dtype}.safetensors")
            save_case(small, path)
            note(case, state="wrong", error=error, seconds=seconds, smallest=asdict(small), file=path.name)


def states(output: Path) -> dict[str, dict[str, Any]]:
    """What is known of each case by now: its last line."""
    if not output.exists():
        return {}
    return {found["case"]: found for found in map(json.loads, output.read_text(encoding="utf-8").splitlines())}


def supervise(command: Sequence[str], output: Path, everything: int, seconds: float) -> dict[str, dict[str, Any]]:
    """Run processes that check, each going on behind the case that ended the one before.

    Args:
        command: starts one; it appends to ``output``.
        output: of lines of JSON.
        everything: number of cases.
        seconds: for all of it.

    Returns:
        The last line of each case; its ``state`` is right, wrong or crashed.
    """
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        before = len(states(output))
        try:
            ended = f"exit status {subprocess.run(command, timeout=left, check=False).returncode}"
        except subprocess.TimeoutExpired:
            ended = "out of time"
        found = states(output)
        crashed = [name for name, last in found.items() if last["state"] == "started"]
        with output.open("a", encoding="utf-8") as lines:
            lines.writelines(json.dumps({"case": name, "state": "crashed", "why": ended}) + "\n" for name in crashed)
        if len(found) in (everything, before):
            break
    return states(output)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 1 where a case is not right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, required=True, help="lines of JSON; wrong cases are written beside it")
    parser.add_argument("--seconds", type=float, default=600.0, help="for all of it")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes")
    parser.add_argument("--child", action="store_true", help="check in this process what is not done yet")
    chosen = parser.parse_args(arguments)
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    if chosen.child:
        check_all(torch.device(chosen.device), chosen.output, chosen.dry_run, frozenset(states(chosen.output)))
        return 0
    command = [sys.executable, __file__, "--child", f"--device={chosen.device}", f"--output={chosen.output}"]
    command += ["--dry-run"] if chosen.dry_run else []
    found = supervise(command, chosen.output, len(cases(chosen.dry_run)), chosen.seconds)
    for name, last in found.items():
        error = f": {last['error']:.1e}" if "error" in last else ""
        print(f"{last['state']:8} {name}{error}", flush=True)
    right = sum(last["state"] == "right" for last in found.values())
    print(f"{right} of {len(cases(chosen.dry_run))} right")
    return 0 if right == len(cases(chosen.dry_run)) else 1


if __name__ == "__main__":
    sys.exit(main())
