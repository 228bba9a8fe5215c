"""What PyTorch keeps of a module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

COMPILED_MARK = "_is_torch_compile"
"""The attribute that PyTorch sets on a module that was given to ``torch.compile``."""

_COLLECTING = "transformers.utils.output_capturing"

_TENSORS = ("_parameters", "_buffers")


def original_module(module: Any) -> Any:
    """The module inside of one that ``torch.compile`` returned; any other as it is."""
    return getattr(module, "_orig_mod", module)


def compiled_call(module: nn.Module) -> Any:
    """What a call of the module comes to, where its own ``compile()`` was called; else None."""
    return getattr(module, "_compiled_call_impl", None)


def has_foreign_hooks(module: nn.Module) -> bool:
    """Whether hooks of others have a part in a call of the module; those with which transformers collects what its
    layers return are its own."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(getattr(hook, "__module__", None) != _COLLECTING for hook in hooks)


def attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The attributes of a module by name, its modules and hooks too, but not its own parameters and buffers."""
    return ((name, value) for name, value in vars(module).items() if name not in _TENSORS)
