"""Sparse convolution by generated Triton kernels: what to launch, and with which arguments."""

from __future__ import annotations

import functools
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.operators.choosing import taken
from fisedit_compile.operators.convolution import choice as paths
from fisedit_compile.operators.convolution.triton_template import conv_source
from fisedit_compile.operators.triton.blocks import ConvBlocks, ConvProblem
from fisedit_compile.operators.triton.chips import chip_of
from fisedit_compile.operators.triton.devices import captured, on_device
from fisedit_compile.operators.triton.launches import Launch
from fisedit_compile.operators.triton.pointwise import Chain, add_bias, operand_arguments
from fisedit_compile.operators.triton.sources import load_source
from fisedit_compile.operators.triton.tuning import best_choice
from fisedit_compile.private.tensors import version_of

NOTHING = Chain()
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def conv_module(prologue: Chain, epilogue: Chain) -> ModuleType:
    """The module of kernels for these chains."""
    return load_source("conv", conv_source(prologue, epilogue))


def resolve_reads(halo: Tensor, table: Tensor, source_count: int) -> Tensor:
    """One number for each tap in place of table and halo: int32 ``[1 or B, N, K]``.

    Below ``source_count`` it is a row, from there on ``source_count`` plus a position of the recorded map, and -1 for
    taps outside. Kernels then wait for one load before they know an address, not for two.
    """
    last = source_count + halo.shape[1]
    if halo.shape[1] == 0:
        return torch.where(table < last, table, -1).to(torch.int32)
    slot = (table - source_count).clamp(0, halo.shape[1] - 1)
    position = halo.expand(slot.shape[0], -1).gather(1, slot.flatten(1)).view_as(slot) + source_count
    return torch.where(table < source_count, table, position.masked_fill(table >= last, -1)).to(torch.int32)


#: By ``id`` of the table: table, halo, their state, and what they were resolved to.
Entries = dict[int, tuple[weakref.ref[Tensor], weakref.ref[Tensor], tuple[int, ...], Tensor]]


class ReadsCache:
    """Resolved reads by table and halo, for as long as the table lives; all convolutions of a stencil share them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shared: Entries = {}
        self._local = threading.local()

    @property
    def _entries(self) -> Entries:
        own: Entries | None = getattr(self._local, "entries", None)
        return self._shared if own is None else own

    @contextmanager
    def fresh(self) -> Iterator[None]:
        """Compute everything anew in this thread: while launches are captured, so that resolving is captured too and
        every replay resolves what its tables hold by then."""
        before = getattr(self._local, "entries", None)
        self._local.entries = {}
        try:
            yield
        finally:
            self._local.entries = before

    def get(self, halo: Tensor, table: Tensor, source_count: int) -> Tensor:
        """The result of :func:`resolve_reads`, computed once for tensors that do not change."""
        key, state = id(table), (source_count, version_of(halo), version_of(table))
        entries = self._entries
        with self._lock:
            entry = entries.get(key)
        if entry is not None and entry[0]() is table and entry[1]() is halo and entry[2] == state:
            return entry[3]
        reads = resolve_reads(halo, table, source_count)
        if entries is self._shared and captured(table):
            # Somebody else captures: there is nothing in this memory before their replay.
            return reads

        def forget(reference: weakref.ref[Tensor]) -> None:
            # Another table may have the same id by now.
            known = entries.get(key)
            if known is not None and known[0] is reference:
                entries.pop(key, None)

        with self._lock:
            entries[key] = (weakref.ref(table, forget), weakref.ref(halo), state, reads)
        return reads

    def __len__(self) -> int:
        return len(self._entries)


reads_cache = ReadsCache()


@dataclass(frozen=True)
class ConvCall:
    """The tensors of one sparse convolution.

    Attributes:
        rows: ``[B, Ns, Cin]``.
        recorded: ``[B, S, Cin]``.
        reads: int32 ``[1 or B, N, K]``, of :func:`resolve_reads`.
        weight: ``[Cout, K * Cin / groups]``, dtype of ``rows``.
        groups: as of the convolution.
        prologue, inputs: what happens to rows on their way in, and its operands over ``[B, 1, Cin]``.
        epilogue, operands: what happens to results on their way out, and its operands over ``[B, N, Cout]``.
    """

    rows: Tensor
    recorded: Tensor
    reads: Tensor
    weight: Tensor
    groups: int = 1
    prologue: Chain = NOTHING
    inputs: tuple[Tensor, ...] = ()
    epilogue: Chain = NOTHING
    operands: tuple[Tensor, ...] = ()

    @property
    def total(self) -> int:
        """Target rows of all samples."""
        return self.rows.shape[0] * self.reads.shape[1]

    def problem(self) -> ConvProblem:
        """What the choice of block sizes depends on."""
        return problem_of(self.rows, self.recorded, self.reads, self.weight, self.groups)


def problem_of(rows: Tensor, recorded: Tensor, table: Tensor, weight: Tensor, groups: int) -> ConvProblem:
    """What the choice of block sizes depends on; ``table`` is ``[1 or B, N, K]``, the rest as in :class:`ConvCall`."""
    batch, source_count, inputs = rows.shape
    count, taps = table.shape[1:]
    return make_problem(
        batch, source_count, recorded.shape[1], inputs, count, taps, weight.shape[0], groups, rows.dtype
    )


def make_problem(
    batch: int,
    source_count: int,
    positions: int,
    inputs: int,
    count: int,
    taps: int,
    outputs: int,
    groups: int,
    dtype: torch.dtype,
) -> ConvProblem:
    """A problem from what a sample has: ``source_count`` rows on a map of so many ``positions``, ``count`` targets."""
    # Targets for each source position: 1/4 for stride 2, 4 for a transposed convolution of stride 2.
    dense_total = round(batch * positions * count / max(1, source_count))
    return ConvProblem(
        total=batch * count,
        dense_total=max(batch * count, dense_total),
        source_total=batch * min(positions, source_count + count),
        inputs=inputs,
        outputs=outputs,
        taps=taps,
        groups=groups,
        dtype=dtype,
        tensor_float=tensor_float(),
    )


def tensor_float() -> bool:
    """Whether PyTorch multiplies float32 of convolutions as TF32."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


