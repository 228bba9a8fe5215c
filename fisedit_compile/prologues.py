"""Tensors computed from parameters only (packed weights), kept as long as the parameters live and stay unchanged."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from fisedit_compile.runtime import Fingerprint, ProgramKey

#: Graphs whose hoisted tensors are kept; the one used longest ago goes first.
KEPT = 8


@dataclass(frozen=True)
class _Entry:
    """Hoisted tensors, and what tells whether they still belong to the parameters."""

    parameters: tuple[weakref.ref[Tensor], ...]
    versions: tuple[int, ...]
    fingerprint: str
    tensors: tuple[Tensor, ...]


def _versions(parameters: Sequence[Tensor]) -> tuple[int, ...]:
    """How often each parameter was changed in place; inference tensors do not count."""
    return tuple(-1 if parameter.is_inference() else parameter._version for parameter in parameters)


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
            key: the graph and the identities of its parameters.
            parameters: the parameters that ``compute`` reads.
            fingerprint: of the graph's parameters as they are now.
            compute: makes the tensors.
        """
        versions = _versions(parameters)
        with self._lock:
            entry = self._entries.get(key)
            if (
                entry is not None
                and entry.versions == versions
                and entry.fingerprint == fingerprint.digest
                and all(reference() is given for reference, given in zip(entry.parameters, parameters, strict=True))
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
