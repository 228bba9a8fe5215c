"""The backend that ``torch.compile(..., backend="fisedit")`` finds through its entry point."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from fisedit_compile import private
from fisedit_compile.errors import OptionError
from fisedit_compile.executing.compiled_graph import CompiledGraph
from fisedit_compile.executing.executable import Executable, GraphIdentity
from fisedit_compile.executing.replay import capturer_for
from fisedit_compile.options import Options, parse_options
from fisedit_compile.passes import InputInfo, Program, build_program, disabled_passes
from fisedit_compile.passes.common.literals import spell_literals
from fisedit_compile.passes.domains.labels import declare_content
from fisedit_compile.passes.normalise.canonicalize import idle_source
from fisedit_compile.runtime import PhaseSource, ReachCheck, default_runtime
from fisedit_compile.tracing.description import (
    GraphInputs,
    UntraceableGraph,
    break_before,
    break_reason,
    describe,
    describe_inputs,
    fixed_sizes,
    placeholders,
)
from fisedit_compile.tracing.dynamo import on_calls
from fisedit_compile.tracing.inputs import StaticTensor
from fisedit_compile.tracing.trace import trace

logger = logging.getLogger(__name__)


def _describe(value: object) -> str:
    """A value of the graph in words that are equal in every process."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype} {value.device.type}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_describe, value))}]"
    # A dynamic number is told by its type: its symbol's name may differ from one trace to the next.
    return type(value).__name__


def structural_hash(
    graph_module: fx.GraphModule,
    infos: Sequence[InputInfo],
    extra: str = "",
    fixed: Mapping[fx.Node, Any] | None = None,
) -> str:
    """A hash of a traced graph: its operators, how they are connected, shapes, dtypes and constants.

    Names of nodes, inputs that tracing made constant and operators that do nothing but copy do not count: the same
    network gets the same hash whether or not Dynamo made its sizes dynamic, and however its inputs lie in memory.
    ``extra`` is hashed as well. ``fixed``: nodes that stand for constants, where tracing has not replaced them.
    """
    digest = hashlib.sha256(extra.encode())
    numbers: dict[fx.Node, str] = {}
    inputs, counted = iter(infos), itertools.count()
    constants = fixed or {}

    def lookup(node: fx.Node) -> Any:
        return constants[node] if node in constants else _Reference(numbers[node])

    for node in graph_module.graph.nodes:
        value = node.meta.get("val")
        info = next(inputs) if node.op == "placeholder" else None
        if node in constants:
            continue
        if info is not None:
            if "val" in node.meta and isinstance(value, (bool, int, float, type(None))):
                continue
            text = f"input {info.kind}"
        elif node.op == "get_attr":
            text = f"constant {_content(getattr(graph_module, str(node.target)))}"
        elif isinstance(source := idle_source(node), fx.Node):
            numbers[node] = numbers[source]
            continue
        else:
            arguments = fx.map_arg((node.args, node.kwargs), lookup)
            text = f"{node.op} {_target_name(node.target)} {arguments}"
        numbers[node] = f"%{next(counted)}"
        digest.update(f"{text} -> {_describe(value)}\n".encode())
    return digest.hexdigest()


def _target_name(target: Any) -> str:
    """A function's name without its address; whatever else as text."""
    if isinstance(target, (str, private.OpOverload)) or not hasattr(target, "__qualname__"):
        return str(target)
    return f"{target.__module__}.{target.__qualname__}"


