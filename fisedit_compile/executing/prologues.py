"""Tensors that need not be computed at every call, kept for as long as what they were computed from stays the same.

``PrologueCache`` keeps what depends on parameters only (packed weights) while the parameters live, ``InvariantMemo``
what depends on inputs such as the prompt for the time of one edit.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.private.tensors import version_of
from fisedit_compile.runtime import Fingerprint, ProgramKey
from fisedit_compile.runtime.fingerprint import has_identity

#: Graphs whose hoisted tensors are kept; the one used longest ago goes first.
KEPT = 8


@dataclass(frozen=True)
class _Entry:
    """Hoisted tensors, and what tells whether they still belong to the parameters that have an identity; those that
    have none are told by the key."""

    parameters: tuple[weakref.ref[Tensor], ...]
    versions: tuple[int, ...]
    fingerprint: str
    tensors: tuple[Tensor, ...]


def _versions(parameters: Sequence[Tensor]) -> tuple[int, ...]:
    """How often each parameter was changed in place; inference tensors do not count."""
    return tuple(version_of(parameter) for parameter in parameters)


class PrologueCache:
    """Hoisted tensors by graph and parameters. May be used by several threads; holds parameters weakly."""

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._lock = threading.Lock()
        self._entries: OrderedDict[ProgramKey, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(
        self,
        key: ProgramKey,
        parameters: Sequence[Tensor],
        fingerprint: Fingerprint,
        compute: Callable[[], Sequence[Tensor]],
    ) -> tuple[Tensor, ...]:
        """The hoisted tensors of a graph; computed when there are none, or none for these parameters.

        Args:
            key: the graph and the identities of its parameters, by content for those that have none of their own.
            parameters: the parameters that ``compute`` reads.
            fingerprint: of the graph's parameters as they are now.
            compute: makes the tensors.
        """
        parameters = [parameter for parameter in parameters if has_identity(parameter)]
        versions = _versions(parameters)
        with self._lock:
            entry = self._entries.get(key)
            if (
                entry is not None
                and entry.versions == versions
                and entry.fingerprint == fingerprint.digest
                and all(reference() is held for reference, held in zip(entry.parameters, parameters, strict=True))
            ):
                self._entries.move_to_end(key)
                return entry.tensors
            self._entries.pop(key, None)
        tensors = tuple(compute())

        def forget(_: object) -> None:
            # Called by the garbage collector, possibly while this thread holds the lock: popping needs none.
            self._entries.pop(key, None)

        references = tuple(weakref.ref(parameter, forget) for parameter in parameters)
        with self._lock:
            self._entries[key] = _Entry(references, versions, fingerprint.digest, tensors)
            while len(self._entries) > self._kept:
                self._entries.popitem(last=False)
        return tensors

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()


#: Shared by all compiled graphs: grad and no-grad versions of one graph use the same packed weights.
prologues = PrologueCache()


#: Sets of inputs whose results one edit keeps: the two branches of guidance may come in calls of their own.
PROMPTS = 4


@dataclass(frozen=True)
class _Known:
    """Results, the inputs they belong to (held, so that no other tensor takes their place) and copies of these."""

    inputs: tuple[Any, ...]
    copies: tuple[Any, ...]
    results: tuple[Tensor, ...]


class InvariantMemo:
    """Results of a graph by the content of its inputs, for one edit of one thread."""

    def __init__(self, kept: int = PROMPTS) -> None:
        self._kept = kept
        self._known: list[_Known] = []

    def get(self, inputs: Sequence[Any], compute: Callable[[], Sequence[Tensor]]) -> tuple[Tensor, ...]:
        """The results for these inputs: kept ones when the inputs are the same, else from ``compute``.

        On the CPU inputs are the same when their content is. Elsewhere comparing content would wait for the device, so
        they must be the very tensors, not changed in place since.
        """
        for known in self._known:
            if all(map(_same, known.inputs, known.copies, inputs)):
                return known.results
        results = tuple(compute())
        self._known.append(_Known(tuple(inputs), tuple(map(_copy, inputs)), results))
        del self._known[: -self._kept]
        return results


def _copy(value: Any) -> Any:
    """What tells later whether an input is still the same: its content on the CPU, elsewhere its version."""
    if not isinstance(value, Tensor):
        return value
    if value.device.type == "cpu":
        return value.detach().clone()
    return None if value.is_inference() else version_of(value)


def _same(held: Any, copy: Any, given: Any) -> bool:
    if not isinstance(given, Tensor) or not isinstance(held, Tensor):
        return type(held) is type(given) and bool(copy == given)
    if isinstance(copy, Tensor):
        return (copy.shape, copy.dtype) == (given.shape, given.dtype) and torch.equal(copy, given)
    return held is given and copy is not None and copy == version_of(given)
