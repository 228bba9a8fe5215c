"""Which kernels a GPU would choose for a network's sparse convolutions, and how long each is expected to take.

Needs no GPU: choices come from a model of each chip (``operators/triton/blocks.py``), or from what was measured
on the chip at hand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fisedit_compile.errors import OptionError
from fisedit_compile.operators.triton.blocks import BlockChoice, ConvProblem, make_problem
from fisedit_compile.operators.triton.chips import KNOWN_CHIPS, Chip
from fisedit_compile.operators.triton.tuning import best_choice
from fisedit_compile.passes import GraphInput, SparseProgram
from fisedit_compile.passes.common.meta import VALUE
from fisedit_compile.passes.processor.choose_convolution import is_plain
from fisedit_compile.runtime.plans import IndexPlan
from fisedit_compile.runtime.spec import PlanInput, Stencil

fisedit = torch.ops.fisedit


@dataclass(frozen=True)
class KernelChoice:
    """Convolutions that are alike.

    Attributes:
        problem: their sizes under the mask.
        count: how many there are in a call.
        choice: what computes each of them.
        whole_map: whether they can run on the whole map instead: kernels of 3x3 with stride 1 and one group.
    """

    problem: ConvProblem
    count: int
    choice: BlockChoice
    whole_map: bool

    @property
    def dense(self) -> bool:
        """Whether they run on the whole map."""
        return self.whole_map and self.choice.dense

    @property
    def seconds(self) -> float:
        """Expected seconds of all of them."""
        return self.count * (self.choice.dense_seconds if self.dense else self.choice.seconds)


def named_chip(name: str) -> Chip:
    """A well-known chip by its name, such as ``H100`` or ``rtx 4090``.

    Raises:
        OptionError: there is none of that name.
    """
    chips = {_plain(chip.name): chip for chip in KNOWN_CHIPS.values()}
    if _plain(name) not in chips:
        known = ", ".join(chip.name for chip in KNOWN_CHIPS.values())
        raise OptionError(f"unknown chip {name!r}; expected one of {known}")
    return chips[_plain(name)]


def _plain(name: str) -> str:
    return "".join(name.split()).lower()


def kernel_choices(program: SparseProgram, plan: IndexPlan, chip: Chip) -> list[KernelChoice]:
    """What computes the sparse convolutions of a program under a mask.

    Args:
        program: of a network; convolutions in dtypes that the chip does not compute in, and those whose weights are
            computed from inputs, are left out.
        plan: of the mask.
        chip: what to choose for.

    Returns:
        In the order in which they first occur.
    """
    problems = Counter(found for found in _problems(program, plan) if chip.supports(found[0].dtype))
    return [
        KernelChoice(problem, count, best_choice(problem, chip), whole_map)
        for (problem, whole_map), count in problems.items()
    ]


def _problems(program: SparseProgram, plan: IndexPlan) -> list[tuple[ConvProblem, bool]]:
    placeholders = [node for node in program.edit.graph.nodes if node.op == "placeholder"]
    sources = dict(zip(placeholders, program.edit_inputs, strict=True))
    found = []
    for node in program.edit.graph.nodes:
        if node.target not in (fisedit.conv_rows.default, fisedit.conv_choice.default):
            continue
        table, packed = node.args[3:5]
        packing = _packing(packed, program, sources)
        if packing is None:
            continue
        weight, transposed, groups = packing
        reference = sources[table].reference
        assert isinstance(reference, PlanInput) and isinstance(reference.of, Stencil)
        stencil = reference.of
        rows: Any = plan.tensor(reference)
        first, second = weight.shape[:2]
        problem = make_problem(
            batch=program.batch,
            source_count=plan.count(stencil.source),
            positions=stencil.source.size,
            inputs=first if transposed else second * groups,
            count=rows.shape[1],
            taps=stencil.taps,
            outputs=second * groups if transposed else first,
            groups=groups,
            dtype=weight.dtype,
        )
        found.append((problem, is_plain(stencil) and groups == 1))
    return found


def _packing(
    node: fx.Node, program: SparseProgram, sources: Mapping[fx.Node, GraphInput]
) -> tuple[Tensor, bool, int] | None:
    """The weight that was packed, whether the convolution is transposed, and its groups; None when the weight is
    computed."""
    source = sources.get(node)
    if source is not None and source.kind == "hoisted" and program.prologue is not None:
        outputs = next(node for node in program.prologue.graph.nodes if node.op == "output").args[0]
        node = outputs[source.reference]
    while node.target is not fisedit.pack_conv_weight.default:
        if not node.args or not isinstance(node.args[0], fx.Node):
            return None
        node = node.args[0]
    weight, transposed, groups = node.args
    value = weight.meta.get(VALUE) if isinstance(weight, fx.Node) else None
    if not isinstance(value, Tensor) or not isinstance(groups, int):
        return None
    return value, bool(transposed), groups
