"""The product of the passes: lifted, functional graphs, and what the runtime must supply to run them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import fx

from fisedit_compile.passes.common.report import Report
from fisedit_compile.runtime.spec import Domain, PlanInput, Site, Stencil

InputKind = Literal["parameter", "state", "scalar", "user"]
SourceKind = Literal["argument", "hoisted", "invariant", "plan", "recorded"]


@dataclass(frozen=True)
class InputInfo:
    """What a flat input of the traced graph is: ``parameter`` (also buffers), ``state`` (a buffer or parameter that the
    graph changes in place), ``scalar`` (compared between record and edit) or ``user`` (all others; labels.py says which
    numbers are among them). ``tokens``: the resolution of a picture ``[B, H * W, C]``, where the user says that it is
    one."""

    kind: InputKind
    name: str
    tokens: Domain | None = None


@dataclass(frozen=True)
class GraphInput:
    """Where an input of the edit graph comes from.

    ``argument``: the call's flat argument number ``reference``; ``hoisted``: output ``reference`` of the prologue;
    ``invariant``: output ``reference`` of the invariants graph; ``plan``: a tensor made from the mask; ``recorded``:
    the site named ``reference`` of the recorded call.
    """

    kind: SourceKind
    reference: int | str | PlanInput


@dataclass(frozen=True, kw_only=True)
class StabilisedGraphs:
    """Graphs by which dense calls take the attention to shared words from the recording.

    Attributes:
        record_maps: the record graph; behind its outputs stands one tensor for each site of attention maps.
        stabilised: behind the inputs of the record graph it takes an alignment int64 ``[B, tokens]`` for each number
            of tokens, and the recorded maps; outputs are the original outputs.
        stabilised_save: as ``stabilised``; outputs are those of ``record_maps``.
    """

    record_maps: fx.GraphModule
    stabilised: fx.GraphModule
    stabilised_save: fx.GraphModule


@dataclass(kw_only=True)
class Stabilisation:
    """What ``stabilise`` found. Few runs ask for its graphs, which are made when they are first asked for.

    Attributes:
        sites: of the attention maps ``[..., positions, tokens]``, which recorded calls store when asked to.
        tokens: the numbers of tokens that there is an alignment for, each once.
        make: makes the graphs.
    """

    sites: tuple[Site, ...]
    tokens: tuple[int, ...]
    make: Callable[[], StabilisedGraphs]

    @cached_property
    def graphs(self) -> StabilisedGraphs:
        """The graphs."""
        return self.make()


@dataclass(kw_only=True)
class Program:
    """One compiled graph, of one of the kinds below. See docs/architecture.md for how its graphs relate.

    Attributes:
        record: dense graph; inputs are the flat inputs, outputs are the original outputs followed by one tensor for
            each site.
        sites: what a recorded call stores, in order; outputs are sites named ``output:0`` and so on.
        output_count: how many outputs the graph has.
        report: what the passes did and did not do.
        parameter_positions, scalar_positions: which flat inputs are parameters, and which are scalars.
    """

    record: fx.GraphModule
    sites: tuple[Site, ...]
    output_count: int
    report: Report
    parameter_positions: tuple[int, ...]
    scalar_positions: tuple[int, ...]

    def graphs(self) -> dict[str, fx.GraphModule]:
        """All graphs that there are, by the name of their field."""
        return {"record": self.record}

    def graph(self, name: str) -> fx.GraphModule:
        """One graph, by the name of its field."""
        return self.graphs()[name]


@dataclass(kw_only=True)
class DenseProgram(Program):
    """Of a graph without spatial inputs: it is recorded, edits compute it densely, and nothing is masked."""


@dataclass(kw_only=True)
class SparseProgram(Program):
    """Of a graph with spatial inputs. The inputs of ``record`` are the flat inputs followed by ``dense_inputs``.

    Attributes:
        edit: graph over rows; inputs as in ``edit_inputs``; outputs are the original outputs.
        edit_save: as ``edit``, followed by one update for each site (rows ``[B, N, *C]``, a value, or None: keep).
        edit_inputs: what the edit graphs read.
        domains, stencils: what the mask is made into plans for.
        mask_domain: finest resolution of the spatial inputs.
        batch: batch size of all spatial values.
        prologue: computes what depends on parameters only (packed weights); inputs are the flat inputs. None when
            nothing does.
        invariants: computes what depends on parameters and on inputs such as the prompt only; None when nothing does.
        invariant_inputs: its inputs, of the kinds ``argument`` and ``hoisted``.
        dense: the record graph without what it stores; None when nothing was rewritten for dense calls, for which the
            graph as Dynamo made it then serves.
        dense_inputs: which outputs of the prologue the record and dense graphs read.
        dense_when_full: a mask of everything leaves nothing of the recording, so that the dense graph is its edit.
        stabilisation: graphs of dense calls with recorded attention; None without cross-attention to words.
    """

    edit: fx.GraphModule
    edit_save: fx.GraphModule
    edit_inputs: tuple[GraphInput, ...]
    domains: tuple[Domain, ...]
    stencils: tuple[Stencil, ...]
    mask_domain: Domain
    batch: int
    prologue: fx.GraphModule | None = None
    invariants: fx.GraphModule | None = None
    invariant_inputs: tuple[GraphInput, ...] = ()
    dense: fx.GraphModule | None = None
    dense_inputs: tuple[int, ...] = ()
    dense_when_full: bool = False
    stabilisation: Stabilisation | None = None

    def graphs(self) -> dict[str, fx.GraphModule]:
        """All graphs that there are, by the name of their field."""
        named = {
            "record": self.record,
            "dense": self.dense,
            "edit": self.edit,
            "edit_save": self.edit_save,
            "prologue": self.prologue,
            "invariants": self.invariants,
        }
        return {name: graph for name, graph in named.items() if graph is not None}

    def graph(self, name: str) -> fx.GraphModule:
        """See ``Program.graph``; also one of those of ``stabilisation``."""
        if self.stabilisation is not None and name in StabilisedGraphs.__dataclass_fields__:
            made: fx.GraphModule = getattr(self.stabilisation.graphs, name)
            return made
        return super().graph(name)
