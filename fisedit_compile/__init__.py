"""A ``torch.compile`` backend that makes a second run of a network compute only the region that changes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fisedit_compile import errors
    from fisedit_compile.pipelines import EditSession, difference_mask
    from fisedit_compile.reporting.explain import explain
    from fisedit_compile.runtime import Runtime, default_runtime

    __version__: str

__all__ = ["EditSession", "Runtime", "__version__", "default_runtime", "difference_mask", "errors", "explain"]

# Nothing below is imported before it is used: the command line must answer --help at once.
_SOURCES = {
    "EditSession": "fisedit_compile.pipelines",
    "Runtime": "fisedit_compile.runtime",
    "default_runtime": "fisedit_compile.runtime",
    "difference_mask": "fisedit_compile.pipelines",
    "explain": "fisedit_compile.reporting.explain",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        value: object = importlib.import_module("importlib.metadata").version("fisedit-compile")
    elif name == "errors":
        value = importlib.import_module("fisedit_compile.errors")
    elif name in _SOURCES:
        value = getattr(importlib.import_module(_SOURCES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
