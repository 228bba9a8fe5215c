"""The calls of what the user compiled. A backend is told of graphs, not of calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FrameType

from fisedit_compile.private.dynamo import CompiledCalls, wrapper_codes

Enter = Callable[[], Callable[[], None]]
"""Called before a call of something compiled; what it returns is called behind it."""

_WRAPPERS = wrapper_codes()


def on_calls(enter: Enter) -> None:
    """Call ``enter`` with every later call of what the calling thread is in a call of, as ``torch.compile`` returned
    it; asking for an equal one again changes nothing.

    A call that Dynamo runs eagerly never comes to the backend.
    """
    frame: FrameType | None = inspect.currentframe()
    while frame is not None and frame.f_code not in _WRAPPERS:
        frame = frame.f_back
    if frame is not None:
        context = frame.f_locals.get("self")
        if isinstance(context, CompiledCalls) and enter not in context.enter_exit_hooks:
            context.enter_exit_hooks.append(enter)
