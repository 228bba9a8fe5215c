"""What was done to a network from outside: caches, token merging, exchanged methods, another layout of its weights.

All of it changes what the network computes or in which calls, so that an edit no longer lines up with the recorded run.
It is noticed before the edit, and named.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fisedit_compile.errors import PipelineError
from fisedit_compile.private.diffusers import cache_settings, hook_names

_AGAIN = "or call generate again with the network as it is now"

_KNOWN = (
    ("deepcache", "DeepCache", "switch it back with disable() or enable() of its helper"),
    ("tomesd", "token merging (tomesd)", "switch it back with tomesd.remove_patch(pipe) or tomesd.apply_patch(pipe)"),
    ("tomeblock", "token merging", "take its patch away, or apply it as it was"),
    ("peft.", "an adapter (LoRA)", "bring it back to what it was, as by pipe.unload_lora_weights()"),
)
"""By a part of the name of a patch or a class: what it is called, and how it is undone."""


@dataclass(frozen=True)
class _Part:
    """One module of a network: its class, what stands in the place of its ``forward``, its hooks of diffusers, and the
    strides of its own weights."""

    kind: type[nn.Module]
    patch: Any
    hooks: tuple[str, ...]
    strides: tuple[tuple[int, ...], ...]


class NetworkState:
    """A network and what was done to it, as it is now.

    Args:
        network: of a pipeline.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._cache = _cache(network)
        self._parts = dict(_parts(network))

    def check(self, network: nn.Module) -> None:
        """Refuse another network than this one, or one that something was done to since.

        Raises:
            PipelineError: naming what, and how to undo it.
        """
        if network is not self._network:
            raise PipelineError("the pipeline has another network than when the picture was generated; generate again")
        now = NetworkState(network)
        if self._cache != now._cache:
            raise PipelineError(_of_caches(self._cache, now._cache))
        for name, part in now._parts.items():
            reason = _difference(name, self._parts.get(name, part), part)
            if reason is not None:
                raise PipelineError(f"{reason}, {_AGAIN}")


def _cache(network: Any) -> str | None:
    """The class of the settings of diffusers' cache; None: it is off."""
    settings = cache_settings(network)
    return None if settings is None else type(settings).__name__.removesuffix("Config")


def _of_caches(before: str | None, now: str | None) -> str:
    states = ["off" if state is None else f"on ({state})" for state in (before, now)]
    undo = "disable_cache()" if before is None else "enable_cache(...)"
    return (
        f"diffusers' cache was {states[0]} when the picture was generated and is {states[1]} now, and with it what the "
        f"network computes in each call; switch it back with {undo} of the network, {_AGAIN}"
    )


def _parts(network: nn.Module) -> Iterator[tuple[str, _Part]]:
    for name, module in network.named_modules():
        strides = tuple(
            tuple(step for size, step in zip(weight.shape, weight.stride(), strict=True) if size > 1)
            for weight in module.parameters(recurse=False)
            if weight.layout is torch.strided
        )
        patch = vars(module).get("forward")
        if getattr(patch, "__func__", None) is type(module).forward:
            # What hooks of diffusers leave behind when they are removed.
            patch = None
        yield name, _Part(type(module), patch, hook_names(module), strides)


def _difference(name: str, before: _Part, now: _Part) -> str | None:
    """In words, what was done to a module, and how to undo it."""
    where = f"the layer {name} of the network" if name else "the network"
    since = "since the picture was generated"
    changed = None
    if before.kind is not now.kind:
        changed = f"the class of {where} was {before.kind.__name__} and is {now.kind.__name__}"
    elif before.patch is not now.patch and before.hooks == now.hooks:
        changed = f"the forward of {where} was {_origin(before.patch)} and is {_origin(now.patch)}"
    if changed is not None:
        title, undo = _known(before, now) or ("a part of the network", "put it back")
        return f"{title} was changed {since} ({changed}); {undo}"
    if before.hooks != now.hooks:
        hooks = " and are ".join(", ".join(part.hooks) or "none" for part in (before, now))
        return f"hooks of diffusers were added or removed {since} (those of {where} were {hooks}); put them back"
    if before.strides != now.strides and len(before.strides) == len(now.strides):
        return (
            f"the memory format of weights was changed {since} (in {where}, strides were {before.strides} and are "
            f"{now.strides}); bring them back with network.to(memory_format=...)"
        )
    return None


def _known(before: _Part, now: _Part) -> tuple[str, str] | None:
    """What a patch is called and how it is undone, where it is one that is known."""
    names = [_origin(part.patch) for part in (before, now)]
    names += [f"{part.kind.__module__}.{part.kind.__qualname__}" for part in (before, now)]
    text = " ".join(names).lower()
    return next(((title, undo) for key, title, undo in _KNOWN if key in text), None)


def _origin(patch: Any) -> str:
    """Where a method comes from."""
    if patch is None:
        return "its own"
    function = getattr(patch, "func", patch)
    described = function if hasattr(function, "__qualname__") else type(function)
    return f"{described.__module__}.{described.__qualname__}"
