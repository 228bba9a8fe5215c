"""From a Dynamo graph to a functional, pre-dispatch ATen graph: what the passes work on.

The backend calls ``description.describe`` while Dynamo compiles a graph, and ``trace`` at its first call inside record
or edit.
``capture`` runs a model through Dynamo without computing anything.
"""

from __future__ import annotations

import inspect
import logging
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fisedit_compile.options import NUMBERS_HINT
from fisedit_compile.passes.common.deferred import DeferredModule
from fisedit_compile.passes.common.meta import EXAMPLE_VALUE, MODULE_PATH, MODULE_STACK, VALUE
from fisedit_compile.passes.common.opaque import Opaque
from fisedit_compile.passes.common.program import InputInfo
from fisedit_compile.passes.domains.labels import find_labels
from fisedit_compile.private import dynamo, graphs
from fisedit_compile.private.modules import original_module
from fisedit_compile.private.operators import schema_of
from fisedit_compile.tracing.description import (
    GraphInputs,
    UntraceableGraph,
    describe,
    outline,
    placeholders,
    readable_name,
    set_outputs,
)
from fisedit_compile.tracing.inputs import DynamicNumber, StaticTensor

logger = logging.getLogger(__name__)

aten = torch.ops.aten

#: What stays an input of the traced graph.
DYNAMIC = (StaticTensor, DynamicNumber)
#: Nodes without a result that check what tracing has made static.
STATIC_CHECKS = (aten._assert_tensor_metadata.default, graphs.SET_GRAD_ENABLED)
#: Operators whose result depends on how their input lies in memory, and what they become.
LOOK_AT_STRIDES = {
    aten.as_strided.default: torch.ops.fisedit.as_strided.default,
    aten.view_as_complex.default: torch.ops.fisedit.complex_of_pairs.default,
    aten.view.dtype: torch.ops.fisedit.reinterpreted.default,
}
#: Positions of the probability and of the training flag (None: has none) of operators that are random in training only.
RANDOM_IN_TRAINING: dict[Any, tuple[int | None, int | None]] = {
    aten.dropout.default: (1, 2),
    aten.feature_dropout.default: (1, 2),
    aten.alpha_dropout.default: (1, 2),
    aten.feature_alpha_dropout.default: (1, 2),
    aten.native_dropout.default: (1, 2),
    aten.rrelu.default: (None, 3),
    aten.scaled_dot_product_attention.default: (4, None),
}


@dataclass(frozen=True)
class TracedGraph:
    """A functional graph and what its flat inputs are.

    Attributes:
        gm: placeholders are the flat inputs in Dynamo's order; ``node.meta`` has ``val`` (a fake tensor or a number),
            ``nn_module_stack`` and ``module_path`` (dotted, as in ``named_modules``; "" outside any module).
        input_infos: one for each placeholder.
        numbers: positions of the inputs that are Python numbers in the user's call and stay run-time inputs.
        steady: positions of those numbers that must not change within a recording: which graph Dynamo runs for them
            depends on earlier calls.
        constants: positions of the inputs that are fixed in the graph, such as sizes; their placeholders have no users.
        opaque: what runs in place of a graph that could not be traced faithfully, and why it could not. Then ``gm``
            only tells which inputs and outputs are maps: a trace that is not to be run, or an outline.
    """

    gm: fx.GraphModule
    input_infos: tuple[InputInfo, ...]
    numbers: tuple[int, ...] = ()
    steady: tuple[int, ...] = ()
    constants: frozenset[int] = frozenset()
    opaque: Opaque | None = None


@dataclass(frozen=True)
class DenseGraph:
    """A captured graph of which not even inputs and outputs can be told, and why."""

    reason: str


def module_path(node: fx.Node) -> str:
    """Dotted path of the module a node comes from; "" when it comes from none."""
    stack = node.meta.get(MODULE_STACK)
    if not stack:
        return ""
    path, _ = list(stack.values())[-1]
    return readable_name(str(path)) if "[" in str(path) else str(path)


