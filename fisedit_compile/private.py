"""Private PyTorch APIs: only this file and ``dynamo.py`` import any, so that a new release is checked in one place.

Supported releases: 2.11 and newer. What the rest of the package needs from inside PyTorch:

* tracing one graph module to functional ATen operators before dispatch (``trace_functional``);
* reading where Dynamo got a graph input from (``input_source``, ``is_module_state``) and which Python numbers it
  left dynamic (``is_size``, ``hint_of``);
* telling Dynamo that sizes are fixed (``keep_sizes``);
* compiling a graph with inductor so that some sizes stay symbols (``compile_with_inductor``);
* products of oneDNN with weights in its order (``multiplies_packed``, ``pack_weight``, ``multiply_packed``).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._dynamo
import torch._dynamo.config
import torch._guards
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._dynamo.convert_frame import compile_lock
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.source import ConstantSource, NumpyTensorSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._guards import TracingContext
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, GuardOnDataDependentSymNode, ShapeEnv, free_symbols
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _pop_mode, _push_mode

from fisedit_compile.tracing.dynamo import INTEGERS_CHOOSE_GRAPHS
from fisedit_compile.tracing.inputs import DynamicNumber, StaticTensor
from fisedit_compile.tracing.replacements import Functionalisable

#: What tracing raises for a graph whose sizes or control flow depend on data, or with operators without fake kernels.
UNTRACEABLE = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedFakeTensorException,
    fake_tensor.UnsupportedOperatorException,
    GuardOnDataDependentSymNode,
)
ENTER_AUTOCAST = torch.amp.autocast_mode._enter_autocast
EXIT_AUTOCAST = torch.amp.autocast_mode._exit_autocast
SET_GRAD_ENABLED = torch._C._set_grad_enabled
#: What entering a mode does for the thread alone; ``with mode:`` also changes what the process knows of modes.
push_mode, pop_mode = _push_mode, _pop_mode

__all__ = [
    "ENTER_AUTOCAST", "EXIT_AUTOCAST", "INTEGERS_CHOOSE_GRAPHS", "SET_GRAD_ENABLED", "UNTRACEABLE", "FakeTensor",
    "FakeTensorMode", "FunctionalTrace", "HigherOrderOperator", "OpOverload", "OptimizedModule", "TorchDispatchMode",
    "code_in_work", "compile_forward", "compile_frozen", "compile_settings", "compile_with_inductor", "compiling",
    "dynamo_limits", "end_failed_capture", "free_symbols", "hint_of", "input_source", "is_changed", "is_module_state",
    "is_numpy", "is_size", "is_symbolic", "is_wrapped_number", "keep_sizes", "leaves", "multiplies_packed",
    "multiply_packed", "pack_weight", "pop_mode", "push_mode", "rename_node", "size_symbols", "trace_functional",
]  # fmt: skip


@dataclass
class FunctionalTrace:
    """Result of ``trace_functional``: the graph, which inputs it mutates, which dynamic numbers it fixed."""

    graph_module: fx.GraphModule
    mutated: list[int] = field(default_factory=list)
    specialised: list[int] = field(default_factory=list)


def _is_mutated(value: FunctionalTensor, given: Any) -> bool:
    """Whether tracing wrote into an input, or changed its shape in place."""
    element: Any = value.elem
    if torch._functionalize_has_data_mutation(element):  # type: ignore[attr-defined]
        return True
    return (tuple(value.shape), tuple(value.stride())) != (given.shape, given.strides)


def trace_functional(
    graph_module: fx.GraphModule, inputs: Sequence[StaticTensor | DynamicNumber | int | float | bool | None]
) -> FunctionalTrace:
    """Trace a Dynamo graph to functional ATen operators, before autograd and dispatch decompose any of them.

    The interpreter with preserved metadata is what keeps ``nn_module_stack``. A fresh fake mode is needed because
    ``make_fx`` would otherwise pick up Dynamo's own and go symbolic; suspending the tracing context keeps the guards
    of this trace out of Dynamo's.
    """
    shape_env = ShapeEnv(duck_shape=False)
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=shape_env)
    functional_mode = FunctionalTensorMode(pre_dispatch=True, export=True)
    values: list[Any] = []
    symbols: dict[int, Any] = {}
    mutated: list[int] = []
    with torch._guards.tracing(None), torch.inference_mode(False), torch.no_grad():
        for position, given in enumerate(inputs):
            if isinstance(given, StaticTensor):
                with fake_mode:
                    value: Any = given.empty()
            elif isinstance(given, DynamicNumber):
                value = shape_env.create_unspecified_symint_and_symbol(
                    given.hint, source=ConstantSource(f"number_{position}"), dynamic_dim=DimDynamic.DYNAMIC
                )
                symbols[position] = value.node.expr
            else:
                value = given
            values.append(value)

        def run(*arguments: Any) -> Any:
            with functional_mode:
                wrapped = [FunctionalTensor.to_functional(a) if isinstance(a, Tensor) else a for a in arguments]
                outputs = Functionalisable(graph_module).run(*wrapped)
                outputs = pytree.tree_map_only(FunctionalTensor, FunctionalTensor.from_functional, outputs)
                mutated.extend(
                    position
                    for position, value in enumerate(wrapped)
                    if isinstance(value, FunctionalTensor) and _is_mutated(value, inputs[position])
                )
            return outputs

        with fake_mode, fx.traceback.preserve_node_meta():
            traced = make_fx(run, pre_dispatch=True, tracing_mode="real")(*values)
    guarded = {symbol for guard in shape_env.guards for symbol in guard.expr.free_symbols} | set(shape_env.replacements)
    return FunctionalTrace(traced, mutated, [position for position, symbol in symbols.items() if symbol in guarded])


def _source(placeholder: fx.Node) -> Any:
    """Where Dynamo got a graph input from; None when it does not say."""
    argument = placeholder.meta.get("grapharg")
    return getattr(argument, "source", None) or getattr(placeholder, "_dynamo_source", None)


def _read(value: Any) -> Any:
    """The value of what is a property in newer releases and a method in older ones."""
    return value() if callable(value) else value


def input_source(placeholder: fx.Node) -> str | None:
    """Dynamo's name of where a graph input comes from, for example ``L['self']._modules['conv']``."""
    source = _source(placeholder)
    return None if source is None else str(_read(source.name))


