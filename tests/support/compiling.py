"""Compile every kernel variant that can be chosen, for chips that are not there; run as a program of its own.

The interpreter replaces Triton's compiler when Triton is imported, so one process cannot do both.

python compiling.py OUTPUT RECORD [--all]

What is in the record, a file of what compiling gave before, is taken from there: entries are found by the source of a
kernel and of all that it calls, its arguments' types, the chip, Triton's version and the file that compiles. One launch
of each kernel is compiled in any case, and must give what the record says.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from fisedit_compile.bench.conv_shapes import DENSITIES, MODELS, ConvShape, conv_shapes
from fisedit_compile.operators.convolution.triton import NOTHING, ConvCall, conv_launches
from fisedit_compile.operators.group_norm import triton as norm
from fisedit_compile.operators.rows import triton as rows
from fisedit_compile.operators.triton import resources as compiler
from fisedit_compile.operators.triton.blocks import ConvBlocks, ConvProblem, candidates, choose, shared_bytes
from fisedit_compile.operators.triton.chips import KNOWN_CHIPS, Capability, Chip
from fisedit_compile.operators.triton.launches import Launch
from fisedit_compile.operators.triton.pointwise import CURRENT, Chain, Operand, Step, add_bias
from fisedit_compile.operators.triton.resources import compile_launch, specialisation

#: What follows convolutions in a residual block: the time embedding; the block's input.
EPILOGUES = {
    "bias": NOTHING,
    "time": Chain((Step("add", (CURRENT, Operand(0))),), ("sample",)),
    "residual": Chain((Step("add", (Operand(0), CURRENT)), Step("div", (CURRENT, 1.0))), ("rows",)),
}
NORM = Chain((Step("mul", (CURRENT, Operand(0))), Step("add", (CURRENT, Operand(1))), Step("silu")), ("sample",) * 2)
#: Rows of a launch that is only compiled; no code depends on it.
ROWS = 384
Chosen = dict[ConvBlocks, tuple[ConvShape, ConvProblem]]
"""Choices of blocks, each with a convolution that asks for it."""


def meta(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def conv_variant(
    shape: ConvShape, blocks: ConvBlocks, dtype: torch.dtype, epilogue: str, recorded: torch.dtype, normed: bool = False
) -> list[Launch]:
    """The launches of a convolution."""
    chain = EPILOGUES[epilogue]
    kinds = {"sample": (2, 1, shape.outputs), "rows": (2, ROWS, shape.outputs)}
    operands = tuple(meta(*kinds[kind], dtype=dtype) for kind in chain.kinds)
    call = ConvCall(
        meta(2, ROWS, shape.inputs, dtype=dtype),
        meta(2, shape.source, shape.inputs, dtype=recorded),
        meta(1, ROWS, shape.taps, dtype=torch.int32),
        meta(shape.outputs, shape.taps * shape.inputs, dtype=dtype),
        prologue=NORM if normed else NOTHING,
        inputs=(meta(2, 1, shape.inputs, dtype=torch.float32),) * 2 if normed else (),
        epilogue=add_bias(chain),
        operands=(meta(shape.outputs, dtype=dtype), *operands),
    )
    output = meta(2, ROWS, shape.outputs, dtype=dtype)
    workspace = meta(blocks.splits, 2, ROWS, shape.outputs, dtype=torch.float32) if blocks.splits > 1 else None
    return conv_launches(call, blocks, output, workspace)


def chosen(chip: Chip, dtype: torch.dtype) -> Chosen:
    """Every choice for the public models on a chip, with one convolution that asks for it."""
    found: Chosen = {}
    for model in MODELS:
        for shape in conv_shapes(model):
            for density in DENSITIES:
                problem = shape.problem(density, dtype)
                found.setdefault(choose(problem, chip).blocks, (shape, problem))
    return found


def sharing(found: Chosen, chip: Chip) -> list[Any]:
    """The largest of these choices first, as their rows share reads: what measuring may choose in their place."""
    twins = [(replace(blocks, share=True), of) for blocks, of in found.items() if not blocks.share]
    twins = [(blocks, of) for blocks, of in twins if blocks in candidates(of[1], chip)]
    return sorted(twins, key=lambda twin: -twin[0].rows * twin[0].outputs)


@dataclass(frozen=True)
class Variant:
    """A launch to compile, what it is, and the shared memory the choice counted on."""

    name: str
    capability: Capability
    launch: Launch
    expected_shared: int


def taken(capability: Capability, dtype: torch.dtype, everything: bool) -> Chosen:
    """What :func:`chosen` finds, and of what measuring may choose in its place all or the largest."""
    chip = KNOWN_CHIPS[capability]
    found = chosen(chip, dtype)
    for blocks, of in sharing(found, chip)[: None if everything else 1]:
        found.setdefault(blocks, of)
    return found


def conv_variants(capability: Capability, dtypes: tuple[torch.dtype, ...], everything: bool) -> Iterator[Variant]:
    """Convolutions as chosen, with the epilogues of a residual block."""
    chip = KNOWN_CHIPS[capability]
    for dtype in dtypes:
        if not chip.supports(dtype):
            continue
        found = taken(capability, dtype, everything)
        for blocks, (shape, problem) in found.items():
            expected = shared_bytes(blocks, problem, chip)
            for epilogue in EPILOGUES if everything else ("residual",):
                for launch in conv_variant(shape, blocks, dtype, epilogue, dtype):
                    yield Variant(f"{dtype} {blocks} {epilogue} {shape}", capability, launch, expected)
            # Stored in half precision; nothing is stored in a wider type than it is computed in.
            for recorded in (torch.float16, torch.bfloat16) if everything and dtype == torch.float32 else ():
                for launch in conv_variant(shape, blocks, dtype, "bias", recorded):
                    yield Variant(f"{dtype} {blocks} recorded as {recorded}", capability, launch, 2 * expected)


def other_variants(capability: Capability, dtype: torch.dtype) -> Iterator[Variant]:
    """Rows, norms, and the key and value update, for narrow and wide maps."""
    limit = KNOWN_CHIPS[capability].shared_limit
    index, valid = meta(1, ROWS, dtype=torch.int64), meta(2, ROWS, dtype=torch.bool)
    for channels in (320, 1280):
        new, map = meta(2, ROWS, channels, dtype=dtype), meta(2, 4096, channels, dtype=dtype)
        center, totals = meta(2, 32, dtype=torch.float32), meta(2, 2, 32, dtype=torch.float32)
        recorded, changes = meta(2, 4096, 2, 32, dtype=torch.float32), meta(2, 64, 2, 32, dtype=torch.float32)
        affine = meta(channels, dtype=dtype)
        launches = [
            rows.gather_launch(map, index, new),
            rows.gather_launch(map.transpose(1, 2).contiguous().transpose(1, 2), index, new),
            rows.taps_launch(
                new, map, meta(1, ROWS, 4, dtype=torch.int32), 0.0, meta(2, ROWS, 4, channels, dtype=dtype)
            ),
            rows.write_launch([(map, new, None)], index, None),
            rows.write_launch([(map, new, new)] * 2, index, valid),
            *norm.statistics_launches(new, center, None, (totals, recorded, index, valid, changes, totals)),
            *norm.statistics_launches(new, center, meta(2, ROWS, 2, 32, dtype=torch.float32), None),
            norm.apply_launch(new, center, totals, affine, affine, 1e-5, 40960, True, new),
            norm.apply_launch(new, center, totals, None, None, 1e-5, 40960, False, new),
        ]
        for launch in launches:
            yield Variant(f"{dtype} {channels} {launch.constants}", capability, launch, limit)


def variants(everything: bool) -> Iterator[Variant]:
    """All of them, or those of half precision with the longest epilogue and one of each kind besides."""
    half, full = torch.float16, torch.float32
    for capability in KNOWN_CHIPS:
        yield from conv_variants(capability, (half, torch.bfloat16, full) if everything else (half,), everything)
        for dtype in (half, full) if everything else (half,):
            yield from other_variants(capability, dtype)
    shape = ConvShape(320, 320, 9, 4096, 4096)
    narrow = ConvShape(4, 320, 9, 4096, 4096)
    for capability in KNOWN_CHIPS if everything else ((8, 0), (9, 0)):
        for one in (shape, narrow):
            for launch in conv_variant(one, ConvBlocks(32, 64, 16), half, "time", half, normed=True):
                yield Variant(f"norm on the way in, {one}", capability, launch, KNOWN_CHIPS[capability].shared_limit)


def identity(variant: Variant) -> str:
    """What the result of compiling depends on, as a short text that begins with Triton's version."""
    kernel = variant.launch.kernel.cache_key
    parts = (inspect.getsource(compiler), kernel, variant.capability, specialisation(variant.launch))
    return f"{triton.__version__} {hashlib.sha256(repr(parts).encode()).hexdigest()[:24]}"


