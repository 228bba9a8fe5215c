"""What must hold for an edit of a network that moves positions, counted position by position.

Networks are compiled straight from their graph, as the backend does behind Dynamo, so that thousands are tried in
minutes; ``compile_with_dynamo`` takes the user's way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, fx

import fisedit_compile as fisedit
from fisedit_compile.options import Options
from fisedit_compile.passes import InputInfo, build_program
from support.execution import Edit, record
from support.judge import Verdict, judge
from support.moving_networks import MovingNetwork
from support.reference import Recording, Reference, flatten
from support.tolerances import assert_identical, assert_near

#: Records a call with the first picture and returns its outputs, and a function that edits it.
Editing = tuple[tuple[Tensor, ...], Callable[[Tensor, Tensor], tuple[Tensor, ...]]]


@dataclass
class Counts:
    """Positions of what was checked, over all networks.

    Attributes:
        values, positions: of the values of the networks.
        active: computed by an edit, for one mask each.
        right: equal to the dense network on the mixed picture, beforehand.
        owed: must be right, as they depend on the mask and on nothing outside of it.
        idle: active, although they depend on cells and none of them is in the mask.
        lent: active, although they depend on nothing: padding that holds the place of its edge.
        returned: of outputs, those that are right and may have changed.
    """

    networks: int = 0
    values: int = 0
    positions: int = 0
    active: int = 0
    right: int = 0
    owed: int = 0
    idle: int = 0
    lent: int = 0
    returned: int = 0

    def add(self, other: Counts) -> None:
        """Count these as well."""
        for name in (item.name for item in fields(self)):
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Tried:
    """A network with its reference, a recording, an edit by a mask, and the dense network on the mixed picture."""

    def __init__(self, network: MovingNetwork, mask: Tensor, reference: Reference, dtype: torch.dtype) -> None:
        self.network, self.mask, self.reference, self.dtype = network, mask, reference, dtype
        weights = network.weights(dtype)
        self.first, self.second = network.picture(0, dtype), network.picture(1, dtype)
        mixed = torch.where(mask, self.second, self.first)
        self.recording: Recording = self.reference.record((self.first, *weights))
        self.edited: Recording = self.reference.edit(self.recording, (self.second, *weights), mask)
        self.dense: Recording = self.reference.record((mixed, *weights))
        self.verdicts: dict[str, Verdict] = judge(self.reference, mask)

    def check_reference(self) -> Counts:
        """The definition by itself: the masked reference against the dense network, every value of the graph."""
        counts = Counts(networks=1)
        for name, verdict in self.verdicts.items():
            what = f"value {name} of {self.network}"
            self._compare(self.edited.values[name], self.dense.values[name], verdict.right, f"{what}, right positions")
            missed = int((verdict.owed & ~verdict.right).sum())
            assert missed == 0, f"{missed} positions inside the mask are not right: {what}"
            counts.values += 1
            counts.positions += verdict.right.numel()
            for kind in ("active", "right", "owed", "idle", "lent"):
                setattr(counts, kind, getattr(counts, kind) + int(getattr(verdict, kind).sum()))
        return counts

    def check_outputs(self, editing: Editing) -> Counts:
        """The four properties of a compiled network's outputs."""
        recorded, edit = editing
        outputs = edit(self.second, self.mask)
        counts = Counts()
        allowed = self.reference.returned(self.mask)
        fine = self.reference.prepared(self.mask)
        for number, node in enumerate(self.reference.results):
            what = f"output {number} of {self.network}"
            field, verdict, inside = self.reference.fields[node.name][0], self.verdicts[node.name], allowed[number]
            assert inside is not None
            output, wanted = outputs[number], self.edited.outputs[number]
            assert_near(recorded[number], self.recording.outputs[number], f"recording, {what}", self.dtype)
            may = self.reference.allowed(field, fine)
            right = torch.where(inside, verdict.right, ~field.touched(fine))
            self._compare(output, self.dense.outputs[number], right, f"dense network, {what}")
            missed = int((verdict.owed & may & ~right).sum())
            assert missed == 0, f"{missed} positions inside the mask are not right: {what}"
            outside = ~inside[:, None].expand(output.shape)
            assert_identical(output[outside], recorded[number][outside], f"outside, {what}")
            assert_near(output, wanted, f"masked reference, {what}", self.dtype)
            counts.returned += int((right & inside).sum())
        return counts

    def _compare(self, actual: Tensor, expected: Tensor, where: Tensor, what: str) -> None:
        kept = where[:, None].expand(actual.shape)
        assert_near(torch.where(kept, actual, expected), expected, what, self.dtype)


def reference_of(network: MovingNetwork) -> Reference:
    """The masked reference of a network, for any data type."""
    inputs = (network.picture(0), *network.weights())
    return Reference(network.graph, inputs, graph=network.graph, maps=True)


def compile_graph(network: MovingNetwork, dtype: torch.dtype = torch.float32, **options: Any) -> Editing:
    """Compile a network's graph and record the first picture."""
    graph = fx.GraphModule({}, fx.Graph())
    names: dict[fx.Node, fx.Node] = {}
    output = graph.graph.graph_copy(network.graph.graph, names)
    for old, new in names.items():
        new.meta = dict(old.meta)
    graph.graph.output(output)
    infos = [InputInfo("user", "x")]
    infos += [InputInfo("parameter", f"weight_{number}") for number in range(len(network.shapes) - 1)]
    program = build_program(graph, infos, Options(**options))
    weights = network.weights(dtype)
    base = record(program, [network.picture(0, dtype), *weights])

    def edit(picture: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return Edit(program, base, [picture, *weights], mask[None]).run()

    return base.outputs, edit


def compile_with_dynamo(network: MovingNetwork, **options: Any) -> Editing:
    """Compile a network by ``torch.compile`` and record the first picture."""
    torch.compiler.reset()
    runtime = fisedit.Runtime()
    module: Any = torch.compile(network.module(), backend="fisedit", options={"runtime": runtime, **options})
    with torch.no_grad(), runtime.record("base"):
        recorded = flatten(module(network.picture(0)))

    def edit(picture: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad(), runtime.edit("base", mask=mask):
            return flatten(module(picture))

    return recorded, edit


def check(network: MovingNetwork, mask: Tensor, compilers: Sequence[Callable[[MovingNetwork], Editing]]) -> Counts:
    """Everything of one network and mask: the definition in double precision, compiled networks in single."""
    reference = reference_of(network)
    counts = Tried(network, mask, reference, torch.float64).check_reference()
    if compilers:
        tried = Tried(network, mask, reference, torch.float32)
        for compile_network in compilers:
            counts.add(tried.check_outputs(compile_network(network)))
    return counts
