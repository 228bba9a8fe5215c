"""What accelerate keeps of a module that it moves between devices."""

from __future__ import annotations

from typing import Any


def is_offloaded(module: Any) -> bool:
    """Whether a hook of accelerate brings the module to its device for each call, and away again."""
    return getattr(module, "_hf_hook", None) is not None
