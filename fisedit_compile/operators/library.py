"""Registration of the ``fisedit`` operators: schema, one ATen implementation for every device, shape function."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

LIBRARY = torch.library.Library("fisedit", "DEF")

# Operator overload -> the plain function behind it, for code that calls operators without the dispatcher.
IMPLEMENTATIONS: dict[Callable, Callable] = {}

Implementation = TypeVar("Implementation", bound=Callable)


def operator(signature: str, shape: Callable) -> Callable[[Implementation], Implementation]:
    """Register the decorated function as ``fisedit::<its name>``.

    Args:
        signature: the schema behind the name, ``(Tensor map, Tensor index) -> Tensor``. All operators are functional.
        shape: takes the same arguments and returns empty tensors of the result's shape, dtype and strides.

    Returns:
        A decorator that returns the function itself, so calling it by name does not pass through the dispatcher.
    """

    def register(implementation: Implementation) -> Implementation:
        name = implementation.__name__
        # The implementations take any strides, so a compiler is free to choose a layout for their inputs.
        tags = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
        LIBRARY.define(name + signature, tags=tags)
        LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fisedit::{name}", shape, lib=LIBRARY)
        IMPLEMENTATIONS[getattr(torch.ops.fisedit, name).default] = implementation
        return implementation

    return register
