"""What a Dynamo graph and its inputs are, read while Dynamo compiles it: afterwards Dynamo forgets most of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fisedit_compile.errors import FisEditError
from fisedit_compile.passes.common.ir import unknown
from fisedit_compile.passes.common.meta import EXAMPLE_VALUE, VALUE
from fisedit_compile.passes.common.program import InputInfo
from fisedit_compile.private import dynamo, graphs
from fisedit_compile.tracing.inputs import DynamicNumber, StaticTensor


class UntraceableGraph(FisEditError):
    """A graph that has to stay dense; the message is the reason that ``explain`` shows."""


@dataclass(frozen=True)
class GraphInputs:
    """What tracing needs to know of a Dynamo graph besides its operators. It holds no tensors.

    Attributes:
        infos: one for each flat input.
        values: what to trace each input as.
        numbers: Python numbers that Dynamo left dynamic, by position. Tracing may have to fix them, to which Dynamo has
            to add guards: graphs with such inputs must be traced while it compiles.
        wrapped: positions of Python numbers that Dynamo passes as tensors.
        changed: positions of the inputs that Dynamo saw changed in place when it ran the graph on fake tensors.
        outputs: what the graph returns; None when something of it is no tensor of known sizes.
    """

    infos: tuple[InputInfo, ...]
    values: tuple[Any, ...]
    numbers: Mapping[int, Any]
    wrapped: frozenset[int]
    changed: frozenset[int]
    outputs: tuple[StaticTensor, ...] | None


def readable_name(source: str) -> str:
    """Dynamo's name of an input in the words of the model: ``L['self']._modules['conv']`` is ``conv``."""
    name = re.sub(r"^___from_numpy\((.*)\)$", r"\1", source)
    name = re.sub(r"(\.__dict__\['_modules'\]|\._modules|\._parameters|\._buffers)\['([^']*)'\]", r".\2", name)
    name = re.sub(r"^[LG]\['(?:self|model|function|fn)'\]\.?", "", name)
    name = name.removeprefix("__self__.").removeprefix("_orig_mod.")
    name = re.sub(r"^L\['kwargs'\]\['([^']*)'\]", r"\1", name)
    name = re.sub(r"^[LG]\['([^']*)'\]", r"\1", name)
    return name.lstrip(".")


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """The graph's inputs, in order."""
    return [node for node in graph.nodes if node.op == "placeholder"]


