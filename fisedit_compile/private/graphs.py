"""PyTorch's functional graphs: how they are traced, their fake tensors and symbols, and the modes of dispatch.

* ``trace_functional``: one graph module becomes functional ATen operators before dispatch;
* ``is_symbolic``, ``hint_of``, ``size_symbols``, ``is_size``: which Python numbers Dynamo left dynamic;
* ``push_mode``, ``pop_mode``: dispatch modes of the thread alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._guards
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, GuardOnDataDependentSymNode, ShapeEnv, free_symbols
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

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
    "ENTER_AUTOCAST", "EXIT_AUTOCAST", "SET_GRAD_ENABLED", "UNTRACEABLE", "FakeTensor", "FakeTensorMode",
    "FunctionalTrace", "HigherOrderOperator", "OpOverload", "TorchDispatchMode", "free_symbols", "hint_of", "is_size",
    "is_symbolic", "leaves", "pop_mode", "push_mode", "rename_node", "size_symbols", "trace_functional",
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


def rename_node(node: fx.Node, name: str) -> None:
    """Give a node a name, or one made from it when the graph has that name already."""
    node._rename(name)
    if node.op == "placeholder":
        node.target = node.name


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