class _Reference:
    """Stands for a node in hashed text."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


def _content(constant: Any) -> str:
    if isinstance(constant, fx.GraphModule):
        # A branch or a body of a higher-order operator.
        return structural_hash(constant, [InputInfo("user", node.name) for node in placeholders(constant.graph)])
    if not isinstance(constant, Tensor):
        return type(constant).__name__
    flat = constant.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{_describe(constant)} {hashlib.sha256(flat.numpy().tobytes()).hexdigest()}"


def _label(infos: Sequence[InputInfo], example_inputs: Sequence[Any]) -> str:
    """A graph in words: its user inputs, and the precision when it is not theirs."""
    parts = [
        f"{info.name} {'x'.join(str(int(size)) for size in value.shape)} {str(value.dtype).removeprefix('torch.')}"
        for info, value in zip(infos, example_inputs, strict=True)
        if info.kind == "user" and isinstance(value, Tensor)
    ]
    parts.extend(f"autocast {name}" for name in _autocast(example_inputs))
    return f"the graph of {', '.join(parts)}" if parts else "the graph without tensor inputs"


def _devices(example_inputs: Sequence[Any]) -> list[str]:
    """The types of device that tensors are on."""
    return sorted({value.device.type for value in example_inputs if isinstance(value, Tensor)})


def _autocast(example_inputs: Sequence[Any]) -> list[str]:
    """Where autocast is on, and to what."""
    devices = _devices(example_inputs)
    return [
        f"{device} {str(torch.get_autocast_dtype(device)).removeprefix('torch.')}"
        for device in devices
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    ]


def _surroundings(example_inputs: Sequence[Any], options: Options) -> str:
    """What a program depends on besides its graph."""
    return (
        f"norm={options.norm} packing={options.packing} {options.pack_all} convolution={options.convolution} "
        f"disabled={sorted(options.disabled_passes)} tokens={options.tokens} "
        f"content={options.content} autocast={_autocast(example_inputs)}"
    )


def _build(
    gm: fx.GraphModule,
    inputs: GraphInputs,
    runtime: PhaseSource,
    identity: GraphIdentity,
    surroundings: str,
    options: Options,
) -> Executable:
    """Trace a graph and make its program.

    Args:
        gm: as Dynamo made it.
        inputs: what was noted of it then.
        runtime: whose recordings will be made.
        identity: what is known of the graph before it is traced.
        surroundings: what its program depends on besides.
        options: of the backend.
    """
    label = identity.label
    try:
        with private.compiling():
            traced = trace(gm, inputs)
    except UntraceableGraph as error:
        return _stays_dense(gm, runtime, identity, f"{surroundings} {_given(inputs.values)}", error)
    opaque, infos = traced.opaque, declare_content(traced.input_infos, options.content)
    # Hashed before the passes, which work on this very graph.
    if opaque is None:
        digest = structural_hash(traced.gm, infos, surroundings)
    else:
        logger.info("%s runs as a whole: %s", label, opaque.reason)
        digest = structural_hash(gm, infos, f"{surroundings} {_given(inputs.values)}", fixed_sizes(gm))
    program: Program = build_program(traced.gm, infos, options, opaque)
    _warn_of_lost_positions(label, program)
    digest = hashlib.sha256(f"{digest} {program.sites}".encode()).hexdigest()
    reason = program.report.dense_reason or (opaque.reason if opaque is not None else None)
    identity = replace(
        identity,
        graph_hash=digest,
        input_infos=infos,
        numbers=traced.numbers,
        constants=traced.constants,
        dense_reason=reason,
        steady=traced.steady,
    )
    if opaque is not None:
        # What surrounds it is little, and it may do what cannot be captured.
        return Executable(gm, program, runtime, identity)
    devices = [value.device for value in inputs.values if isinstance(value, StaticTensor)]
    capturer = capturer_for(devices) if options.cuda_graphs else None
    return Executable(gm, program, runtime, identity, options.lowering, capturer)


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


def _given(values: Sequence[Any]) -> list[str]:
    """The forms of the inputs of a graph in words. Strides are none of them, and sizes are those of tensors: which
    inputs stand for sizes, and what strides are, differs where PyTorch's compiler made several graphs of a network."""
    tensors = (value for value in values if isinstance(value, StaticTensor))
    return [f"{value.shape} {value.dtype} {value.device.type}" for value in tensors]


def _stays_dense(
    gm: fx.GraphModule, runtime: PhaseSource, identity: GraphIdentity, surroundings: str, error: UntraceableGraph
) -> Executable:
    logger.info("%s stays dense: %s", identity.label, error)
    digest = structural_hash(gm, identity.input_infos, surroundings, fixed_sizes(gm))
    return Executable(gm, None, runtime, replace(identity, graph_hash=digest, dense_reason=str(error)))


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
        mode: one of ``config.MODES``.
        options: ``runtime`` (a ``Runtime``; None: ``default_runtime()``), ``norm``, ``lowering``, ``packing``,
            ``convolution``, ``cuda_graphs``, ``tokens``, ``content``, ``disable_passes``.

    Returns:
        What Dynamo calls in place of the graph.

    Raises:
        OptionError: an option is unknown or has an invalid value.
    """
    runtime, parsed = parse_options(mode, options, _devices(example_inputs))
    if runtime is None:
        runtime = default_runtime()
    if not isinstance(runtime, PhaseSource):
        raise OptionError(f"option runtime must be a fisedit_compile.Runtime, got a {type(runtime).__name__}")
    on_calls(ReachCheck(runtime))
    parsed = replace(parsed, disabled_passes=disabled_passes(parsed))
    spell_literals(gm)
    surroundings = _surroundings(example_inputs, parsed)
    infos = declare_content(describe_inputs(gm, example_inputs), parsed.content)
    label = _label(infos, example_inputs)
    identity = GraphIdentity("", label, infos, resumed=break_before(), fills=private.changes_what_is_kept())
    if reason := break_reason(gm):
        logger.warning(
            "%s is not the whole network, PyTorch's compiler broke it off: %s. What runs between graphs is computed "
            "densely and not masked, and masks are applied at the resolution of each graph's inputs: positions outside "
            "the mask may change.",
            label,
            reason,
        )
    try:
        inputs = describe(gm, example_inputs)
    except UntraceableGraph as error:
        dense = _stays_dense(gm, runtime, identity, surroundings + _shapes(example_inputs), error)
        return CompiledGraph(gm, runtime, lambda: dense)
    compiled = CompiledGraph(gm, runtime, lambda: _build(gm, inputs, runtime, identity, surroundings, parsed))
    if inputs.numbers:
        # Fixing a number adds a guard, which Dynamo takes only while it compiles.
        _ = compiled.executable
    return compiled


def _shapes(example_inputs: Sequence[Any]) -> str:
    return str([tuple(int(size) for size in value.shape) for value in example_inputs if isinstance(value, Tensor)])
