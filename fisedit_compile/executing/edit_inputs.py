"""Puts the inputs of an edit graph in order, and tells which of its outputs the caller must not get as they are."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from fisedit_compile.errors import GraphError
from fisedit_compile.executing.lowering import valid_rows
from fisedit_compile.executing.picking import picker
from fisedit_compile.passes.common.meta import VALUE
from fisedit_compile.passes.common.program import SparseProgram
from fisedit_compile.private.operators import schema_of
from fisedit_compile.runtime import RecordedCall
from fisedit_compile.runtime.plans import IndexPlan
from fisedit_compile.runtime.spec import PlanInput


class EditInputs:
    """Puts the inputs of an edit graph in order; what does not change from call to call is worked out once."""

    def __init__(self, program: SparseProgram, argument_count: int, every_valid: bool = False) -> None:
        """``every_valid``: supply ``valid`` also where no row is padding, so that all masks look alike."""
        self._every_valid = every_valid
        pools: dict[str, list[Any]] = {
            "argument": list(range(argument_count)),
            "hoisted": [],
            "invariant": [],
            "plan": [],
            "recorded": [],
        }
        for source in program.edit_inputs:
            if source.kind not in pools:
                raise GraphError(f"unknown kind of edit input: {source.kind!r}")
            if source.reference not in pools[source.kind]:
                pools[source.kind].append(source.reference)
        if pools["argument"] != list(range(argument_count)):
            raise GraphError(f"an edit graph reads arguments {pools['argument']} of {argument_count}")
        offsets: dict[tuple[str, Any], int] = {}
        for kind, references in pools.items():
            for reference in references:
                offsets[kind, reference] = len(offsets)
        self._order = picker([offsets[source.kind, source.reference] for source in program.edit_inputs])
        self._hoisted = picker(pools["hoisted"])
        self._invariant = picker(pools["invariant"])
        self._plan_inputs = tuple(pools["plan"])
        self._sites = tuple(pools["recorded"])
        self._last_plan: tuple[weakref.ref[IndexPlan], tuple[Tensor | None, ...]] | None = None

    def assemble(
        self,
        arguments: Sequence[Any],
        hoisted: Sequence[Tensor],
        invariants: Sequence[Tensor],
        plan: IndexPlan,
        call: RecordedCall,
    ) -> tuple[Any, ...]:
        """The inputs of the edit graph for one call."""
        last = self._last_plan
        if last is None or last[0]() is not plan:
            last = (weakref.ref(plan), tuple(self._plan_tensor(plan, wanted) for wanted in self._plan_inputs))
            self._last_plan = last
        fixed = (*self._hoisted(hoisted), *self._invariant(invariants), *last[1])
        return self._order((*arguments, *fixed, *map(call.__getitem__, self._sites)))

    def _plan_tensor(self, plan: IndexPlan, wanted: PlanInput) -> Tensor | None:
        tensor = plan.tensor(wanted)
        if tensor is None and self._every_valid:
            index = plan.tensor(PlanInput("index", wanted.of))
            return None if index is None else valid_rows(index)
        return tensor


def borrowed_outputs(program: SparseProgram) -> tuple[int, ...]:
    """Outputs of the edit graph that are views of recorded, hoisted or plan tensors: the caller must not get those."""
    placeholders = [node for node in program.edit.graph.nodes if node.op == "placeholder"]
    kept = {node for node, source in zip(placeholders, program.edit_inputs, strict=True) if source.kind != "argument"}
    (results,) = next(node for node in program.edit.graph.nodes if node.op == "output").args
    borrowed = []
    for number, result in enumerate(results):
        node = result
        while isinstance(node, fx.Node) and node.op == "call_function":
            schema = schema_of(node.target)
            if schema is not None and not any(returned.alias_info for returned in schema.returns):
                break
            node = node.args[0] if node.args else None
        if node in kept or (isinstance(node, fx.Node) and node.op == "get_attr"):
            borrowed.append(number)
    return tuple(borrowed)


def spatial_input(program: SparseProgram, users: Sequence[int]) -> int:
    """Position of an input that has the mask's resolution. Others may lie on another device, such as the timestep."""
    domain = program.mask_domain
    placeholders = [node for node in program.record.graph.nodes if node.op == "placeholder"]
    for position in users:
        value = placeholders[position].meta.get(VALUE)
        sizes = tuple(value.shape) if isinstance(value, Tensor) else ()
        if domain.size in sizes or {domain.height, domain.width} <= set(sizes):
            return position
    raise GraphError(f"no input has the resolution of the mask, {domain}")


def used_inputs(graph_module: fx.GraphModule) -> tuple[int, ...]:
    """Positions of the placeholders that something reads."""
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    return tuple(position for position, node in enumerate(placeholders) if node.users)
