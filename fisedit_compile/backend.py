"""The backend that ``torch.compile(..., backend="fisedit")`` finds through its entry point."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from fisedit_compile.errors import OptionError
from fisedit_compile.executing.compiled_graph import CompiledGraph
from fisedit_compile.executing.executable import Executable
from fisedit_compile.executing.replay import capturer_for
from fisedit_compile.options import Options, parse_options
from fisedit_compile.passes import Program, build_program, disabled_passes
from fisedit_compile.passes.common.literals import spell_literals
from fisedit_compile.passes.domains.labels import declare_content
from fisedit_compile.private.dynamo import compiling
from fisedit_compile.runtime import PhaseSource, ReachCheck, default_runtime
from fisedit_compile.tracing.calls import on_calls
from fisedit_compile.tracing.description import GraphInputs, UntraceableGraph, break_reason, describe
from fisedit_compile.tracing.identity import (
    Circumstances,
    dense_identity,
    devices_of,
    note_circumstances,
    program_identity,
    traced_hash,
)
from fisedit_compile.tracing.inputs import StaticTensor
from fisedit_compile.tracing.trace import trace

logger = logging.getLogger(__name__)


def fisedit(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> CompiledGraph:
    """Compile one Dynamo graph.

    Args:
        gm: the graph; outside record and edit it runs as it is.
        example_inputs: its flat inputs.
        mode: one of ``options.MODES``.
        options: ``runtime`` (a ``Runtime``; None: ``default_runtime()``), ``norm``, ``lowering``, ``packing``,
            ``convolution``, ``cuda_graphs``, ``tokens``, ``content``, ``disable_passes``.

    Returns:
        What Dynamo calls in place of the graph.

    Raises:
        OptionError: an option is unknown or has an invalid value.
    """
    runtime, parsed = _parse(mode, options, example_inputs)
    on_calls(ReachCheck(runtime))
    spell_literals(gm)
    circumstances = note_circumstances(gm, example_inputs, parsed)
    _warn_of_break(gm, circumstances.label)
    try:
        inputs = describe(gm, example_inputs)
    except UntraceableGraph as error:
        dense = _stay_dense(gm, example_inputs, circumstances, runtime, error)
        return CompiledGraph(gm, runtime, lambda: dense)
    compiled = CompiledGraph(gm, runtime, lambda: _make_executable(gm, inputs, circumstances, runtime, parsed))
    if inputs.numbers:
        # Fixing a number adds a guard, which Dynamo takes only while it compiles.
        _ = compiled.executable
    return compiled


def _parse(
    mode: str | None, options: Mapping[str, Any] | None, example_inputs: Sequence[Any]
) -> tuple[PhaseSource, Options]:
    """The runtime, and the options with what the environment adds to them."""
    runtime, parsed = parse_options(mode, options, devices_of(example_inputs))
    if runtime is None:
        runtime = default_runtime()
    if not isinstance(runtime, PhaseSource):
        raise OptionError(f"option runtime must be a fisedit_compile.Runtime, got a {type(runtime).__name__}")
    return runtime, replace(parsed, disabled_passes=disabled_passes(parsed))


def _make_executable(
    gm: fx.GraphModule, inputs: GraphInputs, circumstances: Circumstances, runtime: PhaseSource, options: Options
) -> Executable:
    """Trace a graph, build its program, and make it callable."""
    try:
        with compiling():
            traced = trace(gm, inputs)
    except UntraceableGraph as error:
        return _stay_dense(gm, inputs, circumstances, runtime, error)
    traced = replace(traced, input_infos=declare_content(traced.input_infos, options.content))
    opaque = traced.opaque
    if opaque is not None:
        logger.info("%s runs as a whole: %s", circumstances.label, opaque.reason)
    digest = traced_hash(gm, inputs, traced, circumstances)
    program = build_program(traced.gm, traced.input_infos, options, opaque)
    _warn_of_lost_positions(circumstances.label, program)
    reason = program.report.dense_reason or (opaque.reason if opaque is not None else None)
    identity = program_identity(digest, program.sites, traced, circumstances, reason)
    if opaque is not None:
        # What surrounds it is little, and it may do what cannot be captured.
        return Executable(gm, program, runtime, identity)
    devices = [value.device for value in inputs.values if isinstance(value, StaticTensor)]
    capturer = capturer_for(devices) if options.cuda_graphs else None
    return Executable(gm, program, runtime, identity, options.lowering, capturer)


def _stay_dense(
    gm: fx.GraphModule,
    inputs: GraphInputs | Sequence[Any],
    circumstances: Circumstances,
    runtime: PhaseSource,
    error: UntraceableGraph,
) -> Executable:
    logger.info("%s stays dense: %s", circumstances.label, error)
    return Executable(gm, None, runtime, dense_identity(gm, inputs, circumstances, error))


def _warn_of_break(gm: fx.GraphModule, label: str) -> None:
    if reason := break_reason(gm):
        logger.warning(
            "%s is not the whole network, PyTorch's compiler broke it off: %s. What runs between graphs is computed "
            "densely and not masked, and masks are applied at the resolution of each graph's inputs: positions outside "
            "the mask may change.",
            label,
            reason,
        )


def _warn_of_lost_positions(label: str, program: Program) -> None:
    lost = program.report.lost
    if lost:
        first = lost[0]
        logger.warning(
            "%s moves positions in a way that is not known, at %d of its operators, the first of which is %s (%s): all "
            "positions behind them are computed, and edits save no time there. Pictures are right. fisedit.explain "
            "lists them.",
            label,
            len(lost),
            first.target,
            first.reason,
        )
