"""Read a node's arguments by the names of the operator's schema."""

from __future__ import annotations

from typing import Any

from torch import fx

from fisedit_compile.private.operators import schema_of


def read_arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of a call to an operator by name, defaults filled in."""
    schema = schema_of(node.target)
    values = {argument.name: argument.default_value for argument in schema.arguments}
    values.update(zip((argument.name for argument in schema.arguments), node.args, strict=False))
    values.update(node.kwargs)
    return values


def pair(value: Any) -> tuple[int, int]:
    """An int, or a list of one or two ints, as (vertical, horizontal)."""
    values = [int(item) for item in value] if isinstance(value, (list, tuple)) else [int(value)]
    return (values[0], values[-1])
