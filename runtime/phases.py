"""What a compiled graph asks during record and edit: which call is this, what was stored, where is the mask.

The protocol of one call inside ``record``::

    ordinal = phase.begin(key, parameters, scalars, runtime.bytes_needed(sites))
    ...                                   # run the record graph
    phase.commit(key, tensors, sites, protected)

and inside ``edit``::

    call = phase.begin(key, parameters, scalars, dense)  # dense: phase.dense_call, or the graph has another reason
    with phase.running(call, dense):      # the base's lock, timing, failure
        if dense: ...                     # run the dense graph; the record graph when phase.saving
        else:
            plan = phase.plan(PlanSpec(...))
            ...                           # None: return copies of the recorded outputs; else run the edit graph
        if phase.saving:
            phase.commit(key, tensors, sites, protected)
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from torch import Tensor

from fisedit_compile.errors import CallMismatchError, FisEditError, GraphError, ScalarMismatchError
from fisedit_compile.runtime.alignment import AttentionKeeping, Stabilising
from fisedit_compile.runtime.base import Base, ProgramKey, RecordedCall, Scalar
from fisedit_compile.runtime.filling import FillingCall
from fisedit_compile.runtime.fingerprint import Fingerprint, Weights
from fisedit_compile.runtime.masks import WHITE_THRESHOLD, MaskLike, prepare_mask
from fisedit_compile.runtime.plancache import PlanSpec
from fisedit_compile.runtime.plans import IndexPlan
from fisedit_compile.runtime.scalars import ScalarCheck, copy_scalar
from fisedit_compile.runtime.spec import Site
from fisedit_compile.runtime.stand_ins import StandIns
from fisedit_compile.runtime.store import BaseWriter, Store
from fisedit_compile.runtime.updates import updated_tensors


class _Phase:
    """What record and edit have in common: ordinals per graph, weights checked once per graph, failures remembered."""

    def __init__(self, store: Store, base: Base) -> None:
        self.base = base
        self._store = store
        self._ordinals: dict[ProgramKey, int] = {}
        self._failure: str | None = None

    @property
    def calls(self) -> int:
        """Graph calls so far, of all graphs together."""
        return sum(self._ordinals.values())

    def close(self) -> None:
        """Let go of all tensors when the context has ended: somebody may keep the ``run`` it gave."""
        self.base = Base(self.base.name)
        self._store = Store(None, None)

    def count_ways(self, ways: Mapping[str, int]) -> None:
        """Count in which ways operators of a call were computed."""
        self._store.counter.add_ways(ways)

    def fail(self, message: str) -> CallMismatchError:
        """Let nothing come of this context; the error to raise, should somebody catch it."""
        self._failure = message
        return CallMismatchError(message)

    def _require_sound(self) -> None:
        """After a failed call the ordinals of several graphs no longer belong together: nothing may follow."""
        if self._failure is not None:
            raise CallMismatchError(self._failure, advice="leave this context and start it again")


class RecordPhase(_Phase):
    """A thread is inside ``runtime.record``. ``attention`` says whether calls keep their attention maps."""

    def __init__(self, store: Store, name: str, attention_maps: bool = False) -> None:
        super().__init__(store, Base(name))
        self.attention = AttentionKeeping(attention_maps)
        self.writer = BaseWriter(store, self.base)
        self._weights: dict[ProgramKey, Weights] = {}
        self._filling: FillingCall | None = None
        self._open: tuple[ProgramKey, int, tuple[Scalar, ...], float] | None = None
        self.first_call: float | None = None

    def begin(
        self,
        key: ProgramKey,
        parameters: Sequence[Tensor],
        scalars: Sequence[Scalar],
        bytes_needed: int,
        fills: Callable[[int], FillingCall] | None = None,
    ) -> int:
        """Announce a call, before anything is computed.

        Args:
            key: the graph.
            parameters: its parameters and buffers, the very objects (they are held by weak references).
            scalars: its scalar inputs; copied.
            bytes_needed: what the call will store, see ``Runtime.bytes_needed``.
            fills: of a graph that changes what the network keeps: describes the call, given how many graph calls came
                before it. Asked at the graph's first call. What it keeps counts towards the budget as well.

        Returns:
            The call's ordinal, counted from 0 for every graph.

        Raises:
            BudgetError: the budget does not leave ``bytes_needed``; what was recorded so far is dropped.
            CallMismatchError: an earlier call failed.
        """
        started = time.perf_counter()
        self.first_call = self.first_call or started
        if self._open is not None:
            self._failure = f"call {self._open[1]} of {self._open[0]} began but stored nothing, so it must have failed"
        self._require_sound()
        ordinal = self._ordinals.get(key, 0)
        self._filling = fills(self.calls) if fills is not None and key not in self._weights else None
        if self._filling is not None:
            bytes_needed += self._filling.bytes
        try:
            self.writer.reserve(bytes_needed, f"recording call {ordinal} of {key} for base {self.base.name!r}")
        except FisEditError as error:
            self._failure = error.fact
            raise
        if key not in self._weights:
            self._weights[key] = Weights(parameters)
        self._open = (key, ordinal, tuple(copy_scalar(scalar) for scalar in scalars), started)
        return ordinal

    def commit(
        self, key: ProgramKey, tensors: Mapping[str, Tensor], sites: Sequence[Site], protected: Sequence[Tensor] = ()
    ) -> None:
        """Store what the announced call computed.

        Args:
            key: the graph of ``begin``.
            tensors: one for every site, by name; the phase takes ownership.
            sites: what they are.
            protected: the graph's inputs and the outputs that go to the caller; whatever shares memory with them
                is copied.

        Raises:
            BudgetError: the tensors take more than was announced and than the budget leaves.
        """
        if self._open is None or self._open[0] != key:
            raise GraphError(f"commit of {key} without begin")
        _, ordinal, scalars, started = self._open
        self.writer.append(key, self._weights[key], scalars, tensors, sites, protected)
        if self._filling is not None:
            self.writer.keep(self._filling)
        self._open = self._filling = None
        self._ordinals[key] = ordinal + 1
        self._store.counter.add_call("record", time.perf_counter() - started)

    def fingerprint(self, key: ProgramKey) -> Fingerprint:
        """The fingerprint of a graph's parameters in this context; known after ``begin``."""
        return self._weights[key].fingerprint

    def finish(self, calls: int | None) -> None:
        """Check, at the end of the context, that the recording is whole.

        Args:
            calls: how often the network was called, when the user said so. Each call runs one or more graphs.

        Raises:
            CallMismatchError: nothing was recorded, a call failed, the number of calls is another, or there were no
                attention maps to keep.
        """
        if self._open is not None:
            self._failure = f"call {self._open[1]} of {self._open[0]} failed while base {self.base.name!r} was recorded"
        self._require_sound()
        if self.calls == 0:
            raise CallMismatchError(
                f"nothing was recorded for base {self.base.name!r}: expected at least one call of a network compiled "
                f"with backend='fisedit' and this runtime, in this thread; got none",
                advice="check options={'runtime': ...}",
            )
        if calls is not None and (calls < 1 or self.calls % calls):
            raise CallMismatchError(
                f"base {self.base.name!r} was announced with {calls} calls, so a multiple of {calls} graph calls was "
                f"expected; got {self.calls} ({self.base.describe()})"
            )
        if self.attention.failure is not None:
            raise CallMismatchError(self.attention.failure, advice="record without attention_maps")

    def close(self) -> None:
        """See ``_Phase.close``."""
        super().close()
        self.writer = BaseWriter(self._store, self.base)
        self._open = self._filling = None


