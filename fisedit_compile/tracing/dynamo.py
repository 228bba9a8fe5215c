"""How Dynamo is asked to compile: its settings, the calls of what it compiled, and where it keeps graphs.

Beside ``private.py`` the only file that imports private PyTorch APIs; it knows no graphs, so that the runtime may use
it. What the rest of the package needs:

* making Dynamo fail, instead of silently running eagerly, once it compiled too many graphs (``strict_recompiles``);
* seeing the calls of what the user compiled (``on_calls``);
* compiling a network apart from whatever else is compiled in the process (``OwnCode``, ``compile_apart``).
"""

from __future__ import annotations

import builtins
import inspect
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import CellType, CodeType, FrameType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch._dynamo.config
from torch._dynamo.eval_frame import OptimizedModule, _TorchDynamoContext
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, Unsupported, UserError

from fisedit_compile.errors import CallMismatchError, FisEditError


def _entry(name: str) -> Any:
    """What Dynamo keeps of a setting."""
    config: Any = torch._dynamo.config
    return config._config[name]


#: Whether it depends on the value alone, inside ``strict_recompiles``, which graph Dynamo runs for a Python int: the
#: graph it made dynamic leaves the first value to the graph that it specialised on it.
INTEGERS_CHOOSE_GRAPHS = hasattr(torch._dynamo.config, "automatic_dynamic_exclusion_guard")
#: Whether a setting that one thread makes holds for that thread alone.
SETTINGS_PER_THREAD = isinstance(_entry("recompile_limit").user_override, ContextVar)
#: Fewest graphs of one function that may be made inside record and edit.
GRAPHS = 64
#: What compiling with ``fullgraph=True`` raises for a network that is not one graph.
GRAPH_BREAKS = (Unsupported, UserError)

Enter = Callable[[], Callable[[], None]]
"""Called before a call of something compiled; what it returns is called behind it."""


@dataclass(frozen=True)
class _Held:
    """Settings that somebody needs: how many do, their values, and for each what puts the former one back."""

    holders: int
    values: Mapping[str, Any]
    restore: Mapping[str, Callable[[], None]]


class _ForProcess:
    """What a ``ContextVar`` is for a thread, for the whole process."""

    def __init__(self) -> None:
        self._value: _Held | None = None

    def get(self) -> _Held | None:
        """What was set last."""
        return self._value

    def set(self, value: _Held | None) -> None:
        """Set it."""
        self._value = value


class _HeldSettings:
    """Settings of Dynamo that hold for as long as anybody needs them.

    Each context that patched the settings for itself would put back what it found, also where another one, which began
    later and ends later, still needs them; and that one would then put back what the first had set, for good. So the
    first to come sets them and the last to go puts the former ones back: for each thread where PyTorch keeps settings
    so, and else for the process.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._held: ContextVar[_Held | None] | _ForProcess
        self._held = ContextVar("fisedit_held_settings", default=None) if SETTINGS_PER_THREAD else _ForProcess()

    def enter(self, make: Callable[[], Mapping[str, Any]]) -> None:
        """Need the settings that ``make`` returns, which is asked only where nobody needs any yet."""
        with self._lock:
            held = self._held.get()
            if held is None:
                values = make()
                config: Any = torch._dynamo.config
                restore = {name: config._make_closure_patcher(**{name: value})() for name, value in values.items()}
                held = _Held(0, values, restore)
            self._held.set(replace(held, holders=held.holders + 1))

    def leave(self) -> None:
        """Need them no longer."""
        with self._lock:
            held = self._held.get()
            if held is None:  # entered in another thread
                return
            if held.holders > 1:
                self._held.set(replace(held, holders=held.holders - 1))
                return
            self._held.set(None)
            for name, restore in held.restore.items():
                # What the user has set meanwhile stays.
                if getattr(torch._dynamo.config, name) == held.values[name]:
                    restore()


_settings = _HeldSettings()


def _strict() -> dict[str, Any]:
    limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    settings: dict[str, Any] = {"recompile_limit": limit, "fail_on_recompile_limit_hit": True, "suppress_errors": False}
    if INTEGERS_CHOOSE_GRAPHS:
        # Otherwise which of two graphs runs depends on which ran last, and edits do not line up with recordings.
        settings["automatic_dynamic_exclusion_guard"] = True
    return settings


@contextmanager
def strict_recompiles() -> Iterator[None]:
    """Inside, Dynamo raises when it reaches its limit of graphs for one function, which is at least ``GRAPHS``: each
    size of a picture needs one.

    Otherwise it would silently run that function eagerly: calls would be missing from a recording, and an edit would
    compute a picture that ignores the mask. An error of this package raised while a graph is compiled leaves as itself.
    Contexts may end in any order.

    Raises:
        CallMismatchError: the limit was reached.
    """
    _settings.enter(_strict)
    try:
        yield
    except FailOnRecompileLimitHit as error:
        limit = torch._dynamo.config.recompile_limit
        raise CallMismatchError(
            f"the compiler reached its limit of {limit} graphs for one function, so this call would not have been "
            f"recorded or edited. Expected at most {limit} combinations of sizes and Python arguments",
            advice="call torch._dynamo.reset(), or raise torch._dynamo.config.recompile_limit, and pass changing "
            "numbers as tensors",
        ) from error
    except BackendCompilerFailed as error:
        if isinstance(error.inner_exception, FisEditError):
            raise error.inner_exception from error
        raise
    finally:
        _settings.leave()


def _wrapper_codes() -> frozenset[CodeType]:
    """The code of the functions that ``torch.compile`` returns; all closures of one function share it."""
    constants = _TorchDynamoContext.__call__.__code__.co_consts
    return frozenset(code for code in constants if isinstance(code, CodeType) and "kwargs" in code.co_varnames)


_WRAPPERS = _wrapper_codes()


def on_calls(enter: Enter) -> None:
    """Call ``enter`` with every later call of what the calling thread is in a call of, as ``torch.compile`` returned
    it; asking for an equal one again changes nothing.

    A backend is told of graphs, not of calls; a call that Dynamo runs eagerly never comes to it.
    """
    frame: FrameType | None = inspect.currentframe()
    while frame is not None and frame.f_code not in _WRAPPERS:
        frame = frame.f_back
    if frame is not None:
        context = frame.f_locals.get("self")
        if isinstance(context, _TorchDynamoContext) and enter not in context.enter_exit_hooks:
            context.enter_exit_hooks.append(enter)


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
