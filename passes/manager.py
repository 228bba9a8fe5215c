"""The order of the passes, as one list; runs it, times each pass, dumps graphs, honours disabled passes."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import fx

import fisedit_compile.operators  # noqa: F401  (registers the operators the passes name)
from fisedit_compile.errors import GraphError, OptionError
from fisedit_compile.options import Options
from fisedit_compile.passes.caching.hoist_invariants import hoist_invariants
from fisedit_compile.passes.caching.hoist_parameters import hoist_parameters
from fisedit_compile.passes.caching.insert_cache_ops import insert_cache_ops
from fisedit_compile.passes.caching.lift_cache_io import lift_cache_io
from fisedit_compile.passes.caching.make_program import make_program
from fisedit_compile.passes.caching.stabilise import stabilise
from fisedit_compile.passes.caching.verify import verify
from fisedit_compile.passes.common.compilation import Compilation, GraphName
from fisedit_compile.passes.common.family import Family
from fisedit_compile.passes.common.opaque import Opaque
from fisedit_compile.passes.common.program import InputInfo, Program
from fisedit_compile.passes.domains.collapse import collapse
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
from fisedit_compile.passes.sparsify.attention import FAMILY as ATTENTION
from fisedit_compile.passes.sparsify.attention import sparsify_attention
from fisedit_compile.passes.sparsify.complex import FAMILY as COMPLEX
from fisedit_compile.passes.sparsify.complex import sparsify_complex
from fisedit_compile.passes.sparsify.convolution import FAMILY as CONVOLUTION
from fisedit_compile.passes.sparsify.convolution import sparsify_conv
from fisedit_compile.passes.sparsify.copy_record import copy_record
from fisedit_compile.passes.sparsify.count_macs import count_macs
from fisedit_compile.passes.sparsify.densify import densify
from fisedit_compile.passes.sparsify.layout import FAMILY as LAYOUT
from fisedit_compile.passes.sparsify.layout import sparsify_layout
from fisedit_compile.passes.sparsify.linear import FAMILY as LINEAR
from fisedit_compile.passes.sparsify.linear import sparsify_linear
from fisedit_compile.passes.sparsify.lower_conversions import lower_conversions
from fisedit_compile.passes.sparsify.norm import family as norm_family
from fisedit_compile.passes.sparsify.norm import sparsify_norm
from fisedit_compile.passes.sparsify.pointwise import FAMILY as POINTWISE
from fisedit_compile.passes.sparsify.pointwise import sparsify_pointwise
from fisedit_compile.passes.sparsify.resample import FAMILY as RESAMPLE
from fisedit_compile.passes.sparsify.resample import resample

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Condition:
    """When a pass runs.

    Attributes:
        text: completes "only ...".
        holds: asked in front of the pass.
    """

    text: str
    holds: Callable[[Compilation], bool]


OPAQUE = Condition("for graphs that run as a whole", lambda compilation: compilation.opaque is not None)
PLAIN = Condition("with plain lowering", lambda compilation: compilation.options.lowering == "plain")
NOT_BY_ROWS = Condition(
    "unless the option convolution is rows", lambda compilation: compilation.options.convolution != "rows"
)
MAY_PACK = Condition("unless the option packing is 0", lambda compilation: compilation.options.packing != 0)
EDITABLE = Condition("where an input is spatial", lambda compilation: bool(compilation.spatial_inputs))


@dataclass(frozen=True)
class Pass:
    """One entry of the list.

    Attributes:
        name: of the function, for reports, dumps and the option ``disable_passes``.
        run: changes a compilation in place.
        works_on: the graphs that it changes, which are dumped behind it.
        optional: whether it may be left out: what it would have rewritten stays dense.
        only: when it runs; all of them must hold.
    """

    name: str
    run: Callable[[Compilation], None]
    works_on: tuple[GraphName, ...]
    optional: bool = False
    only: tuple[Condition, ...] = ()

    @property
    def stage(self) -> str:
        """The folder of its file: where it stands in the order of imports."""
        return self.run.__module__.split(".")[-2]

    @property
    def file(self) -> str:
        """Its file, from ``passes/`` on."""
        return f"{'/'.join(self.run.__module__.split('.')[-2:])}.py"


#: All passes in the order in which they run.
PASSES = (
    Pass("declare_tokens", declare_tokens, works_on=()),
    Pass("canonicalize", canonicalize, works_on=("edit",)),
    Pass("expand_layers", expand_layers, works_on=("edit",), optional=True),
    Pass("join_slices", join_slices, works_on=("edit",), optional=True),
    Pass("normalise_attention", normalise_attention, works_on=("edit",), optional=True),
    Pass("undo_merges", undo_merges, works_on=("edit",), optional=True),
    Pass("unfold_windows", unfold_windows, works_on=("edit",), optional=True),
    Pass("split_joined", split_joined, works_on=("edit",)),
    Pass("propagate_domains", propagate_domains, works_on=("edit",)),
    Pass("collapse", collapse, works_on=("edit",), only=(OPAQUE,)),
    Pass("copy_record", copy_record, works_on=("record",)),
    Pass("sparsify_conv", sparsify_conv, works_on=("edit",), optional=True),
    Pass("sparsify_norm", sparsify_norm, works_on=("edit",), optional=True),
    Pass("sparsify_attention", sparsify_attention, works_on=("edit",), optional=True),
    Pass("sparsify_linear", sparsify_linear, works_on=("edit",), optional=True),
    Pass("sparsify_layout", sparsify_layout, works_on=("edit",), optional=True),
    Pass("sparsify_complex", sparsify_complex, works_on=("edit",), optional=True),
    Pass("sparsify_pointwise", sparsify_pointwise, works_on=("edit",), optional=True),
    Pass("resample", resample, works_on=("edit",), optional=True),
    Pass("densify", densify, works_on=("edit",)),
    Pass("count_macs", count_macs, works_on=()),
    Pass("fold_attention", fold_attention, works_on=("record",)),
    Pass("lower_conversions", lower_conversions, works_on=("edit",)),
    Pass("insert_cache_ops", insert_cache_ops, works_on=("record", "edit")),
    Pass("hoist_invariants", hoist_invariants, works_on=("record", "edit"), optional=True),
    Pass("choose_convolution", choose_convolution, works_on=("edit",), optional=True, only=(PLAIN, NOT_BY_ROWS)),
    Pass("pack_weights", pack_weights, works_on=("edit",), optional=True, only=(PLAIN, MAY_PACK)),
    Pass("hoist_parameters", hoist_parameters, works_on=("edit",)),
    Pass("convolve_maps", convolve_maps, works_on=("record",), optional=True),
    Pass("multiply_maps", multiply_maps, works_on=("record",), optional=True, only=(EDITABLE,)),
    Pass("lift_cache_io", lift_cache_io, works_on=("record", "edit")),
    Pass("stabilise", stabilise, works_on=(), only=(EDITABLE,)),
    Pass("make_program", make_program, works_on=()),
    Pass("verify", verify, works_on=()),
)

#: Passes that may be left out.
OPTIONAL = tuple(step.name for step in PASSES if step.optional)


def families(options: Options) -> tuple[Family, ...]:
    """The families of operators in the order in which they infer; each is rewritten by the pass of its name."""
    return (
        CONVOLUTION,
        norm_family(options.norm == "cached"),
        ATTENTION,
        LINEAR,
        LAYOUT,
        COMPLEX,
        POINTWISE,
        RESAMPLE,
    )


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


class _Dumps:
    """Writes graphs to the folder that ``FISEDIT_DUMP_DIR`` names, numbered in the order in which they were made."""

    def __init__(self, compilation: Compilation) -> None:
        folder = os.environ.get("FISEDIT_DUMP_DIR")
        self._folder = Path(folder) / f"graph_{id(compilation.report):x}" if folder else None
        self._number = 0

    def write(self, name: str, graph_module: fx.GraphModule) -> None:
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / f"{self._number:02d}_{name}.txt").write_text(str(graph_module.graph))
        self._number += 1


def run_passes(compilation: Compilation) -> None:
    """Run the list on a compilation, which has its program then."""
    disabled = disabled_passes(compilation.options)
    dumps, report = _Dumps(compilation), compilation.report
    dumps.write("traced", compilation.edit)
    for step in PASSES:
        if not all(condition.holds(compilation) for condition in step.only):
            continue
        if step.name in disabled:
            logger.info("pass %s is disabled", step.name)
            continue
        started = time.perf_counter()
        step.run(compilation)
        report.seconds[step.name] = time.perf_counter() - started
        logger.debug("pass %s: %d matches", step.name, report.matches[step.name])
        for graph in step.works_on:
            dumps.write(f"{step.name}_{graph}" if len(step.works_on) > 1 else step.name, compilation.module(graph))


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
    compilation = Compilation(graph_module, tuple(inputs), options, opaque, families(options))
    # What passes work out is the host's, wherever the user's code makes its tensors.
    with torch.device("cpu"):
        run_passes(compilation)
    if compilation.program is None:
        raise GraphError("the passes have made no program; make_program is missing in their list")
    return compilation.program
