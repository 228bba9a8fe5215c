"""A graph inside record and edit: recorded or edited, sparsely or densely, as the runtime's phase says."""

from __future__ import annotations

import hashlib
import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.errors import CallMismatchError, GradientError, GraphError, ScalarMismatchError
from fisedit_compile.executing.edit_inputs import EditInputs, borrowed_outputs, spatial_input, used_inputs
from fisedit_compile.executing.filled import filling_call, given_inputs, parameter_names
from fisedit_compile.executing.lowering import Lowered, lower
from fisedit_compile.executing.picking import picker
from fisedit_compile.executing.prologues import InvariantMemo, prologues
from fisedit_compile.executing.replay import Capturer, ReplayedGraph, Roles
from fisedit_compile.executing.stabilised import DenseWay, DenseWays
from fisedit_compile.operators.choosing import taken
from fisedit_compile.options import without_hints
from fisedit_compile.passes.common.program import GraphInput, Program, SparseProgram
from fisedit_compile.runtime import (
    EditPhase,
    FillingCall,
    PhaseSource,
    PlanSpec,
    ProgramKey,
    RecordedCall,
    RecordPhase,
    Relay,
    Site,
)
from fisedit_compile.runtime.filling import recorded_outputs
from fisedit_compile.runtime.fingerprint import content_identity, has_identity
from fisedit_compile.tracing.identity import GraphIdentity

logger = logging.getLogger(__name__)

Dense = Callable[..., Sequence[Tensor]]
Phase = RecordPhase | EditPhase
PASS_A_TENSOR = (
    "pass it as a tensor (for example torch.tensor(t)): the compiler makes a graph of its own for the first value of a "
    "Python number, so that the calls of an edit need not line up with the recorded ones"
)
NOT_LINED_UP = (
    "this graph runs densely and is not masked; of networks that choose by their data what to compute (an expert for "
    "each token) the calls cannot be lined up with recorded ones: use those outside of record, edit and edit sessions"
)

BEHIND_A_BREAK = (
    "PyTorch's compiler broke the network off in {line}, and makes another graph of the rest where a number that "
    "Python reads from a tensor there (item(), int(...), the size of what nonzero() finds) differs from call to call. "
    "Compute with tensors in that line (x.amax() in place of x.max().item(), a sum or torch.where in place of "
    "nonzero()); if the number is one that you give, give it as a tensor; or call the network outside of record, edit "
    "and edit sessions"
)


