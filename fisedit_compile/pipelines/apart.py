"""Compiling a network apart from whatever else is compiled in the process."""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Callable, Hashable
from types import CellType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch

from fisedit_compile.private.dynamo import OptimizedModule


def _call(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does what another one does, with a frame of its own. Its arguments are named by keywords."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call


class OwnCode:
    """A function's code that nothing else in the process has, for Dynamo to keep the graphs of one network on.

    Dynamo keeps graphs on code objects, which all networks of a class share, and decorated forwards of several classes
    too. Functions made here of one network share its graphs.
    """

    def __init__(self) -> None:
        self._code = _call(_call).__code__.replace(co_name="fisedit_network")
        # Dynamo puts graphs among a function's globals.
        self._globals: dict[str, Any] = {"__builtins__": builtins, "__name__": __name__}

    def compile_whole(self, module: torch.nn.Module, backend: str, options: dict[str, Any]) -> Callable[..., Any]:
        """The module compiled as a single graph, its hooks included; calls raise one of ``GRAPH_BREAKS``, before
        anything was computed, where it is none."""
        # The cell is of the variable ``function``.
        function = FunctionType(self._code, self._globals, "fisedit_network", None, (CellType(module),))
        compiled: Callable[..., Any] = torch.compile(function, backend=backend, options=options, fullgraph=True)
        return compiled


_apart: WeakKeyDictionary[type, dict[tuple[str, Hashable], Any]] = WeakKeyDictionary()
"""What ``compile_apart`` made of the first network of a class."""


def compile_apart(module: torch.nn.Module, backend: str, options: dict[str, Any], key: Hashable) -> Any:
    """The module compiled as ``torch.compile`` does, but apart, where PyTorch can do that (2.13): its graphs are used
    for nothing but what was compiled here, and no limit counts them with others.

    Networks of one class share graphs. Were each compiled by itself, graphs on their common functions would become
    more with each network, for as long as the process lives.

    Args:
        module: the network.
        backend: a name.
        options: of the backend.
        key: equal for equal options.

    Returns:
        An ``OptimizedModule``; the module itself where Dynamo is switched off.
    """
    contexts = _apart.setdefault(type(module), {})
    if (backend, key) in contexts:
        return contexts[backend, key](module)
    settings: dict[str, Any] = {}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        settings["isolate_recompiles"] = True
    compiled = torch.compile(module, backend=backend, options=options, **settings)
    if isinstance(compiled, OptimizedModule):
        contexts[backend, key] = compiled.dynamo_ctx
    return compiled