def is_module_state(placeholder: fx.Node) -> bool:
    """Whether a graph input was read from a module: a parameter, a buffer or any other tensor attribute."""
    source = _source(placeholder)
    if source is None:
        return False
    where = _read(source.guard_source)
    return bool(where.is_unspecialized_nn_module() or where.is_specialized_nn_module() or where.is_fsdp_module())


def is_changed(placeholder: fx.Node) -> bool:
    """Whether Dynamo saw a graph input changed in place when it ran the graph's operators on fake tensors."""
    value = placeholder.meta.get("example_value")
    return isinstance(value, Tensor) and not value.is_inference() and value._version > 0


def code_in_work() -> Any:
    """The code object that Dynamo compiles now in this thread; None outside of Dynamo."""
    try:
        return InstructionTranslator.current_tx().f_code
    except AttributeError:
        return None


def is_numpy(placeholder: fx.Node) -> bool:
    """Whether a graph input is a numpy number or array, which Dynamo makes a new tensor of at every call."""
    return isinstance(_source(placeholder), NumpyTensorSource)


def rename_node(node: fx.Node, name: str) -> None:
    """Give a node a name, or one made from it when the graph has that name already."""
    node._rename(name)
    if node.op == "placeholder":
        node.target = node.name


def is_wrapped_number(placeholder: fx.Node) -> bool:
    """Whether a graph input is a Python float that Dynamo passes as a tensor of rank 0."""
    return bool(getattr(placeholder.meta.get("grapharg"), "pass_arg_as_tensor", False))


def is_symbolic(value: object) -> bool:
    """Whether Dynamo left this number dynamic."""
    return isinstance(value, torch.SymInt)


