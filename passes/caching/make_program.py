"""Put together what the passes made to the program that the executable runs.

Why: what passes hand on to each other is more than what runs, and what runs needs some facts in one place: which plans
the mask is made into, at which resolution the mask is read, which inputs are parameters or scalars.

Before: lifted graphs, sites and inputs
After:  a ``Program``

Conditions:
1. A graph without spatial inputs has no edit graphs: it is recorded, and never edited.
2. There is a dense graph where the record graph was rewritten to read what the prologue computes: recorded calls and
   dense ones then compute alike.
"""

from __future__ import annotations

from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.deferred import copy_graph
from fisedit_compile.passes.common.ir import shape_of, spatial_of
from fisedit_compile.passes.common.program import Program
from fisedit_compile.runtime.spec import Domain, PlanInput, Stencil


def make_program(compilation: Compilation) -> None:
    """Run the pass: makes ``compilation.program``."""
    record, options, inputs, sites = (
        compilation.module("record"),
        compilation.options,
        compilation.inputs,
        compilation.sites,
    )
    spatial = compilation.spatial_inputs
    domains = [layout.domain for node in spatial if (layout := spatial_of(node)) is not None]
    references = (source.reference for source in compilation.edit_inputs if source.kind == "plan")
    planned = [reference.of for reference in references if isinstance(reference, PlanInput)]
    output = next(iter(reversed(record.graph.nodes)))
    output_count = len(output.args[0]) - len(sites)
    compilation.report.sites = sites
    compilation.program = Program(
        record=record,
        edit=compilation.edit if spatial else None,
        edit_save=compilation.edit_save if spatial else None,
        prologue=compilation.prologue,
        invariants=compilation.invariants,
        invariant_inputs=compilation.invariant_inputs,
        edit_inputs=compilation.edit_inputs,
        sites=sites,
        domains=tuple(sorted({of for of in planned if isinstance(of, Domain)})),
        stencils=tuple(dict.fromkeys(of for of in planned if isinstance(of, Stencil))),
        mask_domain=max(domains, key=lambda domain: domain.size, default=None),
        batch=shape_of(spatial[0])[0] if spatial else None,
        report=compilation.report,
        parameter_positions=tuple(number for number, info in enumerate(inputs) if info.kind == "parameter"),
        scalar_positions=tuple(number for number, info in enumerate(inputs) if info.kind == "scalar"),
        output_count=output_count,
        # Recorded statistics stay those of the recording whatever the mask; a way that was asked for is taken.
        dense_when_full=options.norm == "exact" and options.convolution == "auto",
        dense=copy_graph(record, "Dense", output_count) if compilation.dense_inputs else None,
        dense_inputs=compilation.dense_inputs,
    )
