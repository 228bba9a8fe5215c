"""Run the passes in their one literal order; time each, dump graphs, honour disabled passes."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import fx

import fisedit_compile.operators  # noqa: F401  (registers the operators the passes name)
from fisedit_compile.errors import OptionError
from fisedit_compile.options import Options
from fisedit_compile.passes.caching.hoist_invariants import hoist_invariants
from fisedit_compile.passes.caching.hoist_parameters import hoist_parameters
from fisedit_compile.passes.caching.insert_cache_ops import insert_cache_ops
from fisedit_compile.passes.caching.lift_cache_io import lift_edit, lift_invariants, lift_stores
from fisedit_compile.passes.caching.verify import verify
from fisedit_compile.passes.common.deferred import copy_graph
from fisedit_compile.passes.common.family import Family, rewrite_nodes
from fisedit_compile.passes.common.ir import eliminate_dead_code, shape_of, spatial_of
from fisedit_compile.passes.common.program import InputInfo, Program
from fisedit_compile.passes.common.report import Report
from fisedit_compile.passes.domains.collapse import Opaque, collapse
from fisedit_compile.passes.domains.propagate_domains import propagate_domains
from fisedit_compile.passes.domains.tokens import declare_tokens
from fisedit_compile.passes.normalise.canonicalize import canonicalize
from fisedit_compile.passes.normalise.expand_layers import expand_layers
from fisedit_compile.passes.normalise.join_slices import join_slices
from fisedit_compile.passes.normalise.normalise_attention import normalise_attention
from fisedit_compile.passes.normalise.split_joined import split_joined
from fisedit_compile.passes.normalise.undo_merges import undo_merges
from fisedit_compile.passes.normalise.unfold_windows import unfold_windows
from fisedit_compile.passes.processor.choose_convolution import choose_convolution
from fisedit_compile.passes.processor.convolve_maps import convolve_maps
from fisedit_compile.passes.processor.fold_attention import fold_attention
from fisedit_compile.passes.processor.multiply_maps import multiply_maps
from fisedit_compile.passes.processor.pack_weights import pack_weights
from fisedit_compile.passes.sparsify import norm as norms
from fisedit_compile.passes.sparsify.attention import FAMILY as ATTENTION
from fisedit_compile.passes.sparsify.complex import FAMILY as COMPLEX
from fisedit_compile.passes.sparsify.convolution import FAMILY as CONVOLUTION
from fisedit_compile.passes.sparsify.count_macs import count_macs
from fisedit_compile.passes.sparsify.densify import densify
from fisedit_compile.passes.sparsify.layout import FAMILY as LAYOUT
from fisedit_compile.passes.sparsify.linear import FAMILY as LINEAR
from fisedit_compile.passes.sparsify.lower_conversions import lower_conversions
from fisedit_compile.passes.sparsify.pointwise import FAMILY as POINTWISE
from fisedit_compile.passes.sparsify.resample import FAMILY as RESAMPLE
from fisedit_compile.runtime.spec import Domain, Stencil

logger = logging.getLogger(__name__)

#: Passes that may be left out: what they would have rewritten stays dense.
OPTIONAL = ("expand_layers", "join_slices", "normalise_attention", "undo_merges", "unfold_windows", "sparsify_conv",
            "sparsify_norm", "sparsify_attention", "sparsify_linear", "sparsify_layout", "sparsify_complex",
            "sparsify_pointwise", "resample", "hoist_invariants", "choose_convolution", "convolve_maps",
            "multiply_maps", "pack_weights")  # fmt: skip


def families(options: Options) -> tuple[Family, ...]:
    """The families of operators in the order in which they are rewritten."""
    norm = norms.family(options.norm == "cached")
    return (CONVOLUTION, norm, ATTENTION, LINEAR, LAYOUT, COMPLEX, POINTWISE, RESAMPLE)


def disabled_passes(options: Options) -> frozenset[str]:
    """Passes that the options or the environment variable ``FISEDIT_DISABLE_PASSES`` leave out.

    Raises:
        OptionError: a pass that cannot be disabled is named.
    """
    named = os.environ.get("FISEDIT_DISABLE_PASSES", "")
    disabled = options.disabled_passes | {name.strip() for name in named.split(",") if name.strip()}
    unknown = sorted(disabled - set(OPTIONAL))
    if unknown:
        raise OptionError(f"cannot disable {', '.join(unknown)}; passes that can be disabled are {', '.join(OPTIONAL)}")
    return disabled


class _Runner:
    """Times one pass after the other and dumps the graph behind each."""

    def __init__(self, options: Options, report: Report) -> None:
        self.disabled = disabled_passes(options)
        self.report = report
        self.number = 0

    def run(self, name: str, graph_module: fx.GraphModule, work: Callable[[], object]) -> None:
        if name in self.disabled:
            logger.info("pass %s is disabled", name)
            return
        started = time.perf_counter()
        work()
        self.report.seconds[name] = self.report.seconds.get(name, 0.0) + time.perf_counter() - started
        logger.debug("pass %s: %d matches", name, self.report.matches[name])
        self.dump(name, graph_module)

    def dump(self, name: str, graph_module: fx.GraphModule) -> None:
        folder = os.environ.get("FISEDIT_DUMP_DIR")
        if folder:
            path = Path(folder) / f"graph_{id(self.report):x}"
            path.mkdir(parents=True, exist_ok=True)
            (path / f"{self.number:02d}_{name}.txt").write_text(str(graph_module.graph))
        self.number += 1


def build_program(
    graph_module: fx.GraphModule, inputs: Sequence[InputInfo], options: Options, opaque: Opaque | None = None
) -> Program:
    """Compile a traced graph.

    Args:
        graph_module: functional pre-dispatch ATen graph; its output is a tuple, tensor nodes carry ``meta["val"]``.
        inputs: what each placeholder is.
        options: of the backend.
        opaque: runs in place of the graph, which then only tells which inputs and outputs are maps.

    Raises:
        GraphError: a pass broke an invariant.
        OptionError: a pass that cannot be disabled is named, or option ``tokens`` does not fit an input.
    """
    report = Report()
    runner = _Runner(options, report)
    kinds = families(options)
    edit = graph_module
    inputs = declare_tokens(edit.graph, inputs, options.tokens)
    runner.dump("traced", edit)
    runner.run("canonicalize", edit, lambda: canonicalize(edit, report))
    runner.run("expand_layers", edit, lambda: expand_layers(edit, report))
    runner.run("join_slices", edit, lambda: join_slices(edit, report))
    runner.run("normalise_attention", edit, lambda: normalise_attention(edit, report))
    runner.run("undo_merges", edit, lambda: undo_merges(edit, report))
    runner.run("unfold_windows", edit, lambda: unfold_windows(edit, inputs, report))
    runner.run("split_joined", edit, lambda: split_joined(edit, report))
    runner.run("propagate_domains", edit, lambda: propagate_domains(edit, inputs, kinds, report))
    if opaque is not None:
        runner.run("collapse", edit, lambda: collapse(edit, opaque, report))
    record = copy_graph(edit)
    spatial = [node for node in edit.graph.nodes if node.op == "placeholder" and spatial_of(node)]
    for family in kinds:
        runner.run(family.name, edit, lambda family=family: rewrite_nodes(family, edit.graph, report))  # type: ignore[misc]
    runner.run("densify", edit, lambda: densify(edit, report))
    report.mac_counts = list(count_macs(record.graph, edit.graph))
    runner.run("fold_attention", record, lambda: fold_attention(record, report))
    runner.run("lower_conversions", edit, lambda: lower_conversions(edit, report))
    eliminate_dead_code(edit.graph)
    runner.run("insert_cache_ops", edit, lambda: insert_cache_ops(edit, record, report))
    runner.run("hoist_invariants", edit, lambda: hoist_invariants(edit, record, inputs, report))
    way, limit, measured = options.convolution, options.packing, not options.pack_all
    if options.lowering == "plain" and way != "rows":
        runner.run("choose_convolution", edit, lambda: choose_convolution(edit, inputs, report, way, limit, measured))
    if options.lowering == "plain" and limit != 0:
        runner.run("pack_weights", edit, lambda: pack_weights(edit, inputs, report, limit, measured))
    prologue: list[fx.GraphModule | None] = []
    runner.run("hoist_parameters", edit, lambda: prologue.append(hoist_parameters(edit, inputs, report)[1]))
    dense_inputs: list[int] = []
    runner.run("convolve_maps", record, lambda: dense_inputs.extend(convolve_maps(edit, record, report, way)[1]))
    if spatial:
        runner.run("multiply_maps", record, lambda: dense_inputs.extend(multiply_maps(edit, record, report)[1]))
    started = time.perf_counter()
    lifted, saving, edit_inputs = lift_edit(edit, report.sites, report)
    invariants, invariant_inputs = lift_invariants(edit)
    lift_stores(record, report.sites, report)
    report.seconds["lift_cache_io"] = time.perf_counter() - started
    runner.dump("lift_cache_io_record", record)
    runner.dump("lift_cache_io_edit", lifted)
    needed = [source.reference for source in edit_inputs if source.kind == "plan"]
    output = next(iter(reversed(record.graph.nodes)))
    output_count = len(output.args[0]) - len(report.sites)
    program = Program(
        record=record,
        edit=lifted if spatial else None,
        edit_save=saving if spatial else None,
        prologue=prologue[0],
        invariants=invariants,
        invariant_inputs=invariant_inputs,
        edit_inputs=edit_inputs,
        sites=report.sites,
        domains=tuple(sorted({item.of for item in needed if isinstance(item.of, Domain)})),  # type: ignore[union-attr]
        stencils=tuple(dict.fromkeys(item.of for item in needed if isinstance(item.of, Stencil))),  # type: ignore[union-attr]
        mask_domain=max((spatial_of(node).domain for node in spatial), key=lambda d: d.size, default=None),  # type: ignore[union-attr]
        batch=shape_of(spatial[0])[0] if spatial else None,
        report=report,
        parameter_positions=tuple(i for i, info in enumerate(inputs) if info.kind == "parameter"),
        scalar_positions=tuple(i for i, info in enumerate(inputs) if info.kind == "scalar"),
        output_count=output_count,
        # Recorded statistics stay those of the recording whatever the mask; a way that was asked for is taken.
        dense_when_full=options.norm == "exact" and options.convolution == "auto",
        dense=copy_graph(record, "Dense", output_count) if dense_inputs else None,
        dense_inputs=tuple(dense_inputs),
    )
    return verify(program)