def hint_of(value: torch.SymInt) -> int:
    """The value a dynamic number has in the call being compiled, without a guard on it."""
    return int(value.node.hint)


def size_symbols(placeholders: Sequence[fx.Node]) -> set[Any]:
    """All symbols that occur in the sizes of tensor inputs."""
    found: set[Any] = set()
    for placeholder in placeholders:
        value = placeholder.meta.get("example_value")
        if isinstance(value, Tensor):
            found |= free_symbols(tuple(value.shape))
            found |= free_symbols(tuple(value.stride())) if value.layout is torch.strided else set()
    return found


def is_size(value: torch.SymInt, symbols: set[Any]) -> bool:
    """Whether a dynamic number is a size of a tensor input, or computed from some."""
    return bool(free_symbols(value) & symbols)


def leaves(value: Any) -> list[Any]:
    """What nested lists, dictionaries and the like hold, in order."""
    return pytree.tree_leaves(value)


def keep_sizes(*values: Any) -> None:
    """Have Dynamo take the sizes of all tensors in ``values``, nested ones too, as they are.

    Otherwise it makes symbols of sizes that changed since a function was traced. Tracing takes longer with them (see
    ``benchmarks/RESULTS.md``), and the graph is one for a single size all the same.
    """
    for value in leaves(values):
        if isinstance(value, Tensor):
            torch._dynamo.mark_static(value)
            if value._is_view() and value._base is not None:
                torch._dynamo.mark_static(value._base)


@contextmanager
def dynamo_limits(limit: int) -> Iterator[None]:
    """Inside, Dynamo may compile ``limit`` graphs of one function and raises beyond them."""
    limits = {"recompile_limit": limit, "accumulated_recompile_limit": limit}
    with torch._dynamo.config.patch({**limits, "fail_on_recompile_limit_hit": True, "suppress_errors": False}):
        yield


@contextmanager
def compiling() -> Iterator[None]:
    """What holds while Dynamo compiles, for tracing at another time: one thread at a time, none of the user's modes.

    Tracing sets a flag of the process, on which compiled networks refuse to run in other threads unless this is known.
    """
    with compile_lock, _disable_current_modes():
        before = torch.compiler._is_compiling_flag
        torch.compiler._is_compiling_flag = True
        try:
            yield
        finally:
            torch.compiler._is_compiling_flag = before