class Executable:
    """A graph and its program, as they run inside record and edit."""

    def __init__(
        self,
        dense: Dense,
        program: Program | None,
        runtime: PhaseSource,
        identity: GraphIdentity,
        lowering: str = "plain",
        capturer: Capturer | None = None,
    ) -> None:
        """Prepare to run a program; nothing is lowered yet.

        Args:
            dense: the graph as Dynamo made it.
            program: None when the graph could not be traced, so that it always runs densely and stores nothing;
                ``identity.dense_reason`` then says why.
            runtime: whose recordings these are.
            identity: names the graph in recordings and messages.
            lowering: of the record and edit graphs.
            capturer: captures and replays the launches of edit graphs; None: they are launched one by one.
        """
        self.dense = dense
        self.program = program
        self.identity = identity
        self._runtime = runtime
        self._lowering = lowering
        self._capturer = capturer
        self._lock = threading.Lock()
        self._lowered: dict[str, Lowered] = {}
        self._sites: tuple[Site, ...] = program.sites if program is not None else ()
        self._sparse = program if isinstance(program, SparseProgram) else None
        self._ways = DenseWays(program, identity.label, identity.dense_reason)
        self._parameters = picker(identity.positions("parameter"))
        self._parameter_names = parameter_names(identity.input_infos)
        self._held = picker(identity.positions("parameter", "state"))
        self._scalars = picker([at for at in identity.positions("scalar") if at not in identity.constants])
        self._users = identity.positions("user", "scalar")
        self._numbers: weakref.WeakKeyDictionary[Any, tuple[Any, ...]] = weakref.WeakKeyDictionary()
        self._hoisted: weakref.WeakKeyDictionary[Phase, dict[ProgramKey, tuple[Tensor, ...]]]
        self._hoisted = weakref.WeakKeyDictionary()
        self._invariants: weakref.WeakKeyDictionary[EditPhase, dict[ProgramKey, InvariantMemo]]
        self._invariants = weakref.WeakKeyDictionary()
        # Which of the held inputs have no identity: the first call tells, on whose types Dynamo guards.
        self._replaceable: tuple[int, ...] | None = None
        self._key: ProgramKey | None = None
        # Recordings of one graph serve all ways of running it; what its prologue computes depends on the way.
        self._prologue_hash = ""
        self._warned = False
        if isinstance(program, SparseProgram):
            if program.prologue is not None:
                text = f"{identity.graph_hash} {program.prologue.graph}"
                self._prologue_hash = hashlib.sha256(text.encode()).hexdigest()
            every_valid = lowering == "inductor" or capturer is not None
            self._inputs = EditInputs(program, len(identity.input_infos), every_valid)
            self._borrowed = borrowed_outputs(program)
            self._output_names = tuple(f"output:{number}" for number in range(program.output_count))
            self._dense_inputs = picker(program.dense_inputs)
            self._prologue_parameters = picker(used_inputs(program.prologue) if program.prologue else ())
            sources = [(source.kind, source.reference) for source in program.invariant_inputs]
            count = len(identity.input_infos)
            read = {int(at) for kind, at in sources if kind == "argument"}  # type: ignore[arg-type]
            # Not the weights among them, which are known not to change within one context.
            self._prompts = picker([at for at in self._users if at in read])
            self._invariant_inputs = picker(
                [int(at) + (0 if kind == "argument" else count) for kind, at in sources]  # type: ignore[arg-type]
            )
            self._picture = spatial_input(program, identity.positions("user"))

    def __call__(self, phase: Phase, *arguments: Any) -> Sequence[Tensor]:
        """Record or edit one call; ``arguments`` are the flat inputs of the graph."""
        for position in self._users:
            value = arguments[position]
            if isinstance(value, Tensor) and value.requires_grad:
                raise GradientError(
                    f"input {self.identity.input_infos[position].name} requires grad; record and edit run without "
                    "autograd",
                    advice="pass a detached tensor, or call the network outside of them",
                )
        if self.identity.steady:
            self._check_numbers(phase, arguments)
        if self.identity.dense_reason is not None and not self._warned:
            self._warned = True
            how = "as a whole and is masked at its outputs" if self._sparse is not None else "and is not masked"
            reason = self.identity.dense_reason
            if isinstance(self._runtime, Relay):
                reason = without_hints(reason)
            logger.warning("%s runs densely %s: %s", self.identity.label, how, reason)
        parameters = self._parameters(arguments)
        key = self._program_key(self._held(arguments))
        with torch.no_grad():
            if isinstance(phase, RecordPhase):
                return self._record(phase, key, parameters, arguments)
            return self._edit(phase, key, parameters, arguments)

    def _program_key(self, held: Sequence[Tensor]) -> ProgramKey:
        if self._replaceable is None:
            kinds = [info.kind for info in self.identity.input_infos if info.kind in ("parameter", "state")]
            self._replaceable = tuple(
                at for at, kind in enumerate(kinds) if kind == "parameter" and not has_identity(held[at])
            )
        numbers: list[int | str] = list(map(id, held))
        for at in self._replaceable:
            numbers[at] = content_identity(held[at])
        identities = tuple(numbers)
        key = self._key
        if key is None or key.parameters != identities:
            key = self._key = ProgramKey(self.identity.graph_hash, identities, self.identity.label)
        return key

    def _check_numbers(self, phase: Phase, arguments: Sequence[Any]) -> None:
        """Refuse changes of the Python numbers for which Dynamo's choice of a graph depends on earlier calls."""
        values = tuple(
            float(value) if isinstance(value, Tensor) else value
            for value in (arguments[position] for position in self.identity.steady)
        )
        before = self._numbers.setdefault(phase, values)
        for position, first, now in zip(self.identity.steady, before, values, strict=True):
            if first != now:
                name = self.identity.input_infos[position].name
                if self.identity.resumed is not None:
                    raise ScalarMismatchError(
                        f"a Python number of {self.identity.label} changed from {first} to {now} between calls; "
                        f"{BEHIND_A_BREAK.format(line=self.identity.resumed)}"
                    )
                raise ScalarMismatchError(
                    f"the Python number {name} changed from {first} to {now} between calls", advice=PASS_A_TENSOR
                )

    def _graph(self, name: str) -> Lowered:
        """The lowered graph ``name`` of the program, made at its first use."""
        lowered = self._lowered.get(name)
        if lowered is None:
            with self._lock:
                lowered = self._lowered.get(name)
                if lowered is None:
                    lowered = self._lowered[name] = self._lower(name)
        return lowered

    def _run(self, phase: Phase, name: str, inputs: Sequence[Any]) -> Sequence[Any]:
        """Run a graph of the program, and count the ways it took."""
        graph = self._graph(name)
        # What other calls of this thread left behind, such as operators used by themselves, is not of this one.
        taken.drain()
        results = graph(*inputs)
        phase.count_ways(taken.drain())
        return results

    def _lower(self, name: str) -> Lowered:
        if self.program is None:
            raise GraphError(f"{self.identity.label} has no graph to run as {name}")
        sources = self._sparse.edit_inputs if self._sparse and name in ("edit", "edit_save") else None
        # The prologue and the invariants run once: compiling them costs more than it saves.
        lowering = "plain" if name in ("prologue", "invariants") else self._lowering
        lowered = lower(self.program.graph(name), lowering, sources)
        if sources is None or self._capturer is None:
            return lowered
        return ReplayedGraph(lowered, self._roles(sources), self._capturer, self.identity.label)

    def _roles(self, sources: Sequence[GraphInput]) -> Roles:
        """What a captured graph may read in place, and what it needs to copy once only."""
        parameters = self.identity.positions("parameter")
        held, stable = set(), set()
        for position, source in enumerate(sources):
            if source.kind == "hoisted" or (source.kind == "argument" and source.reference in parameters):
                held.add(position)
            elif source.kind != "argument":
                stable.add(position)
        return Roles(len(sources), frozenset(held), frozenset(stable))

    def _run_densely(self, phase: Phase, key: ProgramKey, arguments: Sequence[Any], way: DenseWay) -> Sequence[Tensor]:
        if self._sparse is None or (way.running == "dense" and self._sparse.dense is None):
            return self.dense(*arguments)
        hoisted = self._hoisted_for_dense(self._sparse, phase, key, arguments)
        return self._run(phase, way.running, (*arguments, *hoisted, *way.inputs))

    def _hoisted_for_dense(
        self, program: SparseProgram, phase: Phase, key: ProgramKey, arguments: Sequence[Any]
    ) -> Sequence[Tensor]:
        """What the record and dense graphs read of what the prologue computes."""
        return self._dense_inputs(self._hoist(program, phase, key, arguments)) if program.dense_inputs else ()

    def _dense_and_sites(
        self, phase: Phase, key: ProgramKey, arguments: Sequence[Any], way: DenseWay
    ) -> tuple[Sequence[Tensor], dict[str, Tensor]]:
        """Run densely; the outputs, and what a recorded call stores."""
        if self.program is None:
            return self.dense(*arguments), {}
        hoisted = self._hoisted_for_dense(self._sparse, phase, key, arguments) if self._sparse else ()
        results = self._run(phase, way.storing, (*arguments, *hoisted, *way.inputs))
        count = self.program.output_count
        return results[:count], dict(zip((site.name for site in way.sites), results[count:], strict=True))

    def _protected(self, arguments: Sequence[Any], outputs: Sequence[Tensor]) -> list[Tensor]:
        return [value for value in (*arguments, *outputs) if isinstance(value, Tensor)]

    def _record(
        self, phase: RecordPhase, key: ProgramKey, parameters: Sequence[Tensor], arguments: Sequence[Any]
    ) -> Sequence[Tensor]:
        fills = partial(filling_call, self.identity.input_infos, key, arguments) if self.identity.fills else None
        way = self._ways.of_recording(phase)
        phase.begin(key, parameters, self._scalars(arguments), self._runtime.bytes_needed(way.sites), fills)
        outputs, tensors = self._dense_and_sites(phase, key, arguments, way)
        phase.commit(key, tensors, way.sites, self._protected(arguments, outputs))
        return outputs

    def _begin(
        self, phase: EditPhase, key: ProgramKey, parameters: Sequence[Tensor], arguments: Sequence[Any], dense: bool
    ) -> RecordedCall:
        try:
            return phase.begin(key, parameters, self._scalars(arguments), dense)
        except CallMismatchError as error:
            if self.identity.resumed is not None:
                # What the runtime advises, it takes for the only graph of the network.
                raise CallMismatchError(
                    f"the calls of {self.identity.label} do not line up with those of base {phase.base.name!r}; "
                    f"{BEHIND_A_BREAK.format(line=self.identity.resumed)}"
                ) from error
            if self.identity.numbers:
                names = ", ".join(self.identity.input_infos[position].name for position in self.identity.numbers)
                error.add_note(f"{names} came as a Python number; {PASS_A_TENSOR}")
            if self._sparse is None:
                error.add_note(NOT_LINED_UP)
            raise

    def _edit(
        self, phase: EditPhase, key: ProgramKey, parameters: Sequence[Tensor], arguments: Sequence[Any]
    ) -> Sequence[Tensor]:
        sparse = self._sparse
        full = phase.full and sparse is not None and sparse.dense_when_full
        dense = phase.dense_call or sparse is None or full
        filling = phase.filled_by(key, parameters, self._parameter_names)
        if filling is not None:
            self._stand_in(phase, filling, key, parameters, arguments)
        call = self._begin(phase, key, parameters, arguments, dense)
        with phase.running(call, dense):
            if sparse is not None and not dense:
                return self._edit_sparsely(sparse, phase, key, call, arguments)
            if phase.full and sparse is not None:
                phase.skip_plan(self._plan_spec(sparse, arguments))
            way = self._ways.of_edit(phase, call)
            if not phase.saving:
                return self._run_densely(phase, key, arguments, way)
            outputs, tensors = self._dense_and_sites(phase, key, arguments, way)
            phase.commit(key, tensors, way.sites, self._protected(arguments, outputs))
            return outputs

    def _stand_in(
        self,
        phase: EditPhase,
        filling: FillingCall,
        key: ProgramKey,
        parameters: Sequence[Tensor],
        arguments: Sequence[Any],
    ) -> None:
        """Compute what this graph would have stored in place of a recorded call that was of another graph, or say why
        that cannot be."""
        given = given_inputs(self.identity.input_infos, self.identity.constants, arguments, filling)
        if self._sparse is not None and self.identity.dense_reason is not None:
            given = f"a graph that runs as a whole is not run twice: {self.identity.dense_reason}"
        if isinstance(given, str):
            phase.refuse_stand_in(given)
            return
        with phase.standing_in(filling, key, parameters, self._parameter_names) as keep:
            if self._sparse is None:
                # Nothing of a recorded call is read.
                keep(self._scalars(given), {}, ())
                return
            outputs, tensors = self._dense_and_sites(phase, key, given, self._ways.plain)
            recorded = phase.base.recordings[filling.key].calls[0]
            sites = recorded_outputs(recorded.reader(), outputs)
            if sites is None:
                phase.refuse_stand_in("for the recorded inputs, the network as it is now returns something else")
                return
            stored = dict(zip(recorded, recorded.stored(), strict=True))
            tensors.update((name, stored[site]) for name, site in zip(self._output_names, sites, strict=True))
            keep(self._scalars(given), tensors, self._sites, self._protected(given, outputs))

    def _plan_spec(self, program: SparseProgram, arguments: Sequence[Any]) -> PlanSpec:
        device = arguments[self._picture].device
        bucketed = self._capturer is not None
        return PlanSpec(program.mask_domain, program.domains, program.stencils, program.batch, device, bucketed)

    def _edit_sparsely(
        self, program: SparseProgram, phase: EditPhase, key: ProgramKey, call: RecordedCall, arguments: Sequence[Any]
    ) -> Sequence[Tensor]:
        plan = phase.plan(self._plan_spec(program, arguments))
        if plan is None:
            if phase.saving:
                phase.commit(key, dict(zip(call, call.stored(), strict=True)), self._ways.stored_by(call))
            return tuple(call[name].clone() for name in self._output_names)
        hoisted = self._hoist(program, phase, key, arguments)
        invariants = self._compute_invariants(program, phase, key, arguments, hoisted)
        inputs = self._inputs.assemble(arguments, hoisted, invariants, plan, call)
        results = self._run(phase, "edit_save" if phase.saving else "edit", inputs)
        outputs = list(results[: program.output_count])
        for number in self._borrowed:
            outputs[number] = outputs[number].clone()
        outputs = [call.like(name, output) for name, output in zip(self._output_names, outputs, strict=True)]
        if phase.saving:
            updated = phase.updated_sites(call, self._sites, results[program.output_count :], plan)
            phase.commit(key, updated, self._sites, self._protected(arguments, outputs))
        return outputs

    def _hoist(
        self, program: SparseProgram, phase: Phase, key: ProgramKey, arguments: Sequence[Any]
    ) -> tuple[Tensor, ...]:
        """What the prologue computes. Within one edit the weights are known not to change; while a run is recorded they
        may, and are looked at in each call."""
        if program.prologue is None:
            return ()
        known = self._hoisted.setdefault(phase, {})
        if key not in known or isinstance(phase, RecordPhase):
            parameters = self._prologue_parameters(arguments)
            known[key] = prologues.get(
                replace(key, graph_hash=self._prologue_hash),
                parameters,
                phase.fingerprint(key),
                lambda: self._graph("prologue")(*arguments),
            )
        return known[key]

    def _compute_invariants(
        self,
        program: SparseProgram,
        phase: EditPhase,
        key: ProgramKey,
        arguments: Sequence[Any],
        hoisted: Sequence[Tensor],
    ) -> Sequence[Tensor]:
        """What depends on parameters and inputs such as the prompt only; computed once for each prompt of an edit."""
        if program.invariants is None:
            return ()
        memo = self._invariants.setdefault(phase, {}).setdefault(key, InvariantMemo())
        inputs = self._invariant_inputs((*arguments, *hoisted))
        return memo.get(self._prompts(arguments), lambda: self._graph("invariants")(*inputs))
