"""That PyTorch's compiler fails inside record and edit where it would silently run eagerly what it should compile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from fisedit_compile.errors import CallMismatchError, FisEditError
from fisedit_compile.private import dynamo

#: Fewest graphs of one function that may be made inside record and edit.
GRAPHS = 64


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
        self._held = ContextVar("fisedit_held_settings", default=None) if dynamo.SETTINGS_PER_THREAD else _ForProcess()

    def enter(self, make: Callable[[], Mapping[str, Any]]) -> None:
        """Need the settings that ``make`` returns, which is asked only where nobody needs any yet."""
        with self._lock:
            held = self._held.get()
            if held is None:
                values = make()
                held = _Held(0, values, dynamo.change_settings(values))
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
                if dynamo.setting(name) == held.values[name]:
                    restore()


_settings = _HeldSettings()


def _strict() -> dict[str, Any]:
    limit = max(GRAPHS, dynamo.setting("recompile_limit"))
    settings: dict[str, Any] = {"recompile_limit": limit, "fail_on_recompile_limit_hit": True, "suppress_errors": False}
    if dynamo.INTEGERS_CHOOSE_GRAPHS:
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
    except dynamo.FailOnRecompileLimitHit as error:
        limit = dynamo.setting("recompile_limit")
        raise CallMismatchError(
            f"the compiler reached its limit of {limit} graphs for one function, so this call would not have been "
            f"recorded or edited. Expected at most {limit} combinations of sizes and Python arguments",
            advice="call torch._dynamo.reset(), or raise torch._dynamo.config.recompile_limit, and pass changing "
            "numbers as tensors",
        ) from error
    except dynamo.BackendCompilerFailed as error:
        if isinstance(error.inner_exception, FisEditError):
            raise error.inner_exception from error
        raise
    finally:
        _settings.leave()