def compile_with_inductor(
    graph_module: fx.GraphModule, examples: Sequence[Any], dynamic: Mapping[int, Mapping[int, Hashable]]
) -> tuple[Callable[..., Any], Callable[[Mapping[Hashable, int]], bool]]:
    """Compile a functional graph for inference.

    The symbols become inputs of the graph, as in Dynamo's graphs: inductor's caches keep no guards on sizes that only
    occur in shapes, and would then hand out code made for other sizes.

    Args:
        graph_module: takes tensors or None; changed.
        examples: its inputs; shapes, strides and dtypes are those of all later calls, but for dynamic sizes.
        dynamic: input position -> dimension -> name of the symbol its size is; equal names are equal sizes. Inputs
            with dynamic sizes are contiguous, and their sizes are at least 2.

    Returns:
        The compiled function, whose first argument are the sizes of the symbols by name, and a function that tells
        whether it holds for given sizes.
    """
    from torch._inductor.compile_fx import compile_fx  # takes seconds to import

    shape_env = ShapeEnv(duck_shape=False)
    fake_mode = FakeTensorMode(shape_env=shape_env)
    symbols: dict[Hashable, Any] = {}

    def symbolic_size(name: Hashable, size: int) -> Any:
        if name not in symbols:
            source = ConstantSource(f"size_{len(symbols)}")
            symbol = shape_env.create_symbol(size, source=source, dynamic_dim=DimDynamic.DYNAMIC)
            symbols[name] = shape_env.create_symintnode(symbol, hint=size, source=source)
        return symbols[name]

    fakes: list[Any] = []
    with torch.inference_mode(False), torch.no_grad(), torch._guards.tracing(TracingContext(fake_mode)):
        for position, example in enumerate(examples):
            if not isinstance(example, Tensor):
                fakes.append(example)
                continue
            shape: list[Any] = list(example.shape)
            strides: list[Any] = list(example.stride())
            if position in dynamic:
                for dimension, name in dynamic[position].items():
                    shape[dimension] = symbolic_size(name, shape[dimension])
                strides = [1]
                for size in reversed(shape[1:]):
                    strides.insert(0, strides[0] * size)
            with fake_mode:
                fakes.append(torch.empty_strided(shape, strides, dtype=example.dtype, device=example.device))
        graph = graph_module.graph
        first = next(iter(graph.nodes))
        for number in range(len(symbols)):
            with graph.inserting_before(first):
                graph.placeholder(f"size_{number}")
        graph_module.recompile()
        compiled: Any = compile_fx(graph_module, [*symbols.values(), *fakes])
    names = tuple(symbols)
    expressions = {name: symbol.node.expr for name, symbol in symbols.items()}
    guards = [guard.expr for guard in shape_env.guards]
    fixed = {symbol: value for symbol, value in shape_env.replacements.items() if symbol in expressions.values()}

    def holds(sizes: Mapping[Hashable, int]) -> bool:
        values = {expression: sizes[name] for name, expression in expressions.items()}
        if any(values[symbol] != value.xreplace(values) for symbol, value in fixed.items()):
            return False
        return all(bool(guard.xreplace(values)) for guard in guards)

    def run(sizes: Mapping[Hashable, int], *inputs: Any) -> Any:
        return compiled(*[sizes[name] for name in names], *inputs)

    return run, holds


def end_failed_capture(device: torch.device, pool: Any) -> None:
    """Tell a GPU's allocator that a capture into ``pool`` is over; PyTorch before 2.13 forgets to when one fails."""
    with suppress(RuntimeError):  # it was told
        torch._C._cuda_endAllocateToPool(device.index, pool)


def compile_settings(module: OptimizedModule, backend: str) -> Mapping[str, Any]:
    """``mode`` and ``options`` that a module was compiled with, where it was for ``backend``; else none."""
    found: Any = module.dynamo_ctx.callback
    while hasattr(found, "_torchdynamo_orig_backend"):
        found = found._torchdynamo_orig_backend
    return found.kwargs if getattr(found, "compiler_name", None) == backend else {}


def compile_frozen(module: torch.nn.Module) -> Callable[..., Any]:
    """The module compiled by inductor with its weights frozen into the code, for inference without gradients.

    Inductor's setting must hold while Dynamo traces: an option of ``torch.compile`` comes too late. And the backend
    must not be inductor's own function, whose code for the same network Dynamo would use again.
    """
    import torch._inductor.config
    from torch._inductor.compile_fx import compile_fx  # takes seconds to import

    def frozen_inductor(graph_module: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        code: Any = compile_fx(graph_module, examples)
        return code

    compiled = torch.compile(module, backend=frozen_inductor)

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._inductor.config.patch(freezing=True):
            return compiled(*args, **kwargs)

    return call


def compile_forward(function: Callable[..., Any], backend: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a fresh function with ``backend``: its graphs never count against those of the user's model."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    # Dynamo keeps compiled graphs on the code object, which all closures of one function share.
    call.__code__ = call.__code__.replace(co_name="fisedit_capture")
    return torch.compile(call, backend=backend, dynamic=False)


# Products of oneDNN.


def multiplies_packed(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there and multiplies with packed weights of this dtype."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def pack_weight(weight: Tensor, rows: int) -> Tensor:
    """A weight ``[Cout, Cin]``, contiguous, in the order that oneDNN multiplies fastest with so many rows.

    Returns:
        An opaque tensor of the same shape, dtype and device.
    """
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return packed


def multiply_packed(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Rows ``[..., Cin]`` times a weight of :func:`pack_weight`, plus a bias: ``[..., Cout]``, contiguous."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return result
