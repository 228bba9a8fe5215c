"""What PyTorch keeps of an operator of its own, such as ``torch.ops.aten.add.Tensor``."""

from __future__ import annotations

from typing import Any


def schema_of(operator: Any) -> Any:
    """The schema of an operator: its ``arguments``, ``returns`` and ``is_mutable``; None for what is no operator."""
    return getattr(operator, "_schema", None)


def short_name(operator: Any) -> str:
    """The name of an operator without library and overload, such as ``add_``; "" for what is no operator."""
    name: str = getattr(operator, "_opname", "")
    return name