def conv_launches(call: ConvCall, blocks: ConvBlocks, output: Tensor, workspace: Tensor | None) -> list[Launch]:
    """The kernels of a sparse convolution, in order.

    Args:
        call: the tensors; only their dtypes, shapes and strides are read.
        blocks: with ``splits`` above 1 there are two kernels.
        output: contiguous ``[B, N, Cout]``.
        workspace: float32 ``[splits, B, N, Cout]``, or None without splits.
    """
    module = conv_module(call.prologue, call.epilogue)
    count, taps = call.reads.shape[1:]
    outputs = call.weight.shape[0]
    group_inputs, group_outputs = call.rows.shape[2] // call.groups, outputs // call.groups
    split = workspace is not None
    problem = call.problem()
    operands = operand_arguments(call.epilogue, call.operands, "operand")
    arguments = {
        "rows": call.rows,
        "recorded": call.recorded,
        "reads": call.reads,
        "weight": call.weight,
        "output": workspace if split else output,
        "count": count,
        "total": call.total,
        "source_count": call.rows.shape[1],
        "taps": taps,
        "group_inputs": group_inputs,
        "group_outputs": group_outputs,
        "outputs": outputs,
        "rows_sample": call.rows.stride(0),
        "rows_row": call.rows.stride(1),
        "recorded_sample": call.recorded.stride(0),
        "recorded_row": call.recorded.stride(1),
        "reads_sample": call.reads.stride(0) if call.reads.shape[0] > 1 else 0,
        **operand_arguments(call.prologue, call.inputs, "input"),
        **operands,
    }
    constants = {
        "BLOCK_M": blocks.rows,
        "BLOCK_N": blocks.outputs,
        "BLOCK_K": blocks.inputs,
        "FLAT": problem.flat,
        "EVEN": group_inputs % blocks.inputs == 0,
        "SAME_TYPE": call.rows.dtype == call.recorded.dtype,
        "SHARE": blocks.share,
        "SPLIT": split,
        "PRECISION": "tf32" if problem.tensor_float else "ieee",
    }
    blocks_m, blocks_n = math.ceil(call.total / blocks.rows), call.groups * math.ceil(group_outputs / blocks.outputs)
    grid = (blocks_m, blocks_n, blocks.splits)
    launches = [Launch(module.conv_rows, grid, arguments, constants, blocks.warps, blocks.stages)]
    if split:
        arguments = {
            "parts": workspace,
            "output": output,
            "splits": blocks.splits,
            "count": count,
            "total": call.total,
            "outputs": outputs,
            **operands,
        }
        grid = (math.ceil(call.total / REDUCE_BLOCK[0]), math.ceil(outputs / REDUCE_BLOCK[1]), 1)
        constants = {"BLOCK_M": REDUCE_BLOCK[0], "BLOCK_N": REDUCE_BLOCK[1]}
        launches.append(Launch(module.add_splits, grid, arguments, constants, 4, 2))
    return launches


#: Rows and channels of a program that adds the parts of a sum.
REDUCE_BLOCK = (8, 128)


