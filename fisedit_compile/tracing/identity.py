"""What tells one compiled graph from another: hashes that are equal in every process, and labels for people."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fisedit_compile.options import Options
from fisedit_compile.passes.common.meta import VALUE
from fisedit_compile.passes.common.program import InputInfo, InputKind
from fisedit_compile.passes.domains.labels import declare_content
from fisedit_compile.passes.normalise.canonicalize import idle_source
from fisedit_compile.private.dynamo import changes_what_is_kept
from fisedit_compile.private.graphs import OpOverload
from fisedit_compile.runtime.spec import Site
from fisedit_compile.tracing.description import (
    GraphInputs,
    UntraceableGraph,
    break_before,
    describe_inputs,
    fixed_sizes,
    placeholders,
)
from fisedit_compile.tracing.inputs import StaticTensor
from fisedit_compile.tracing.trace import TracedGraph


@dataclass(frozen=True)
class GraphIdentity:
    """What a compiled graph is, apart from its code.

    Attributes:
        graph_hash: equal for graphs of equal structure, shapes and options.
        label: the graph in words, for messages.
        input_infos: one for each flat input.
        numbers: positions of inputs that are Python numbers in the user's call.
        constants: positions of inputs that tracing has fixed; they are guarded on and need no comparison.
        dense_reason: why it runs densely as a whole; None when it does not.
        steady: positions of those Python numbers that must not change from call to call.
        resumed: the line in which PyTorch's compiler broke off the graph before this one; None when it is the first.
        fills: whether a call changes what the network keeps, so that the next one may be another graph.
    """

    graph_hash: str
    label: str
    input_infos: tuple[InputInfo, ...]
    numbers: tuple[int, ...] = ()
    constants: frozenset[int] = frozenset()
    dense_reason: str | None = None
    steady: tuple[int, ...] = ()
    resumed: str | None = None
    fills: bool = False

    def positions(self, *kinds: InputKind) -> tuple[int, ...]:
        """Positions of the inputs of these kinds."""
        return tuple(at for at, info in enumerate(self.input_infos) if info.kind in kinds)


@dataclass(frozen=True)
class Circumstances:
    """What is noted of a graph while Dynamo compiles it, besides the graph.

    Attributes:
        infos: one for each flat input of Dynamo's graph.
        label: the graph in words, for messages.
        text: what a program depends on besides its graph; a part of its hash.
        resumed, fills: as in ``GraphIdentity``.
    """

    infos: tuple[InputInfo, ...]
    label: str
    text: str
    resumed: str | None
    fills: bool


def note_circumstances(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Circumstances:
    """To be called while Dynamo compiles ``gm``."""
    infos = declare_content(describe_inputs(gm, example_inputs), options.content)
    return Circumstances(
        infos,
        _label(infos, example_inputs),
        _surroundings(example_inputs, options),
        break_before(),
        changes_what_is_kept(),
    )


def dense_identity(
    gm: fx.GraphModule, inputs: GraphInputs | Sequence[Any], circumstances: Circumstances, error: UntraceableGraph
) -> GraphIdentity:
    """That of a graph that stays dense.

    Args:
        gm: Dynamo's graph.
        inputs: what is known of its inputs: their description, or the example inputs where they cannot be described.
        circumstances: noted while Dynamo compiled it.
        error: says why it stays dense.
    """
    forms = f" {_forms(inputs.values)}" if isinstance(inputs, GraphInputs) else _sizes(inputs)
    digest = structural_hash(gm, circumstances.infos, circumstances.text + forms, fixed_sizes(gm))
    return GraphIdentity(
        digest,
        circumstances.label,
        circumstances.infos,
        dense_reason=str(error),
        resumed=circumstances.resumed,
        fills=circumstances.fills,
    )


def traced_hash(gm: fx.GraphModule, inputs: GraphInputs, traced: TracedGraph, circumstances: Circumstances) -> str:
    """The hash of a traced graph. Passes work on that very graph: to be called in front of them.

    Args:
        gm: Dynamo's graph, which runs in place of an opaque one.
        inputs: the description of its inputs.
        traced: what tracing made of it, with the infos of its inputs as the passes get them.
        circumstances: noted while Dynamo compiled it.
    """
    if traced.opaque is None:
        return structural_hash(traced.gm, traced.input_infos, circumstances.text)
    return structural_hash(gm, traced.input_infos, f"{circumstances.text} {_forms(inputs.values)}", fixed_sizes(gm))


def program_identity(
    digest: str, sites: tuple[Site, ...], traced: TracedGraph, circumstances: Circumstances, dense_reason: str | None
) -> GraphIdentity:
    """That of a graph with a program.

    Args:
        digest: the hash of the traced graph.
        sites: what a recorded call stores: recordings must fit.
        traced: what tracing made of Dynamo's graph.
        circumstances: noted while Dynamo compiled it.
        dense_reason: why it runs densely as a whole, if it does.
    """
    return GraphIdentity(
        hashlib.sha256(f"{digest} {sites}".encode()).hexdigest(),
        circumstances.label,
        traced.input_infos,
        traced.numbers,
        traced.constants,
        dense_reason,
        traced.steady,
        circumstances.resumed,
        circumstances.fills,
    )


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
        value = node.meta.get(VALUE)
        info = next(inputs) if node.op == "placeholder" else None
        if node in constants:
            continue
        if info is not None:
            if VALUE in node.meta and isinstance(value, (bool, int, float, type(None))):
                continue
            text = f"input {info.kind}"
        elif node.op == "get_attr":
            text = f"constant {_content(getattr(graph_module, str(node.target)))}"
        elif isinstance(source := idle_source(node), fx.Node):
            numbers[node] = numbers[source]
            continue
        else:
            arguments = fx.map_arg((node.args, node.kwargs), lookup)
            text = f"{node.op} {target_name(node.target)} {arguments}"
        numbers[node] = f"%{next(counted)}"
        digest.update(f"{text} -> {_in_words(value)}\n".encode())
    return digest.hexdigest()


def target_name(target: Any) -> str:
    """What a node calls: a function's name without its address; whatever else as text."""
    if isinstance(target, (str, OpOverload)) or not hasattr(target, "__qualname__"):
        return str(target)
    return f"{target.__module__}.{target.__qualname__}"