class EditPhase(_Phase):
    """A thread is inside ``runtime.edit``. ``full`` says whether everything is active, ``density`` how much is,
    ``stabilising`` what dense calls take from the recording."""

    def __init__(self, store: Store, base: Base, save_as: str | None) -> None:
        super().__init__(store, base)
        self.writer = None if save_as is None else BaseWriter(store, Base(save_as, parent=base))
        self._mask: Tensor | None = None
        self._plans: dict[PlanSpec, IndexPlan | None] = {}
        self._scalars = ScalarCheck(base.name)
        self._stand_ins = StandIns(store, base)
        self._weights: dict[ProgramKey, Weights] = {}
        self._begun: Counter[ProgramKey] = Counter()
        self._current: dict[ProgramKey, RecordedCall] = {}
        self._ahead: dict[ProgramKey, RecordedCall] = {}
        self._active = False
        self.stabilising = Stabilising(base)
        self.full = False
        self._closed = False
        self.density: float | None = None

    @property
    def mask(self) -> Tensor | None:
        """bool ``[1 or samples, height, width]`` as the user gave it; None: not known yet."""
        return self._mask

    @property
    def dense_call(self) -> bool:
        """Whether calls run densely, because the mask is not known yet."""
        return self._mask is None

    @property
    def saving(self) -> bool:
        """Whether the calls become a new base, so that every call must be committed."""
        return self.writer is not None

    def set_mask(self, mask: MaskLike, white_threshold: float = WHITE_THRESHOLD) -> None:
        """Use ``mask`` from the next call on.

        Raises:
            MaskError: see ``prepare_mask``. Its batch is checked when a network's batch is known: at the next call.
            OptionError: the threshold is not above 0 and up to 1.
        """
        if self._closed:
            raise FisEditError(f"the edit of base {self.base.name!r} has ended; give the mask inside the context")
        prepared = prepare_mask(mask, white_threshold).cpu()
        self._plans = {}
        self._mask = prepared
        self._active = bool(prepared.any())
        self.full = bool(prepared.all())
        self.density = float(prepared.float().mean())

    def begin(
        self, key: ProgramKey, parameters: Sequence[Tensor], scalars: Sequence[Scalar], dense: bool = False
    ) -> RecordedCall:
        """Announce a call and get what its counterpart stored.

        Args:
            key: the graph.
            parameters: its parameters and buffers, the very objects.
            scalars: its scalar inputs. On the CPU they are compared now, on other devices when the context ends.
            dense: the call runs densely although the mask is known, so nothing recorded is brought to the device.

        Raises:
            CallMismatchError: the base has no such graph, or fewer calls of it; or an earlier call failed.
            WeightsChangedError: see ``Weights.verify``; checked at the first call of each graph.
            ScalarMismatchError: a scalar differs.
            BudgetError: the call is dense and will be saved, and the budget does not leave what it stores.
        """
        self._require_sound()
        counted, recording = self._stand_ins.find(key, self.calls, self._ordinals)
        if recording is None:
            raise self._stand_ins.explained(self.base.unknown(key))
        if key not in self._weights:
            recording.weights.verify(parameters, self.base.name)
            self._weights[key] = recording.weights
        ordinal = self._ordinals.get(key, 0) if counted == key else 0
        if ordinal >= len(recording.calls):
            error = CallMismatchError(
                f"base {self.base.name!r} holds {len(recording.calls)} calls of {key}, and the edit makes one more",
                advice="edit with the number of steps the base was recorded with",
            )
            raise self._stand_ins.explained(error)
        call = recording.calls[ordinal]
        try:
            self._scalars.compare(f"call {ordinal} of {key}", call.scalars, scalars)
        except ScalarMismatchError as mismatch:
            self._stand_ins.explained(mismatch)
            raise
        if self.writer is not None and (dense or self.dense_call):
            self._reserve(call.bytes, f"call {ordinal} of {key}")
        reader = self._ahead.pop(key, None) or call.reader()
        if self._active and not dense:
            reader.load()
            if ordinal + 1 < len(recording.calls):
                # On its way while this call computes.
                following = recording.calls[ordinal + 1].reader()
                following.load()
                self._ahead[key] = following
        self._ordinals[counted] = self._ordinals.get(counted, 0) + 1
        self._begun[key] += 1
        self._current[key] = call
        return reader

    def filled_by(self, key: ProgramKey, parameters: Sequence[Tensor], names: Sequence[str]) -> FillingCall | None:
        """The recorded call in place of which a graph is about to be called, if that was of another graph, which filled
        what the network keeps, and nothing stands in for it yet.

        Args:
            key: the graph.
            parameters: its parameters and buffers, the very objects.
            names: of these.
        """
        filling = self._stand_ins.due(key, self.calls, self._ordinals, parameters, names)
        return None if filling is None or key in filling.stand_ins else filling

    @contextmanager
    def standing_in(
        self, filling: FillingCall, key: ProgramKey, parameters: Sequence[Tensor], names: Sequence[str]
    ) -> Iterator[Callable[..., None]]:
        """Make what stands in for a recorded call, under the base's lock: compute what the graph ``key`` stores for the
        inputs of that call, and hand it to what this gives (``StandIns.keep`` without its first three arguments).

        Raises:
            WeightsChangedError: the parameters are not those of the recording.
        """
        self._require_sound()
        with self.base.lock:
            weights = self._weights[key] = self._stand_ins.weights(filling, key, parameters, names)
            yield partial(self._stand_ins.keep, filling, key, weights)

    def refuse_stand_in(self, reason: str) -> None:
        """Say why nothing can stand in for a recorded call; the error that follows tells."""
        self._stand_ins.refused = reason

    @contextmanager
    def running(self, call: RecordedCall, dense: bool = False) -> Iterator[RecordedCall]:
        """Hold the base's lock while a call of ``begin`` runs (attention writes into recorded tensors and undoes it),
        count and time it, and remember when it fails. ``dense``: it runs densely although the mask is known."""
        kind = "dense" if dense or self.dense_call else "edit"
        finished = False
        try:
            with self.base.lock:
                started = time.perf_counter()
                yield call
                finished = True
        finally:
            if not finished:
                self._failure = self._failure or f"an earlier call of the edit of base {self.base.name!r} failed"
        self._store.counter.add_call(kind, time.perf_counter() - started, call.bytes_loaded)

    def plan(self, spec: PlanSpec) -> IndexPlan | None:
        """The index plan of the mask for a graph; None when nothing is active.

        Raises:
            MaskError: the network's batch is not a multiple of the mask's.
        """
        spec = PlanSpec(*spec)
        if self._mask is None:
            raise GraphError("a plan was asked for before the mask is known")
        if spec not in self._plans:
            self._plans[spec], self.density = self._store.plans.get(self._mask, spec)
        return self._plans[spec]

    def skip_plan(self, spec: PlanSpec) -> None:
        """In place of ``plan``, for a graph that runs densely as the mask is ``full``; raises as ``plan`` does."""
        if self._mask is not None:
            self._store.plans.skip(self._mask, spec)

    def updated_sites(
        self, call: RecordedCall, sites: Sequence[Site], updates: Sequence[Tensor | None], plan: IndexPlan
    ) -> dict[str, Tensor]:
        """What a sparse call stores in the new base: the recorded tensors with the call's updates.

        Args:
            call: what ``begin`` returned.
            sites: the graph's sites.
            updates: one for each site: the rows ``[B, N, *C]`` of a spatial site, the whole tensor of a value site, or
                None: unchanged. Unchanged tensors are the recorded ones themselves.
            plan: whose rows they are.

        Raises:
            BudgetError: the budget does not leave the copies.
        """
        recorded = dict(zip(call, call.stored(), strict=True))
        changed = [site for site, update in zip(sites, updates, strict=True) if update is not None]
        self._reserve(sum(recorded[site.name].nbytes for site in changed), "a call")
        with self.base.lock:
            return updated_tensors(call, sites, updates, plan)

    def commit(
        self,
        key: ProgramKey,
        tensors: Mapping[str, Tensor],
        sites: Sequence[Site],
        protected: Sequence[Tensor] = (),
    ) -> None:
        """Store the call in the new base. Tensors that are the recorded ones themselves (all of them, when nothing is
        active: pass the recorded call) are shared with the edited base; the others are owned as in
        ``RecordPhase.commit``."""
        if self.writer is None:
            raise GraphError("commit in an edit without save_as")
        parent = self._current[key]
        shared = frozenset(id(tensor) for tensor in parent.stored())
        self.writer.append(key, self._weights[key], parent.scalars, tensors, sites, protected, shared, parent.lane)

    def fingerprint(self, key: ProgramKey) -> Fingerprint:
        """The fingerprint of a graph's parameters in this context; known after ``begin``."""
        return self._weights[key].fingerprint

    def finish(self) -> None:
        """Check, at the end of the context, that the edit made the calls the base holds, with its scalars.

        Raises:
            CallMismatchError: a graph was called less often than recorded, or a call failed, or was not saved.
            ScalarMismatchError: a scalar on an accelerator differed.
        """
        self._require_sound()
        self._scalars.finish()
        for key, recording in self.base.recordings.items():
            made = self._ordinals.get(key, 0)
            if made < len(recording.calls):
                error = CallMismatchError(
                    f"base {self.base.name!r} holds {len(recording.calls)} calls of {key}, the edit made {made}",
                    advice="a run that was cancelled cannot be kept; edit with the number of steps the base was "
                    "recorded with, through the network compiled for it",
                )
                raise self._stand_ins.explained(error)
        if self.writer is None:
            return
        for key, begun in self._begun.items():
            saved = self.writer.base.recordings.get(key)
            if len(saved.calls if saved else ()) != begun:
                raise GraphError(f"{begun} calls of {key} were made but not all of them were committed")

    def close(self) -> None:
        """See ``_Phase.close``."""
        super().close()
        self.writer = None
        self._closed = True
        self.stabilising.close()
        self._stand_ins = StandIns(self._store, self.base)
        self._current = {}
        self._ahead = {}
        self._plans = {}

    def _reserve(self, needed: int, call: str) -> None:
        if self.writer is None:
            raise GraphError("updates in an edit without save_as")
        try:
            self.writer.reserve(needed, f"saving {call} for base {self.writer.base.name!r}")
        except FisEditError as error:
            self._failure = error.fact
            raise
