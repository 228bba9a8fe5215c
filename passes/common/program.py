"""The product of the passes: lifted, functional graphs, and what the runtime must supply to run them."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass
class Program:
    """One compiled graph. See docs/architecture.md for how the graphs relate.

    Attributes:
        record: dense graph; inputs are the flat inputs followed by ``dense_inputs``, outputs are the original outputs
            followed by one tensor for each site.
        edit: graph over rows; inputs as in ``edit_inputs``; outputs are the original outputs.
        edit_save: as ``edit``, followed by one update for each site (rows ``[B, N, *C]``, a value, or None: keep).
        prologue: computes what depends on parameters only (packed weights); inputs are the flat inputs.
        invariants: computes what depends on parameters and on inputs such as the prompt only; None when nothing does.
        invariant_inputs: its inputs, of the kinds ``argument`` and ``hoisted``.
        sites: what a recorded call stores, in order; outputs are sites named ``output:0`` and so on.
        mask_domain: finest resolution of the spatial inputs; None when nothing is spatial.
        dense: the record graph without what it stores; None when nothing was rewritten for dense calls.
        dense_inputs: which outputs of the prologue the record and dense graphs read.
        batch: batch size of all spatial values; None when nothing is spatial.
        dense_when_full: a mask of everything leaves nothing of the recording, so that the dense graph is its edit.
    """

    record: fx.GraphModule
    edit: fx.GraphModule | None
    edit_save: fx.GraphModule | None
    prologue: fx.GraphModule | None
    invariants: fx.GraphModule | None
    invariant_inputs: tuple[GraphInput, ...]
    edit_inputs: tuple[GraphInput, ...]
    sites: tuple[Site, ...]
    domains: tuple[Domain, ...]
    stencils: tuple[Stencil, ...]
    mask_domain: Domain | None
    batch: int | None
    report: Report
    parameter_positions: tuple[int, ...]
    scalar_positions: tuple[int, ...]
    output_count: int
    dense_when_full: bool = False
    dense: fx.GraphModule | None = None
    dense_inputs: tuple[int, ...] = ()
