"""What passes work on: the graphs of one compilation, what they are made for, and what one pass hands on to others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import fx

from fisedit_compile.errors import GraphError
from fisedit_compile.options import Options
from fisedit_compile.passes.common.family import Family
from fisedit_compile.passes.common.ir import spatial_of
from fisedit_compile.passes.common.opaque import Opaque
from fisedit_compile.passes.common.program import GraphInput, InputInfo, Program, Stabilisation
from fisedit_compile.passes.common.report import Report
from fisedit_compile.runtime.spec import Site

GraphName = Literal["edit", "record", "edit_save", "prologue", "invariants"]


@dataclass
class Compilation:
    """One graph on its way to a program. A pass changes it in place and returns nothing.

    Given:

    Attributes:
        edit: the traced graph, functional pre-dispatch ATen whose output is a tuple and whose tensor nodes carry
            ``meta["val"]``. Passes turn it into the edit graph.
        inputs: what each placeholder of the traced graph is.
        options: of the backend.
        opaque: runs in place of the graph, which then only tells which inputs and outputs are maps.
        families: the families of operators, in the order in which they infer.
        report: what the passes did and did not do.

    Made by passes:

    Attributes:
        record: the dense graph and what it stores; made by ``copy_record``.
        sites: what the record graph stores, in the order of its stores; made by ``insert_cache_ops``, and
            ``hoist_invariants`` adds some.
        prologue: computes what depends on parameters only; made by ``hoist_parameters``, None when nothing does.
        dense_inputs: which outputs of the prologue the record graph takes as inputs behind those of the traced graph;
            made by ``convolve_maps`` and ``multiply_maps``.
        edit_save: the edit graph that also returns an update for each site; made by ``lift_cache_io``, as is what
            follows.
        edit_inputs: what the edit graphs read, in the order of their placeholders.
        invariants: computes what depends on parameters and on inputs such as the prompt only; None when nothing does.
        invariant_inputs: what it reads.
        stabilisation: graphs of dense calls with recorded attention to words; made by ``stabilise``, None without such
            attention.
        program: the result; made by ``make_program``.
    """

    edit: fx.GraphModule
    inputs: tuple[InputInfo, ...] = ()
    options: Options = field(default_factory=Options)
    opaque: Opaque | None = None
    families: tuple[Family, ...] = ()
    report: Report = field(default_factory=Report)
    record: fx.GraphModule | None = None
    sites: tuple[Site, ...] = ()
    prologue: fx.GraphModule | None = None
    dense_inputs: tuple[int, ...] = ()
    edit_save: fx.GraphModule | None = None
    edit_inputs: tuple[GraphInput, ...] = ()
    invariants: fx.GraphModule | None = None
    invariant_inputs: tuple[GraphInput, ...] = ()
    stabilisation: Stabilisation | None = None
    program: Program | None = None

    def module(self, name: GraphName) -> fx.GraphModule:
        """One of the graphs.

        Raises:
            GraphError: no pass has made it.
        """
        found: fx.GraphModule | None = getattr(self, name)
        if found is None:
            raise GraphError(f"the graph {name} is needed, but no pass has made it; check the order of the passes")
        return found

    @property
    def spatial_inputs(self) -> list[fx.Node]:
        """The placeholders of the record graph that are maps."""
        nodes = self.module("record").graph.nodes
        return [node for node in nodes if node.op == "placeholder" and spatial_of(node) is not None]