def devices_of(example_inputs: Sequence[Any]) -> list[str]:
    """The types of device that tensors are on."""
    return sorted({value.device.type for value in example_inputs if isinstance(value, Tensor)})


class _Reference:
    """Stands for a node in hashed text."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


def _in_words(value: object) -> str:
    """A value of the graph in words that are equal in every process."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype} {value.device.type}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_in_words, value))}]"
    # A dynamic number is told by its type: its symbol's name may differ from one trace to the next.
    return type(value).__name__


def _content(constant: Any) -> str:
    if isinstance(constant, fx.GraphModule):
        # A branch or a body of a higher-order operator.
        return structural_hash(constant, [InputInfo("user", node.name) for node in placeholders(constant.graph)])
    if not isinstance(constant, Tensor):
        return type(constant).__name__
    flat = constant.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{_in_words(constant)} {hashlib.sha256(flat.numpy().tobytes()).hexdigest()}"


def _label(infos: Sequence[InputInfo], example_inputs: Sequence[Any]) -> str:
    """A graph in words: its user inputs, and the precision when it is not theirs."""
    parts = [
        f"{info.name} {'x'.join(str(int(size)) for size in value.shape)} {str(value.dtype).removeprefix('torch.')}"
        for info, value in zip(infos, example_inputs, strict=True)
        if info.kind == "user" and isinstance(value, Tensor)
    ]
    parts.extend(f"autocast {name}" for name in _autocast(example_inputs))
    return f"the graph of {', '.join(parts)}" if parts else "the graph without tensor inputs"


def _autocast(example_inputs: Sequence[Any]) -> list[str]:
    """Where autocast is on, and to what."""
    return [
        f"{device} {str(torch.get_autocast_dtype(device)).removeprefix('torch.')}"
        for device in devices_of(example_inputs)
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    ]


def _surroundings(example_inputs: Sequence[Any], options: Options) -> str:
    """What a program depends on besides its graph."""
    return (
        f"norm={options.norm} packing={options.packing} {options.pack_all} convolution={options.convolution} "
        f"disabled={sorted(options.disabled_passes)} tokens={options.tokens} "
        f"content={options.content} autocast={_autocast(example_inputs)}"
    )


def _forms(values: Sequence[Any]) -> list[str]:
    """The sizes, dtypes and devices of the inputs of a graph in words. Strides are left out, and sizes are those of
    tensors: which inputs stand for sizes, and what strides are, differs where PyTorch's compiler made several graphs of
    a network."""
    tensors = (value for value in values if isinstance(value, StaticTensor))
    return [f"{value.shape} {value.dtype} {value.device.type}" for value in tensors]


def _sizes(example_inputs: Sequence[Any]) -> str:
    return str([tuple(int(size) for size in value.shape) for value in example_inputs if isinstance(value, Tensor)])
