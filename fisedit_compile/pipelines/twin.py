"""The pipeline that a session calls: a twin of the user's, which shares its networks and has everything else to itself.

Another thread may call the user's pipeline, or one that has the same networks, while a session is at work. So a session
puts nothing into these objects, not even for a moment: the compiled network, the sparse decode and the state of a run
belong to the twin, which is made for one call.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from fisedit_compile.errors import PipelineError
from fisedit_compile.private.diffusers import forget_cancelling, is_cancelled, noted_arguments
from fisedit_compile.private.modules import COMPILED_MARK, compiled_call

_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)
Value = TypeVar("Value")


def independent_copy(value: Value) -> Value | None:
    """A copy that shares nothing with an object without weights, such as a scheduler; None where there can be none: the
    object holds locks or the like, functions that may belong to it, or networks."""
    held = vars(value).values() if hasattr(value, "__dict__") else ()
    if any(isinstance(one, _FUNCTIONS) and getattr(one, "__self__", None) is not value for one in held):
        return None
    if any(isinstance(one, torch.nn.Module) or hasattr(one, "components") for one in held):
        return None
    try:
        return copy.deepcopy(value)
    except (TypeError, AttributeError, RecursionError, RuntimeError, NotImplementedError):
        return None


def module_view(module: torch.nn.Module) -> Any:
    """A module that shares all tensors and modules with another one, and has attributes and hooks of its own: its
    modules can be exchanged in it."""
    view: Any = copy.copy(module)
    vars(view).update({name: copy.copy(value) for name, value in vars(view).items() if isinstance(value, dict)})
    return view


def uncompiled(module: torch.nn.Module) -> torch.nn.Module:
    """The module; where it was compiled by its own ``compile()``, to which every call of it would come, one that was
    not and shares everything with it."""
    compiled = compiled_call(module) is not None
    # What a module was compiled to is left out of copies.
    return copy.copy(module) if compiled else module


@contextmanager
def unmarked(module: torch.nn.Module) -> Iterator[None]:
    """Compile a module inside without leaving the mark on it that PyTorch makes."""
    marked = COMPILED_MARK in vars(module)
    yield
    if not marked:
        vars(module).pop(COMPILED_MARK, None)


def module_tree(module: torch.nn.Module) -> Any:
    """As :func:`module_view`, of a module and all modules in it; only the tensors are shared."""
    views: dict[torch.nn.Module, Any] = {}

    def view(original: torch.nn.Module) -> Any:
        if original not in views:
            views[original] = module_view(original)
            for name, part in original.named_children():
                views[original].add_module(name, view(part))
        return views[original]

    return view(module)


def twin_of(pipe: Any) -> Any:
    """A pipeline of the same class with the same components; schedulers, and whatever else is configured and has a
    state, are copies, where that is possible."""
    twin = copy.copy(pipe)
    copies: dict[int, Any] = {}
    for name, value in vars(pipe).items():
        if _has_state(value):
            made = copies.setdefault(id(value), independent_copy(value))
            vars(twin)[name] = value if made is None else made
    return twin


def _has_state(value: Any) -> bool:
    """Whether a part of a pipeline may change in a call: schedulers and guiders are configured as networks are."""
    return not isinstance(value, torch.nn.Module) and callable(getattr(type(value), "register_to_config", None))


class Cancellation:
    """Whether the user asked for the end of a run, as the pipelines of diffusers are asked: by ``pipe._interrupt``.

    Args:
        pipe: the user's pipeline. A request that is left from another run is forgotten, as each call of it does.
        twin: what is called in its place, and what callbacks are given.
    """

    def __init__(self, pipe: Any, twin: Any) -> None:
        self._pipes = (pipe, twin)
        for one in self._pipes:
            forget_cancelling(one)

    @property
    def asked(self) -> bool:
        """Whether it was asked for since."""
        return any(map(is_cancelled, self._pipes))


def check_untouched(pipe: Any, twin: Any, before: Mapping[str, Any]) -> None:
    """Refuse a callback that sets arguments of the run on the user's pipeline: the run would not follow.

    Args:
        pipe: the user's pipeline.
        twin: what is called in its place.
        before: the ``noted_arguments`` of ``pipe`` before the callback.

    Raises:
        PipelineError: naming the attribute.
    """
    missing = object()
    for name, value in noted_arguments(pipe).items():
        simple = isinstance(value, (bool, int, float, str, type(None)))
        if simple and name in vars(twin) and value not in (before.get(name, missing), vars(twin)[name]):
            raise PipelineError(
                f"callback_on_step_end set {name} of the session's own pipeline to {value!r}; the run is that of the "
                "pipeline which the callback is given as its first argument: set it there"
            )
