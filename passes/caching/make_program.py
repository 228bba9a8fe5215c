"""Put together what the passes made to the program that the executable runs.

Why: what passes hand on to each other is more than what runs, and what runs needs some facts in one place: which plans
the mask is made into, at which resolution the mask is read, which inputs are parameters or scalars.

Before: lifted graphs, sites and inputs
After:  a ``SparseProgram`` or a ``DenseProgram``

Conditions:
1. A graph without spatial inputs is recorded, and never edited: its program is a dense one.
2. A sparse program has a dense graph where the record graph was rewritten to read what the prologue computes: recorded
   calls and dense ones then compute alike.
"""

from __future__ import annotations

from typing import Any

from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.deferred import copy_graph
from fisedit_compile.passes.common.ir import shape_of, spatial_of
from fisedit_compile.passes.common.program import DenseProgram, SparseProgram
from fisedit_compile.runtime.spec import Domain, PlanInput, Stencil


def make_program(compilation: Compilation) -> None:
    """Run the pass: makes ``compilation.program``."""
    record, options, inputs = compilation.module("record"), compilation.options, compilation.inputs
    output = next(iter(reversed(record.graph.nodes)))
    output_count = len(output.args[0]) - len(compilation.sites)
    compilation.report.sites = compilation.sites
    common: dict[str, Any] = {
        "record": record,
        "sites": compilation.sites,
        "output_count": output_count,
        "report": compilation.report,
        "parameter_positions": tuple(number for number, info in enumerate(inputs) if info.kind == "parameter"),
        "scalar_positions": tuple(number for number, info in enumerate(inputs) if info.kind == "scalar"),
    }
    layouts = {node: layout for node in compilation.spatial_inputs if (layout := spatial_of(node)) is not None}
    if not layouts:
        compilation.program = DenseProgram(**common)
        return
    references = (source.reference for source in compilation.edit_inputs if source.kind == "plan")
    planned = [reference.of for reference in references if isinstance(reference, PlanInput)]
    compilation.program = SparseProgram(
        **common,
        edit=compilation.edit,
        edit_save=compilation.module("edit_save"),
        edit_inputs=compilation.edit_inputs,
        domains=tuple(sorted({of for of in planned if isinstance(of, Domain)})),
        stencils=tuple(dict.fromkeys(of for of in planned if isinstance(of, Stencil))),
        mask_domain=max((layout.domain for layout in layouts.values()), key=lambda domain: domain.size),
        batch=shape_of(next(iter(layouts)))[0],
        prologue=compilation.prologue,
        invariants=compilation.invariants,
        invariant_inputs=compilation.invariant_inputs,
        dense=copy_graph(record, "Dense", output_count) if compilation.dense_inputs else None,
        dense_inputs=compilation.dense_inputs,
        # Recorded statistics stay those of the recording whatever the mask; a way that was asked for is taken.
        stabilisation=compilation.stabilisation,
        dense_when_full=options.norm == "exact" and options.convolution == "auto",
    )