def run_conv(call: ConvCall, blocks: ConvBlocks | None = None) -> Tensor:
    """Convolve; by default with the block sizes of the chip's choice.

    Returns:
        ``[B, N, Cout]``, contiguous, dtype of ``rows``.
    """
    batch, count, outputs = call.rows.shape[0], call.reads.shape[1], call.weight.shape[0]
    output = call.rows.new_empty((batch, count, outputs))
    if output.numel() == 0:
        return output
    if blocks is None:
        # What is captured cannot be measured.
        work = None if captured(call.rows) else functools.partial(_timed, call)
        with on_device(call.rows):
            blocks = best_choice(call.problem(), chip_of(call.rows.device), work).blocks
        taken.note(f"convolution: kernel {blocks}")
    workspace = None
    if blocks.splits > 1:
        workspace = call.rows.new_empty((blocks.splits, batch, count, outputs), dtype=torch.float32)
    for launch in conv_launches(call, blocks, output, workspace):
        launch.run()
    return output


def _timed(call: ConvCall, blocks: ConvBlocks) -> Callable[[], Any]:
    """What the measurement of a choice runs."""
    return lambda: run_conv(call, blocks)


def _channels_inside(*tensors: Tensor) -> bool:
    return all(tensor.stride(-1) == 1 or tensor.shape[-1] == 1 for tensor in tensors)


def supports_conv(
    rows: Tensor, recorded: Tensor, halo: Tensor, table: Tensor, weight: Tensor, bias: Tensor | None, groups: int
) -> bool:
    """Whether the kernels compute this convolution; the arguments are those of the operator.

    They do not for other dtypes, autocast, channels that do not lie side by side, recorded maps of a wider dtype than
    the rows (blocks that fit were chosen for that of the rows), and depthwise convolutions, where 15 of 16 products of
    a tensor core would be wasted.
    """
    return (
        rows.dtype in DTYPES
        and chip_of(rows.device).supports(rows.dtype)
        and recorded.dtype in DTYPES
        and recorded.dtype.itemsize <= rows.dtype.itemsize
        and weight.dtype == rows.dtype
        and weight.is_contiguous()
        and weight.numel() < 2**31
        and (bias is None or bias.is_contiguous())
        and table.is_contiguous()
        and _channels_inside(rows, recorded)
        and (groups == 1 or weight.shape[0] // groups >= 8)
        and not torch.is_autocast_enabled(rows.device.type)
    )


def conv_rows(
    rows: Tensor, recorded: Tensor, halo: Tensor, table: Tensor, weight: Tensor, bias: Tensor | None, groups: int
) -> Tensor:
    """The operator ``conv_rows`` by Triton kernels."""
    return conv_rows_fused(rows, recorded, halo, table, weight, bias, groups, NOTHING, ())


def conv_rows_fused(
    rows: Tensor,
    recorded: Tensor,
    halo: Tensor,
    table: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    epilogue: Chain,
    operands: Sequence[Tensor],
    prologue: Chain = NOTHING,
    inputs: Sequence[Tensor] = (),
) -> Tensor:
    """The operator ``conv_rows`` with a chain behind its bias, and one before rows enter.

    Args:
        rows, recorded, halo, table, weight, bias, groups: as of the operator.
        epilogue, operands: of kinds ``channel``, ``sample`` and ``rows``.
        prologue, inputs: of kinds ``channel`` and ``sample``. Halo rows are read as recorded, so they must have been
            recorded behind it.
    """
    if bias is not None:
        epilogue, operands = add_bias(epilogue), (bias, *operands)
    reads = reads_cache.get(halo, table, rows.shape[1])
    return run_conv(ConvCall(rows, recorded, reads, weight, groups, prologue, tuple(inputs), epilogue, tuple(operands)))


def supports_choice(
    rows: Tensor,
    recorded: Tensor,
    halo: Tensor,
    table: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tile_plan: Sequence[Tensor],
    *others: Any,
) -> bool:
    """Whether the kernels compute the operator ``conv_choice``: those of processors have plans of tiles."""
    return not tile_plan and supports_conv(rows, recorded, halo, table, weight, bias, 1)


def prefers_dense(rows: Tensor, recorded: Tensor, table: Tensor, weight: Tensor) -> bool:
    """Whether convolving the whole map is expected to be faster than the kernel."""
    problem = problem_of(rows, recorded, table, weight, 1)
    return problem.total > 0 and best_choice(problem, chip_of(rows.device)).dense


def conv_whole_map(
    rows: Tensor,
    recorded: Tensor,
    bias: Tensor | None,
    index: Tensor,
    valid: Tensor | None,
    dense_weight: Tensor,
    height: int,
    width: int,
) -> Tensor:
    """The convolution on the whole map; the arguments are those of the operator ``conv_choice`` with these names."""
    taken.note("convolution: dense")
    return paths.conv_dense(rows, recorded, index, valid, dense_weight, bias, height, width)


def conv_choice(*arguments: Any) -> Tensor:
    """The operator ``conv_choice`` by Triton kernels, or on the whole map where that is expected to be faster."""
    rows, recorded, halo, table, weight, bias, _, _, *whole = arguments
    if prefers_dense(rows, recorded, table, weight):
        return conv_whole_map(rows, recorded, bias, *whole)
    return conv_rows(rows, recorded, halo, table, weight, bias, 1)