def _is_random(node: fx.Node) -> bool:
    """Whether the node draws random numbers."""
    target = node.target
    if not isinstance(target, graphs.OpOverload):
        return False
    known = RANDOM_IN_TRAINING.get(target)
    if known is None:
        return torch.Tag.nondeterministic_seeded in target.tags
    names = [argument.name for argument in schema_of(target).arguments]
    defaults = [argument.default_value for argument in schema_of(target).arguments]

    def read(position: int) -> Any:
        if position < len(node.args):
            return node.args[position]
        return node.kwargs.get(names[position], defaults[position])

    probability, training = known
    possible = probability is None or read(probability) != 0
    return possible and (training is None or read(training) is not False)


def _check_before(graph_module: fx.GraphModule) -> None:
    """Refuse what cannot be traced faithfully, named by what the user wrote."""
    for node in graph_module.graph.nodes:
        if isinstance(node.target, graphs.HigherOrderOperator):
            raise UntraceableGraph(f"higher-order operator {node.target} has graphs of its own")
        if "functorch" in (getattr(node.target, "__module__", None) or ""):
            raise UntraceableGraph("it uses a function transform of torch.func, such as vmap or grad")
        if node.op == "call_module" and any(True for _ in graph_module.get_submodule(str(node.target)).parameters()):
            raise UntraceableGraph(f"module {node.target} was not inlined; its parameters are not graph inputs")


def _attribute(graph: fx.Graph, node: fx.Node) -> Any:
    """What a node that reads an attribute of the traced module reads."""
    return operator.attrgetter(str(node.target))(graph.owning_module)


def _check_after(graph: fx.Graph) -> None:
    """Refuse operators whose result or effect is not a function of their inputs."""
    for node in graph.nodes:
        if node.op == "call_module":
            raise UntraceableGraph(f"module {node.target} was not traced")
        if node.op == "get_attr" and isinstance(_attribute(graph, node), graphs.FakeTensor):
            raise UntraceableGraph(
                "it makes a tensor in a way of which only the size can be traced, such as torch.Tensor(height, width) "
                "(torch.empty and torch.zeros can be traced)"
            )
        if node.op != "call_function":
            continue
        if isinstance(node.target, graphs.HigherOrderOperator):
            raise UntraceableGraph(f"higher-order operator {node.target} has an effect on its inputs")
        if node.target is graphs.ENTER_AUTOCAST or node.target is graphs.EXIT_AUTOCAST:
            raise UntraceableGraph("it switches autocast inside the graph")
        if _is_random(node):
            raise UntraceableGraph(f"{node.target} is random (module {module_path(node) or 'unknown'})")
        if isinstance(node.target, graphs.OpOverload) and schema_of(node.target).is_mutable:
            raise UntraceableGraph(f"{node.target} changes a tensor in place")
        if isinstance(node.target, graphs.OpOverload) and not schema_of(node.target).returns:
            raise UntraceableGraph(f"{node.target} has an effect but no result")
        if node.target is aten.batch_norm.default and node.args[5] is True:
            raise UntraceableGraph("batch_norm uses the statistics of the batch (training mode)")
    if not _returns_tensors(graph):
        raise UntraceableGraph("an output of the graph is not a tensor")


def _returns_tensors(graph: fx.Graph) -> bool:
    (results,) = next(node for node in graph.nodes if node.op == "output").args
    return all(isinstance(result, fx.Node) and isinstance(result.meta.get(VALUE), Tensor) for result in results)


def _drop_idle_autocast(graph: fx.Graph) -> None:
    """Erase regions that switch autocast off while it is off."""
    for node in list(graph.nodes):
        if node.target is not graphs.ENTER_AUTOCAST:
            continue
        device, _, enabled, _ = node.args
        if not enabled and not torch.is_autocast_enabled(device):
            for user in list(node.users):
                graph.erase_node(user)
            graph.erase_node(node)


