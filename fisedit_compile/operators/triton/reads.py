"""Where the taps of stencils read, worked out once for each mask."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fisedit_compile.operators.triton.devices import captured
from fisedit_compile.private.tensors import version_of


def resolve_reads(halo: Tensor, table: Tensor, source_count: int) -> Tensor:
    """One number for each tap in place of table and halo: int32 ``[1 or B, N, K]``.

    Below ``source_count`` it is a row, from there on ``source_count`` plus a position of the recorded map, and -1 for
    taps outside. Kernels then wait for one load before they know an address, not for two.
    """
    last = source_count + halo.shape[1]
    if halo.shape[1] == 0:
        return torch.where(table < last, table, -1).to(torch.int32)
    slot = (table - source_count).clamp(0, halo.shape[1] - 1)
    position = halo.expand(slot.shape[0], -1).gather(1, slot.flatten(1)).view_as(slot) + source_count
    return torch.where(table < source_count, table, position.masked_fill(table >= last, -1)).to(torch.int32)


#: By ``id`` of the table: table, halo, their state, and what they were resolved to.
Entries = dict[int, tuple[weakref.ref[Tensor], weakref.ref[Tensor], tuple[int, ...], Tensor]]


class ReadsCache:
    """Resolved reads by table and halo, for as long as the table lives; all convolutions of a stencil share them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shared: Entries = {}
        self._local = threading.local()

    @property
    def _entries(self) -> Entries:
        own: Entries | None = getattr(self._local, "entries", None)
        return self._shared if own is None else own

    @contextmanager
    def fresh(self) -> Iterator[None]:
        """Compute everything anew in this thread: while launches are captured, so that resolving is captured too and
        every replay resolves what its tables hold by then."""
        before = getattr(self._local, "entries", None)
        self._local.entries = {}
        try:
            yield
        finally:
            self._local.entries = before

    def get(self, halo: Tensor, table: Tensor, source_count: int) -> Tensor:
        """The result of :func:`resolve_reads`, computed once for tensors that do not change."""
        key, state = id(table), (source_count, version_of(halo), version_of(table))
        entries = self._entries
        with self._lock:
            entry = entries.get(key)
        if entry is not None and entry[0]() is table and entry[1]() is halo and entry[2] == state:
            return entry[3]
        reads = resolve_reads(halo, table, source_count)
        if entries is self._shared and captured(table):
            # Somebody else captures: there is nothing in this memory before their replay.
            return reads

        def forget(reference: weakref.ref[Tensor]) -> None:
            # Another table may have the same id by now.
            known = entries.get(key)
            if known is not None and known[0] is reference:
                entries.pop(key, None)

        with self._lock:
            entries[key] = (weakref.ref(table, forget), weakref.ref(halo), state, reads)
        return reads

    def __len__(self) -> int:
        return len(self._entries)


reads_cache = ReadsCache()
