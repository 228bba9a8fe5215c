"""The runtime: holds bases (recorded runs) and says, thread by thread, whether a call is recorded or edited."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.errors import FisEditError, OptionError, UnknownBaseError
from fisedit_compile.options import parse_bytes
from fisedit_compile.runtime.base import Base, check_storage, stored_bytes
from fisedit_compile.runtime.masks import WHITE_THRESHOLD, MaskLike, check_white_threshold
from fisedit_compile.runtime.phases import EditPhase, RecordPhase
from fisedit_compile.runtime.relay import PhaseSource
from fisedit_compile.runtime.spec import Site
from fisedit_compile.runtime.stats import Stats, format_bytes
from fisedit_compile.runtime.store import BaseWriter, Store
from fisedit_compile.runtime.tiers import check_tier

Phase = RecordPhase | EditPhase


class RecordRun:
    """A recording in progress, as ``with runtime.record(...) as run`` gives it."""

    def __init__(self, phase: RecordPhase) -> None:
        self._phase = phase

    @property
    def name(self) -> str:
        """The base that will be made."""
        return self._phase.base.name

    @property
    def calls(self) -> int:
        """Graph calls recorded so far."""
        return self._phase.calls

    @property
    def first_call(self) -> float | None:
        """When the first graph call began, by ``time.perf_counter``: what a network took before was tracing. None
        before it."""
        return self._phase.first_call

    @property
    def attention_calls(self) -> int:
        """Graph calls that kept their attention maps."""
        return self._phase.attention.calls

    @property
    def attention_failure(self) -> str | None:
        """Why no call so far kept attention maps although that was asked for; None where all is well."""
        return self._phase.attention.failure

    def keep_attention_maps(self, keep: bool) -> None:
        """Whether calls from now on keep their attention maps: those that edits will make with a mask need none."""
        self._phase.attention.wanted = keep


class EditRun:
    """An edit in progress, as ``with runtime.edit(...) as run`` gives it."""

    def __init__(self, phase: EditPhase, white_threshold: float = WHITE_THRESHOLD) -> None:
        self._phase = phase
        self._white_threshold = white_threshold

    @property
    def base(self) -> str:
        """Name of the base that is edited."""
        return self._phase.base.name

    @property
    def calls(self) -> int:
        """Graph calls made so far, dense ones included."""
        return self._phase.calls

    @property
    def mask(self) -> Tensor | None:
        """bool ``[1 or samples, height, width]`` as given; None while it is not known."""
        return self._phase.mask

    @property
    def density(self) -> float | None:
        """Active fraction, 0 to 1, of the mask at the network's input resolution (before the first sparse call: of the
        mask as given); None while it is not known."""
        return self._phase.density

    @property
    def stabilised_calls(self) -> int:
        """Graph calls so far that took the attention to shared words from the recording."""
        return self._phase.stabilising.calls

    def align(self, alignment: Any) -> None:
        """Say which words of the new prompt the recorded one had: their attention, in dense calls from now on, is that
        of the recorded run.

        Args:
            alignment: whole numbers ``[tokens]`` or ``[samples, tokens]``: for each new token the place of the same one
                in the recorded prompt, -1 where there is none; None: from now on nothing is taken.

        Raises:
            OptionError: it is no such alignment.
            CallMismatchError: the base was recorded without attention maps.
        """
        self._phase.stabilising.align(alignment)

    def set_mask(self, mask: MaskLike, white_threshold: float | None = None) -> None:
        """Say what may change; calls from now on are sparse.

        Args:
            mask: white where the picture may change: a picture (PIL, or the path of one), numpy or torch, ``[H, W]`` or
                ``[samples, H, W]``, any resolution; :func:`~fisedit_compile.runtime.masks.prepare_mask` has all forms.
            white_threshold: the share of the scale that white reaches; None: as the edit was told.

        Raises:
            MaskError: it is not such a mask.
            OptionError: the threshold is not above 0 and up to 1.
            FisEditError: the edit has ended.
        """
        self._phase.set_mask(mask, self._white_threshold if white_threshold is None else white_threshold)


class Runtime(PhaseSource):
    """Holds recorded runs and the mask, for the networks compiled with it.

    ``record``, ``edit`` and what happens inside belong to the thread that entered them: other threads run densely, or
    inside contexts of their own. Edits of one base in several threads take turns; on CUDA they must use one stream.
    """

    def __init__(
        self, storage: torch.dtype | None = None, budget: int | str | None = None, tier: str = "device"
    ) -> None:
        """Make an empty runtime.

        Args:
            storage: type in which recorded feature maps are stored (``torch.float16`` halves a float32 network's
                bytes); None: as computed. Outputs and statistics are always stored as computed.
            budget: most bytes all bases may take: a number, ``"8GB"`` or ``"512MiB"``; None: no limit.
            tier: where recordings are kept: ``"device"``, where they are computed, or ``"host"``: on CUDA in pinned
                memory of the host. They are copied there, and back for the next call, while the device computes.

        Raises:
            OptionError: another type or tier, or no positive number of bytes.
        """
        self._store = Store(check_storage(storage), parse_bytes("budget", budget), tier=check_tier(tier))
        self._lock = threading.RLock()
        self._local = threading.local()

    @property
    def bases(self) -> tuple[str, ...]:
        """Names of the bases, oldest first."""
        return tuple(self._store.bases)

    @property
    def storage(self) -> torch.dtype | None:
        """Type in which recorded feature maps are stored; None: as computed."""
        return self._store.storage

    @property
    def tier(self) -> str:
        """Where recordings are kept: ``"device"`` or ``"host"``."""
        return self._store.tier

    @property
    def budget(self) -> int | None:
        """Most bytes all bases may take; None: no limit."""
        return self._store.ledger.budget

    def expendable(self) -> Runtime:
        """A second runtime for recordings that can be done without.

        It has the same storage type and tier and counts towards the same budget; its bases are dropped when this
        runtime needs the room. ``stats.bytes_stored`` of either is what both hold. Contexts of the two may be nested.
        """
        other = Runtime()
        other._store = Store(self.storage, None, self._store.ledger, self._store.tier)

        def reclaim() -> bool:
            names = other.bases
            for name in names:
                other.drop(name)
            return bool(names)

        self._store.reclaim = reclaim
        return other

    def bytes_of(self, name: str) -> int:
        """Bytes a base refers to; what it shares with other bases is counted for each of them.

        Raises:
            UnknownBaseError: there is no base of that name.
        """
        with self._lock:
            return self._find(name).bytes

    @property
    def stats(self) -> Stats:
        """What was done so far; a copy."""
        return self._store.counter.snapshot(self._store.ledger.total)

    def reset_stats(self) -> None:
        """Start counting again from zero; bases stay."""
        self._store.counter.reset()

    def drop(self, name: str) -> None:
        """Forget a base. An edit of it in progress goes on; memory it shares with other bases stays.

        Raises:
            UnknownBaseError: there is no base of that name.
        """
        with self._lock:
            base = self._find(name)
            del self._store.bases[name]
            self._store.ledger.release(base.tensors())

    def phase(self) -> Phase | None:
        """What the calling thread is doing: None outside record and edit."""
        phase: Phase | None = getattr(self._local, "phase", None)
        return phase

    def bytes_needed(self, sites: Iterable[Site]) -> int:
        """Bytes one recorded call with these sites takes in this runtime."""
        return stored_bytes(sites, self._store.storage)

    @contextmanager
    def record(self, name: str, calls: int | None = None, attention_maps: bool = False) -> Iterator[RecordRun]:
        """Record the calls of this thread as base ``name``; they run densely. An existing base of that name is replaced
        when the context ends without error, and kept otherwise.

        Args:
            name: of the base.
            calls: how often the network will be called, when that is known: checked at the end.
            attention_maps: also keep how cross-attention distributes over the words of a prompt, ``[samples, heads,
                positions, tokens]``, for edits with an ``alignment``; ``run.keep_attention_maps(False)`` ends it.

        Raises:
            CallMismatchError: at the end, when nothing was recorded, a call failed, the number of calls is another, or
                attention maps were to be kept and the network has none.
            BudgetError: during a call, before it computes, when its tensors would exceed the budget.
        """
        phase = RecordPhase(self._store, _check_name(name), attention_maps)
        with self._entered(phase, f"record({name!r})"), self._writing(phase.writer):
            yield RecordRun(phase)
            phase.finish(calls)

    @contextmanager
    def edit(
        self,
        name: str,
        mask: MaskLike | None = None,
        save_as: str | None = None,
        white_threshold: float = WHITE_THRESHOLD,
        alignment: Any = None,
    ) -> Iterator[EditRun]:
        """Edit base ``name``: the i-th call of each graph uses what its i-th recorded call stored.

        Args:
            name: of a recorded base.
            mask: white where the picture may change, see ``EditRun.set_mask``; None: calls run densely until
                ``run.set_mask`` is called.
            save_as: make the result a base of this name; it may be ``name`` itself.
            white_threshold: the share of a mask's scale that white reaches.
            alignment: which words of the new prompt the recorded one had, see ``EditRun.align``; calls that run densely
                because the mask is not known yet are *stabilised* by it.

        Raises:
            UnknownBaseError: there is no base ``name``.
            MaskError: the mask cannot be used.
            OptionError: the threshold is not above 0 and up to 1, or the alignment is none.
            CallMismatchError: a call, or the number of calls at the end, does not fit the base; or there is an
                alignment, and the base has no attention maps.
            WeightsChangedError: the network's parameters are not those of the recording.
            BudgetError: the new base would exceed the budget.
        """
        check_white_threshold(white_threshold)
        with self._lock:
            base = self._find(name)
        phase = EditPhase(self._store, base, None if save_as is None else _check_name(save_as))
        if mask is not None:
            phase.set_mask(mask, white_threshold)
        phase.stabilising.align(alignment)
        with self._entered(phase, f"edit({name!r})"), self._writing(phase.writer):
            yield EditRun(phase, white_threshold)
            phase.finish()

    def __repr__(self) -> str:
        bases = ", ".join(f"{name!r} ({base.call_count} calls)" for name, base in list(self._store.bases.items()))
        return f"Runtime(bases: {bases or 'none'}; {format_bytes(self._store.ledger.total)} stored)"

    def _find(self, name: str) -> Base:
        if name not in self._store.bases:
            existing = ", ".join(map(repr, self._store.bases)) or "none"
            raise UnknownBaseError(
                f"there is no base {name!r}; existing bases: {existing}. Record it first: with runtime.record({name!r})"
            )
        return self._store.bases[name]

    @contextmanager
    def _entered(self, phase: Phase, what: str) -> Iterator[None]:
        """Make ``phase`` the calling thread's phase. Inside, PyTorch's compiler fails where it would silently run
        eagerly what it should compile: that would be a wrong picture."""
        if self.phase() is not None:
            raise FisEditError(
                f"{what} inside another record or edit of the same runtime and thread; leave the outer context first, "
                f"or use a second Runtime"
            )
        from fisedit_compile.runtime.recompiles import (
            strict_recompiles,  # takes seconds to import, and who only asks needs none
        )

        with strict_recompiles():
            self._local.phase = phase
            try:
                yield
            finally:
                self._local.phase = None
                phase.close()

    @contextmanager
    def _writing(self, writer: BaseWriter | None) -> Iterator[None]:
        """Publish the new base when the body succeeds, drop it when the body fails."""
        published = False
        try:
            yield
            if writer is not None:
                self._store.finish()
                with self._lock:
                    replaced = self._store.bases.pop(writer.base.name, None)
                    self._store.bases[writer.base.name] = writer.base
                    published = True
                    if replaced is not None:
                        self._store.ledger.release(replaced.tensors())
        finally:
            if writer is not None and not published:
                writer.discard()


def _check_name(name: str) -> str:
    if not isinstance(name, str) or not name:
        raise OptionError(f"the name of a base must be a text that is not empty, got {name!r}")
    return name


_default: list[Runtime] = []
_default_lock = threading.Lock()


def default_runtime() -> Runtime:
    """The runtime of networks compiled without ``options={"runtime": ...}``; one for the whole process."""
    with _default_lock:
        if not _default:
            _default.append(Runtime())
        return _default[0]