def _order_elements(graph: fx.Graph) -> None:
    """Let operators that look at strides look at elements in order, whatever the strides will be.

    Raises:
        UntraceableGraph: one of them looks at other elements than those of its input, or at them in another order.
    """
    for node in graph.nodes:
        ordered = LOOK_AT_STRIDES.get(node.target)
        if ordered is None:
            continue
        source = node.args[0].meta[VALUE]
        if not source.is_contiguous() or source.storage_offset():
            raise UntraceableGraph(f"{node.target} looks at values that do not lie in order")
        if node.target is aten.as_strided.default:
            sizes, strides, *offset = node.args[1:]
            last = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
            if any(offset) or node.kwargs.get("storage_offset") or (0 not in sizes and last >= source.numel()):
                raise UntraceableGraph(f"{node.target} looks at other values than those of its input")
            node.args, node.kwargs = node.args[:3], {}
        node.target = ordered


def _functional(
    gm: fx.GraphModule, inputs: GraphInputs, values: list[Any], numbers: dict[int, Any]
) -> graphs.FunctionalTrace:
    """The functional graph of a Dynamo graph. What tracing has to fix moves from ``numbers`` to ``values``.

    Raises:
        UntraceableGraph: sizes or control flow depend on data, or an operator cannot run on fake tensors.
    """
    try:
        traced = graphs.trace_functional(gm, values)
        if traced.specialised:
            for position in traced.specialised:
                values[position] = int(numbers.pop(position))
            traced = graphs.trace_functional(gm, values)
    except RuntimeError as error:
        # Those of graphs.UNTRACEABLE are such errors, and so is that of a write into a view that cannot be functional.
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if inputs.wrapped:
            names = ", ".join(inputs.infos[position].name for position in sorted(inputs.wrapped))
            reason += (
                f"{NUMBERS_HINT} {names}, which it does after they changed "
                "or with dynamic=True: compile with dynamic=False, or keep them as they are"
            )
        raise UntraceableGraph(reason) from error
    return traced


def _name_inputs(graph: fx.Graph, values: Sequence[Any]) -> None:
    """Names, from which those of cache sites are made, must not depend on whether Dynamo passes sizes as well."""
    number = 0
    for node, value in zip(placeholders(graph), values, strict=True):
        if isinstance(value, DYNAMIC):
            graphs.rename_node(node, f"input_{number}")
            number += 1
        else:
            graphs.rename_node(node, "constant")
            node.meta[VALUE] = value


def trace(gm: fx.GraphModule, inputs: GraphInputs) -> TracedGraph:
    """Trace a Dynamo graph, or find out what can be known of one that cannot be traced faithfully.

    Sizes are fixed (Dynamo guards on them: another resolution is another graph). Python ints that Dynamo left dynamic
    and that are no sizes stay inputs, unless the graph branches on them.

    Args:
        gm: as Dynamo handed it to the backend.
        inputs: what ``describe`` found of it.

    Returns:
        The traced graph; one with ``opaque`` cannot be run.

    Raises:
        UntraceableGraph: the graph has to stay dense, and what it returns cannot be masked; the message says why.
    """
    values, numbers, changed = list(inputs.values), dict(inputs.numbers), set(inputs.changed)
    module: fx.GraphModule | None = None
    opaque: Opaque | None = None
    try:
        _check_before(gm)
        traced = _functional(gm, inputs, values, numbers)
        module = traced.graph_module
        changed.update(traced.mutated)
        for node in list(module.graph.nodes):
            if node.target in STATIC_CHECKS:
                module.graph.erase_node(node)
        _drop_idle_autocast(module.graph)
        if traced.mutated:
            names = ", ".join(inputs.infos[position].name for position in traced.mutated)
            raise UntraceableGraph(f"it changes its inputs in place: {names}")
        _check_after(module.graph)
        _order_elements(module.graph)
        module.graph.eliminate_dead_code()
    except UntraceableGraph as error:
        # Without an output a call would be dead code, whatever its effects are.
        if not inputs.outputs:
            raise
        if module is None or not _returns_tensors(module.graph):
            module = outline(inputs, inputs.outputs)
        set_outputs(module.graph, inputs.outputs)
        strides = [value.strides if isinstance(value, StaticTensor) else None for value in values]
        opaque = Opaque(gm, str(error), strides, changed)
    graph = module.graph
    _name_inputs(graph, values)
    for node in graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            # A view was chosen by the strides of this trace; kernels of another device, or another call, may leave
            # others. Nor may the names of sites, which are made from those of nodes, depend on the choice.
            node.target = aten.reshape.default
            graphs.rename_node(node, "reshaped")
        node.meta[MODULE_PATH] = module_path(node)
    logger.debug("traced a graph of %d nodes with %d inputs", len(graph.nodes), len(values))
    infos = list(inputs.infos)
    for at in find_labels(graph, infos):
        infos[at] = replace(infos[at], kind="user")
    if opaque is not None:
        infos = [
            replace(info, kind="state") if at in changed and info.kind == "parameter" else info
            for at, info in enumerate(infos)
        ]
    return TracedGraph(
        DeferredModule(module, graph),
        tuple(infos),
        numbers=tuple(sorted({*numbers, *inputs.wrapped})),
        steady=tuple(sorted(inputs.wrapped if dynamo.INTEGERS_CHOOSE_GRAPHS else {*numbers, *inputs.wrapped})),
        constants=frozenset(at for at, value in enumerate(values) if not isinstance(value, DYNAMIC)),
        opaque=opaque,
    )


