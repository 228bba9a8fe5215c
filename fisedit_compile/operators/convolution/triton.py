"""Sparse convolution by generated Triton kernels: what to launch, and with which arguments."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.operators.choosing import taken
from fisedit_compile.operators.convolution.spec import CONV_CHOICE, CONV_ROWS, ConvChoice, ConvRows
from fisedit_compile.operators.convolution.triton_template import conv_source
from fisedit_compile.operators.library import CostModel
from fisedit_compile.operators.triton.blocks import ConvBlocks, ConvProblem, make_problem
from fisedit_compile.operators.triton.chips import chip_of
from fisedit_compile.operators.triton.devices import captured, on_device
from fisedit_compile.operators.triton.launches import Launch
from fisedit_compile.operators.triton.pointwise import Chain, add_bias, operand_arguments
from fisedit_compile.operators.triton.reads import reads_cache
from fisedit_compile.operators.triton.sources import load_source
from fisedit_compile.operators.triton.tuning import best_choice
from fisedit_compile.operators.triton.working import implementation

NOTHING = Chain()
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def conv_module(prologue: Chain, epilogue: Chain) -> ModuleType:
    """The module of kernels for these chains."""
    return load_source("conv", conv_source(prologue, epilogue))


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


def supports_conv(given: ConvRows) -> str | None:
    """Why the kernels do not compute this convolution; None when they do."""
    rows, recorded, halo, table, weight, bias, groups = given
    if rows.dtype not in DTYPES or recorded.dtype not in DTYPES or not chip_of(rows.device).supports(rows.dtype):
        return "there are no kernels for these dtypes on this GPU"
    # Blocks that fit were chosen for the dtype of the rows.
    if recorded.dtype.itemsize > rows.dtype.itemsize:
        return "the recorded map is of a wider dtype than the rows"
    if weight.dtype != rows.dtype or not weight.is_contiguous() or weight.numel() >= 2**31:
        return "the weight is of another dtype, not contiguous, or too large"
    if not table.is_contiguous() or not _channels_inside(rows, recorded) or not (bias is None or bias.is_contiguous()):
        return "table or bias are not contiguous, or channels do not lie side by side"
    # 15 of 16 products of a tensor core would be wasted.
    if groups > 1 and weight.shape[0] // groups < 8:
        return "groups have few outputs"
    return "autocast is on" if torch.is_autocast_enabled(rows.device.type) else None


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


def supports_choice(given: ConvChoice) -> str | None:
    """Why the kernels do not compute the operator ``conv_choice``; None when they do."""
    return "plans of tiles are for processors" if given.tile_plan else supports_conv(given.by_rows())


def prefers_dense(given: ConvChoice) -> bool:
    """Whether convolving the whole map is expected to be faster than the kernel."""
    rows = given.rows
    problem = problem_of(rows, given.recorded, given.table, given.weight, 1)
    return problem.total > 0 and best_choice(problem, chip_of(rows.device)).dense


def _expected(given: ConvChoice, names: Sequence[str]) -> str | None:
    if "triton" not in names:
        return None
    return "dense" if prefers_dense(given) else "triton"


IMPLEMENTATIONS = (
    implementation(CONV_ROWS, lambda given: conv_rows(*given), supports_conv),
    # What runs is counted with its blocks.
    implementation(CONV_CHOICE, lambda given: conv_rows(*given.by_rows()), supports_choice, counts=True),
)
MODELS = (CostModel(CONV_CHOICE, _expected, rank=1),)
