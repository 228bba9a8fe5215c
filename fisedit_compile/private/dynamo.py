"""PyTorch's compiler Dynamo: its settings, what it knows of a graph's inputs, the calls of what it compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import CodeType
from typing import Any

import torch
import torch._dynamo
import torch._dynamo.config
from torch import Tensor, fx
from torch._dynamo.convert_frame import compile_lock
from torch._dynamo.eval_frame import OptimizedModule, _TorchDynamoContext
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, Unsupported, UserError
from torch._dynamo.source import NumpyTensorSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.utils._python_dispatch import _disable_current_modes

from fisedit_compile.private.graphs import leaves

__all__ = [
    "GRAPH_BREAKS", "INTEGERS_CHOOSE_GRAPHS", "SETTINGS_PER_THREAD", "BackendCompilerFailed", "CompiledCalls",
    "FailOnRecompileLimitHit", "OptimizedModule", "change_settings", "code_in_work",
    "compile_settings", "compiling", "dynamo_limits", "input_source", "is_changed", "is_module_state", "is_numpy",
    "is_wrapped_number", "keep_sizes", "setting", "wrapper_codes",
]  # fmt: skip


def _entry(name: str) -> Any:
    """What Dynamo keeps of a setting."""
    config: Any = torch._dynamo.config
    return config._config[name]


#: Whether Dynamo has the setting under which the value alone decides which graph it runs for a Python int: the graph it
#: made dynamic leaves the first value to the graph that it specialised on it.
INTEGERS_CHOOSE_GRAPHS = hasattr(torch._dynamo.config, "automatic_dynamic_exclusion_guard")
#: Whether a setting that one thread makes holds for that thread alone.
SETTINGS_PER_THREAD = isinstance(_entry("recompile_limit").user_override, ContextVar)
#: What compiling with ``fullgraph=True`` raises for a network that is not one graph.
GRAPH_BREAKS = (Unsupported, UserError)
#: What belongs to one use of ``torch.compile``; its ``enter_exit_hooks`` are called around every call of the result.
CompiledCalls = _TorchDynamoContext


def setting(name: str) -> Any:
    """The value of a setting of Dynamo."""
    return getattr(torch._dynamo.config, name)


def change_settings(values: Mapping[str, Any]) -> dict[str, Callable[[], None]]:
    """Set settings of Dynamo.

    Returns:
        By name, what puts the former value back.
    """
    config: Any = torch._dynamo.config
    return {name: config._make_closure_patcher(**{name: value})() for name, value in values.items()}


@contextmanager
def dynamo_limits(limit: int) -> Iterator[None]:
    """Inside, Dynamo may compile ``limit`` graphs of one function and raises beyond them."""
    limits = {"recompile_limit": limit, "accumulated_recompile_limit": limit}
    with torch._dynamo.config.patch({**limits, "fail_on_recompile_limit_hit": True, "suppress_errors": False}):
        yield


def wrapper_codes() -> frozenset[CodeType]:
    """The code of the functions that ``torch.compile`` returns; all closures of one function share it."""
    constants = _TorchDynamoContext.__call__.__code__.co_consts
    return frozenset(code for code in constants if isinstance(code, CodeType) and "kwargs" in code.co_varnames)


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


def compile_settings(module: OptimizedModule, backend: str) -> Mapping[str, Any]:
    """``mode`` and ``options`` that a module was compiled with, where it was for ``backend``; else none."""
    found: Any = module.dynamo_ctx.callback
    while hasattr(found, "_torchdynamo_orig_backend"):
        found = found._torchdynamo_orig_backend
    return found.kwargs if getattr(found, "compiler_name", None) == backend else {}


def code_in_work() -> Any:
    """The code object that Dynamo compiles now in this thread; None outside of Dynamo."""
    try:
        return InstructionTranslator.current_tx().f_code
    except AttributeError:
        return None


def changes_what_is_kept() -> bool:
    """Whether the code that Dynamo compiles now in this thread leaves something changed that was there before, such as
    an attribute of a module, a dictionary or a global variable; False outside of Dynamo."""
    try:
        effects = InstructionTranslator.current_tx().output.side_effects
    except AttributeError:
        return False
    # What was made by the code itself belongs to a scope of it.
    kinds = (changed.mutation_type for changed in effects._get_modified_vars())
    return any(kind is not None and kind.scope == 0 for kind in kinds)


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


def is_numpy(placeholder: fx.Node) -> bool:
    """Whether a graph input is a numpy number or array, which Dynamo makes a new tensor of at every call."""
    return isinstance(_source(placeholder), NumpyTensorSource)


def is_wrapped_number(placeholder: fx.Node) -> bool:
    """Whether a graph input is a Python float that Dynamo passes as a tensor of rank 0."""
    return bool(getattr(placeholder.meta.get("grapharg"), "pass_arg_as_tensor", False))


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