def _without_computing(gm: fx.GraphModule) -> Any:
    """A stand-in for a Dynamo graph that returns zeros of the right shapes."""
    (results,) = next(node for node in gm.graph.nodes if node.op == "output").args
    values = [result.meta[EXAMPLE_VALUE] for result in results]

    def zeros(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return graphs.hint_of(value) if graphs.is_symbolic(value) else value
        shape, strides = (tuple(int(size) for size in sizes) for sizes in (value.shape, value.stride()))
        return torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device).zero_()

    return lambda *arguments: tuple(zeros(value) for value in values)


def capture_all(model: Any, *args: Any, **kwargs: Any) -> list[TracedGraph | DenseGraph]:
    """As ``capture``; graphs that have to stay dense appear with their reason."""
    found: list[TracedGraph | DenseGraph] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        try:
            found.append(trace(gm, describe(gm, example_inputs)))
        except UntraceableGraph as error:
            found.append(DenseGraph(str(error)))
        return _without_computing(gm)

    function = original_module(model)
    if isinstance(function, nn.Module):
        function = function.forward
    args, kwargs = _by_name(function, args, kwargs)
    with torch.no_grad(), dynamo.dynamo_limits(64):
        _compile_forward(function, backend)(*args, **kwargs)
    return found


def _compile_forward(function: Callable[..., Any], backend: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a fresh function with ``backend``: its graphs never count against those of the user's model."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    # Dynamo keeps compiled graphs on the code object, which all closures of one function share.
    call.__code__ = call.__code__.replace(co_name="fisedit_capture")
    return torch.compile(call, backend=backend, dynamic=False)


def _by_name(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments, by keyword as far as possible: keywords name the inputs."""
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except (TypeError, ValueError):  # no signature, or not these arguments: the call itself says so best
        return args, kwargs
    kinds = {name: parameter.kind for name, parameter in bound.signature.parameters.items()}
    if inspect.Parameter.VAR_POSITIONAL in (kinds[name] for name in bound.arguments):
        return args, kwargs
    named = {
        name: value
        for name, value in bound.arguments.items()
        if kinds[name] is inspect.Parameter.POSITIONAL_OR_KEYWORD and name not in kwargs
    }
    return bound.args[: len(args) - len(named)], {**named, **kwargs}


def capture(model: Any, *args: Any, **kwargs: Any) -> list[TracedGraph]:
    """Trace every graph that Dynamo makes of one call, without computing anything.

    Args:
        model: a module or function; may be on the meta device, as its inputs may.
        args, kwargs: of the call.

    Raises:
        UntraceableGraph: one of the graphs cannot be traced.
    """
    traced = []
    for graph in capture_all(model, *args, **kwargs):
        if isinstance(graph, DenseGraph):
            raise UntraceableGraph(graph.reason)
        if graph.opaque is not None:
            raise UntraceableGraph(graph.opaque.reason)
        traced.append(graph)
    return traced