def compile_one(variant: Variant) -> dict[str, object]:
    """What a launch needs, and whether it loads and multiplies as it should, as plain data."""
    resources = compile_launch(variant.launch, variant.capability)
    return {
        **{name: value for name, value in asdict(resources).items() if name != "assembly"},
        "wide_loads": resources.wide_loads(),
        "matrix": "mma" in resources.assembly,
    }


def compile_all(everything: bool, record: Mapping[str, dict[str, object]]) -> list[dict[str, object]]:
    """What each distinct variant needs: from the record where it has it, and from compiling it.

    Raises:
        ValueError: one of each kernel is compiled, and the record says something else.
    """
    done: dict[str, dict[str, object]] = {}
    checked: set[str] = set()
    for variant in variants(everything):
        key, kernel = identity(variant), variant.launch.kernel.fn.__name__
        if key in done:
            continue
        known = record.get(key)
        found = compile_one(variant) if known is None or kernel not in checked else known
        if known is not None and found != known:
            raise ValueError(f"{variant.name} gives {found}, and the record says {known}")
        if known is not None:
            checked.add(kernel)
        done[key] = {
            "key": key,
            "compiled": found,
            "kernel": kernel,
            "constants": variant.launch.constants,
            "name": variant.name,
            "capability": variant.capability,
            "expected_shared": variant.expected_shared,
            **found,
        }
    return list(done.values())


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        sys.exit("compiling needs TRITON_INTERPRET=0")
    output, given = (Path(name) for name in sys.argv[1:3])
    known = json.loads(given.read_text(encoding="utf-8")) if given.exists() else {}
    output.write_text(json.dumps(compile_all("--all" in sys.argv[3:], known)), encoding="utf-8")
