"""What the phases of a runtime share, and how a new base is filled."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fisedit_compile.errors import FisEditError, GraphError
from fisedit_compile.runtime import tiers
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
from fisedit_compile.runtime.filling import FillingCall
from fisedit_compile.runtime.fingerprint import Weights
from fisedit_compile.runtime.plancache import PlanCache
from fisedit_compile.runtime.spec import Site
from fisedit_compile.runtime.stats import StatsCounter
from fisedit_compile.runtime.tiers import Lane


class Store:
    """What all phases of a runtime share: its bases, settings, ledger, counters, plans and lanes.

    ``tier``: where recordings are kept, see :mod:`fisedit_compile.runtime.tiers`. ``ledger``: the one of another store,
    when both count towards one budget; None: its own. ``reclaim`` makes room in the budget by dropping what can be done
    without, and says whether there was something to drop.
    """

    def __init__(
        self, storage: torch.dtype | None, budget: int | None, ledger: Ledger | None = None, tier: str = "device"
    ) -> None:
        self.bases: dict[str, Base] = {}
        self.storage = storage
        self.tier = tier
        self._lanes: dict[torch.device, Lane | None] = {}
        self._lock = threading.Lock()
        self.ledger = ledger if ledger is not None else Ledger(budget)
        self.counter = StatsCounter()
        self.plans = PlanCache(self.counter)
        self.reclaim: Callable[[], bool] = lambda: False

    def lane(self, device: torch.device) -> Lane | None:
        """What brings recordings from a device to the host and back; None: they stay where they are."""
        if self.tier == "device":
            return None
        with self._lock:
            if device not in self._lanes:
                self._lanes[device] = tiers.lane_for(device)
            return self._lanes[device]

    def finish(self) -> None:
        """Wait until all recordings are where they are kept."""
        with self._lock:
            lanes = list(self._lanes.values())
        for lane in lanes:
            if lane is not None:
                lane.finish()


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
        lane: Lane | None = None,
    ) -> None:
        """Take ownership of a call's tensors. Those whose ``id`` is in ``shared`` belong to another base already and
        are kept as they are, brought by ``lane`` where they lie on the host. What ``reserve`` set aside is given back.

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
        for tensor in owned.values():
            lane = lane or self._store.lane(tensor.device)
        if lane is not None:
            owned = tiers.offload(owned, lane)
        call = RecordedCall(owned, scalars, lane)
        self.base.recordings.setdefault(key, Recording(weights)).calls.append(call)
        self._store.ledger.retain(call.stored())
        self.reserve(0, f"base {self.base.name!r}")

    def keep(self, filling: FillingCall) -> None:
        """Keep what the call that was appended last was given.

        Raises:
            BudgetError: it takes more than the budget leaves.
        """
        self.base.filling.append(filling)
        self._store.ledger.retain(filling.tensors())
        self.reserve(0, f"base {self.base.name!r}")

    def discard(self) -> None:
        """Drop the unfinished base."""
        self._unreserve()
        self._store.ledger.release(self.base.tensors())
        self.base.recordings.clear()
        self.base.filling.clear()

    def _unreserve(self) -> None:
        self._store.ledger.unreserve(self._reserved)
        self._reserved = 0
