"""What the phases of a runtime share, and how a new base is filled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fisedit_compile.errors import FisEditError, GraphError
from fisedit_compile.runtime.base import (
    Base,
    Ledger,
    ProgramKey,
    RecordedCall,
    Recording,
    Scalar,
    own_tensor,
    storage_of,
)
from fisedit_compile.runtime.fingerprint import Weights
from fisedit_compile.runtime.plancache import PlanCache
from fisedit_compile.runtime.spec import Site
from fisedit_compile.runtime.stats import StatsCounter


class Store:
    """What all phases of a runtime share: its bases, settings, ledger, counters and plans.

    ``ledger``: the one of another store, when both count towards one budget; None: its own. ``reclaim`` makes room in
    the budget by dropping what can be done without, and says whether there was something to drop.
    """

    def __init__(self, storage: torch.dtype | None, budget: int | None, ledger: Ledger | None = None) -> None:
        self.bases: dict[str, Base] = {}
        self.storage = storage
        self.ledger = ledger if ledger is not None else Ledger(budget)
        self.counter = StatsCounter()
        self.plans = PlanCache(self.counter)
        self.reclaim: Callable[[], bool] = lambda: False


class BaseWriter:
    """Fills a new base call by call and keeps the ledger true; nobody sees the base before it is complete."""

    def __init__(self, store: Store, base: Base) -> None:
        self.base = base
        self._store = store
        self._reserved = 0

    def reserve(self, needed: int, purpose: str) -> None:
        """Check the budget for ``needed`` more bytes and set them aside; on failure the unfinished base is dropped.

        Raises:
            BudgetError: with the numbers.
        """
        existing = tuple(self._store.bases)
        try:
            self._store.ledger.reserve(needed, purpose, existing)
        except FisEditError:
            if not self._store.reclaim():
                self.discard()
                raise
            self.reserve(needed, purpose)
            return
        self._reserved += needed

    def append(
        self,
        key: ProgramKey,
        weights: Weights,
        scalars: tuple[Scalar, ...],
        tensors: Mapping[str, Tensor],
        sites: Sequence[Site],
        protected: Sequence[Tensor],
        shared: frozenset[int] = frozenset(),
    ) -> None:
        """Take ownership of a call's tensors. Those whose ``id`` is in ``shared`` belong to another base already and
        are kept as they are. What ``reserve`` set aside is given back.

        Raises:
            GraphError: the tensors are not those of the sites.
            BudgetError: they take more than the budget leaves.
        """
        if tensors.keys() != {site.name for site in sites}:
            raise GraphError(
                f"the call must store the sites {sorted(site.name for site in sites)}, got {sorted(tensors)}"
            )
        memory = frozenset(storage_of(tensor) for tensor in protected)
        owned: dict[str, Tensor] = {}
        known: dict[tuple[object, ...], Tensor] = {}
        for site in sites:
            tensor = tensors[site.name]
            if id(tensor) in shared:
                owned[site.name] = tensor
                continue
            if tuple(tensor.shape) != site.shape:
                raise GraphError(f"site {site.name} has shape {list(site.shape)}, got {list(tensor.shape)}")
            place = (storage_of(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
            form = (*place, site.kind, site.order)
            if form not in known:
                known[form] = own_tensor(tensor, site, self._store.storage, memory)
            owned[site.name] = known[form]
        self._unreserve()
        call = RecordedCall(owned, scalars)
        self.base.recordings.setdefault(key, Recording(weights)).calls.append(call)
        self._store.ledger.retain(call.stored())
        self.reserve(0, f"base {self.base.name!r}")

    def discard(self) -> None:
        """Drop the unfinished base."""
        self._unreserve()
        self._store.ledger.release(self.base.tensors())
        self.base.recordings.clear()

    def _unreserve(self) -> None:
        self._store.ledger.unreserve(self._reserved)
        self._reserved = 0