def break_reason(gm: fx.GraphModule) -> str | None:
    """Why Dynamo ended a graph before the network does, and in which line, in words; None when it did not."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None
    words = str(reason.reason).strip().partition("\n")[0]
    stack = getattr(reason, "user_stack", None)
    return f"{words} (line {stack[-1].lineno} of {stack[-1].filename}: {stack[-1].line})" if stack else words


def break_before() -> str | None:
    """The line in which the graph before the one that Dynamo compiles now was broken off, in words; None when it is
    the first one of its function."""
    code = dynamo.code_in_work()
    found = re.fullmatch(r"torch_dynamo_resume_in_.*_at_(\d+)", code.co_name) if code is not None else None
    return f"line {found[1]} of {code.co_filename}" if found else None


def describe_inputs(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[InputInfo, ...]:
    """Classify the flat inputs of a Dynamo graph.

    ``parameter``: a tensor read from a module; ``scalar``: numbers, other tensors of rank 0 or 1, and numbers of a
    module, of Python or numpy, that come as new tensors at every call (compared by value); ``user``: the rest. The
    traced graph may show that a scalar is a label (passes/domains/labels.py), which then counts as ``user``.
    """
    infos = []
    for placeholder, value in zip(placeholders(gm.graph), example_inputs, strict=True):
        source = dynamo.input_source(placeholder)
        name = readable_name(source) if source else placeholder.name
        if not isinstance(value, Tensor):
            infos.append(InputInfo("scalar", name))
        elif dynamo.is_module_state(placeholder):
            number = dynamo.is_numpy(placeholder) or dynamo.is_wrapped_number(placeholder)
            infos.append(InputInfo("scalar" if number else "parameter", name))
        else:
            infos.append(InputInfo("scalar" if value.dim() <= 1 else "user", name))
    return tuple(infos)


def _static(value: Tensor) -> StaticTensor:
    """The tensor without its content. Reading a size as an int makes Dynamo guard on it."""
    shape, strides = (tuple(int(size) for size in sizes) for sizes in (value.shape, value.stride()))
    return StaticTensor(shape, strides, value.dtype, value.device)


def _given(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[list[Any], dict[int, Any]]:
    """What to trace each input as, and the Python numbers that Dynamo left dynamic, by position."""
    symbols = graphs.size_symbols(placeholders(graph_module.graph))
    values: list[Any] = []
    numbers: dict[int, Any] = {}
    for position, value in enumerate(example_inputs):
        if isinstance(value, Tensor):
            if type(value) not in (Tensor, nn.Parameter, nn.Buffer, graphs.FakeTensor):
                raise UntraceableGraph(f"input {position} is a tensor subclass, {type(value).__name__}")
            if value.layout is not torch.strided or value.is_quantized:
                raise UntraceableGraph(f"input {position} is not a plain strided tensor")
            values.append(_static(value))
        elif graphs.is_symbolic(value) and not graphs.is_size(value, symbols):
            numbers[position] = value
            values.append(DynamicNumber(graphs.hint_of(value)))
        elif graphs.is_symbolic(value):
            # Another resolution is another graph.
            values.append(int(value))
        elif value is None or isinstance(value, (int, float, bool)):
            values.append(value)
        else:
            raise UntraceableGraph(f"input {position} is a {type(value).__name__}")
    return values, numbers


def fixed_sizes(gm: fx.GraphModule) -> dict[fx.Node, Any]:
    """The nodes of a Dynamo graph that stand for sizes or strides, or are computed from some, and their values: a graph
    that was made after a size, or a stride, had changed has such nodes in place of numbers. To be asked when all sizes
    are guarded on."""
    symbols = graphs.size_symbols(placeholders(gm.graph))
    found: dict[fx.Node, Any] = {}
    for node in gm.graph.nodes:
        value = node.meta.get(EXAMPLE_VALUE)
        sizes = value if isinstance(value, torch.Size) else (value,)
        symbolic = [graphs.is_symbolic(size) for size in sizes]
        if not all(isinstance(size, int) or of for size, of in zip(sizes, symbolic, strict=True)):
            continue
        if all(graphs.free_symbols(size) <= symbols for size, of in zip(sizes, symbolic, strict=True) if of):
            numbers = [graphs.hint_of(size) if of else size for size, of in zip(sizes, symbolic, strict=True)]
            found[node] = torch.Size(numbers) if isinstance(value, torch.Size) else numbers[0]
    return found


def _returned(gm: fx.GraphModule) -> tuple[StaticTensor, ...] | None:
    """What the graph returns; None when something of it is no tensor of known sizes."""
    (results,) = next(node for node in gm.graph.nodes if node.op == "output").args
    found = []
    for result in results:
        value = result.meta.get(EXAMPLE_VALUE) if isinstance(result, fx.Node) else None
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            return None
        try:
            found.append(_static(value))
        except graphs.UNTRACEABLE:  # its size depends on data
            return None
    return tuple(found)


def describe(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> GraphInputs:
    """Take from a Dynamo graph and its example inputs what ``tracing.trace`` needs.

    Args:
        gm: as Dynamo hands it to a backend.
        example_inputs: its flat inputs; real, meta or fake tensors.

    Raises:
        UntraceableGraph: the graph has to stay dense; the message says why.
    """
    values, numbers = _given(gm, example_inputs)
    nodes = placeholders(gm.graph)
    wrapped = frozenset(at for at, node in enumerate(nodes) if dynamo.is_wrapped_number(node))
    changed = frozenset(at for at, node in enumerate(nodes) if dynamo.is_changed(node))
    infos = describe_inputs(gm, example_inputs)
    return GraphInputs(infos, tuple(values), numbers, wrapped, changed, _returned(gm))


def outline(inputs: GraphInputs, outputs: Sequence[StaticTensor]) -> fx.GraphModule:
    """A graph with the inputs and outputs of a Dynamo graph, and nothing known of what lies between.

    Returns:
        A module whose graph carries ``meta["val"]`` as a traced one does; its operators cannot be run.
    """
    graph = fx.Graph()
    with graphs.FakeTensorMode():
        for number, value in enumerate(inputs.values):
            node = graph.placeholder(f"given_{number}")
            node.meta[VALUE] = value.empty() if isinstance(value, StaticTensor) else value
    given = tuple(placeholders(graph))
    graph.output(tuple(graph.call_function(unknown, given) for _ in outputs))
    return fx.GraphModule(nn.Module(), graph)


def set_outputs(graph: fx.Graph, outputs: Sequence[StaticTensor]) -> None:
    """Let what a graph returns have the forms that Dynamo saw: where autocast is on, a trace has other types."""
    (results,) = next(node for node in graph.nodes if node.op == "output").args
    with graphs.FakeTensorMode():
        for node, value in zip(results, outputs, strict=True):
            node.meta[VALUE] = value.empty()
