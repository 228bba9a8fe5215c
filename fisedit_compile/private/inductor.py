"""PyTorch's code generator."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
import torch._guards
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv


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
