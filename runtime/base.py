"""What a recorded run consists of, who owns its tensors, and how many bytes they take."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fisedit_compile.errors import BudgetError, CallMismatchError, FisEditError, OptionError, WeightsChangedError
from fisedit_compile.runtime.fingerprint import Weights
from fisedit_compile.runtime.spec import Site
from fisedit_compile.runtime.stats import format_bytes
from fisedit_compile.runtime.tiers import Lane, Loading

if TYPE_CHECKING:
    from fisedit_compile.runtime.filling import FillingCall

STORAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What spatial sites may be stored as."""

OUTPUT_PREFIX = "output:"
"""The sites that hold a graph's outputs are named by it and the output's number."""

ATTENTION_PREFIX = "attention:"
"""The sites of attention maps are named by it and the place of the attention in the network."""

Scalar = Tensor | int | float | bool


@dataclass(frozen=True)
class ProgramKey:
    """Which compiled graph a call belongs to: the same structure may run with several sets of parameters.

    Attributes:
        graph_hash: equal for graphs of equal structure and shapes.
        parameters: ``id`` of every parameter; of buffers and the like, which are replaced by equal ones, what
            ``fingerprint.content_identity`` says.
        label: the graph in words (its input shapes), for messages only.
    """

    graph_hash: str
    parameters: tuple[int | str, ...]
    label: str = field(default="", compare=False)

    def __str__(self) -> str:
        return self.label or f"graph {self.graph_hash[:12]}"


class RecordedCall(Mapping[str, Tensor]):
    """What one graph call stored, by site name. Tensors keep the site's logical shape; spatial ones lie in memory as
    (batch, space, channels). Never write into them, but for writes that are undone under the base's lock.

    Attributes:
        scalars: copies of the call's scalar inputs.
        lane: brings those tensors to the device that lie on the host; None: all lie where they are used.
        bytes_loaded: bytes of the tensors that were taken from this object.
    """

    def __init__(self, tensors: Mapping[str, Tensor], scalars: tuple[Scalar, ...], lane: Lane | None = None) -> None:
        self._tensors = dict(tensors)
        self.lane = lane
        self._loading: Loading | None = None
        self.scalars = scalars
        self.bytes_loaded = 0

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        self.bytes_loaded += tensor.numel() * tensor.element_size()
        self.load()
        return tensor if self._loading is None else self._loading[name]

    def load(self) -> None:
        """Start to bring the tensors to the device, unless they are there or on their way."""
        if self.lane is not None and self._loading is None:
            self._loading = Loading(self._tensors, self.lane)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def reader(self) -> RecordedCall:
        """The same tensors with a counter of its own, for one edit call; what it brings to the device goes with it."""
        return RecordedCall(self._tensors, self.scalars, self.lane)

    def like(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor with the strides of the recorded one, not counted as loaded, where that takes no copy: those of
        dimensions of one element mean nothing, but PyTorch's compiler makes a graph for each set of strides."""
        wanted = self._tensors[name].stride()
        if tensor.shape != self._tensors[name].shape or tensor.stride() == wanted:
            return tensor
        meant = [(now, then) for size, now, then in zip(tensor.shape, tensor.stride(), wanted, strict=True) if size > 1]
        return tensor.as_strided(tensor.shape, wanted) if all(now == then for now, then in meant) else tensor

    def stored(self) -> Iterable[Tensor]:
        """The tensors as they are kept, not counted as loaded; they may lie on the host."""
        return self._tensors.values()

    @property
    def keeps_attention(self) -> bool:
        """Whether attention maps are among the tensors."""
        return any(name.startswith(ATTENTION_PREFIX) for name in self._tensors)

    @property
    def bytes(self) -> int:
        """Bytes of the distinct tensors."""
        return sum({storage_of(tensor): tensor.untyped_storage().nbytes() for tensor in self.stored()}.values())


@dataclass
class Recording:
    """The calls of one graph within a base, in order, and the weights they were made with."""

    weights: Weights
    calls: list[RecordedCall] = field(default_factory=list)


class Base:
    """A recorded run: for every graph its calls, and which of them filled what the network keeps. Bases that share
    tensors share the lock as well."""

    def __init__(self, name: str, parent: Base | None = None) -> None:
        self.name = name
        self.recordings: dict[ProgramKey, Recording] = {}
        self.filling: list[FillingCall] = []
        self.lock: threading.RLock = parent.lock if parent is not None else threading.RLock()

    def tensors(self) -> Iterator[Tensor]:
        """Every stored tensor, as often as it is referred to."""
        for recording in self.recordings.values():
            for call in recording.calls:
                yield from call.stored()
        for filling in self.filling:
            yield from filling.tensors()

    @property
    def bytes(self) -> int:
        """Bytes it refers to."""
        calls = sum(call.bytes for recording in self.recordings.values() for call in recording.calls)
        return calls + sum(filling.bytes for filling in self.filling)

    @property
    def call_count(self) -> int:
        """Graph calls of all graphs together."""
        return sum(len(recording.calls) for recording in self.recordings.values())

    @property
    def keeps_attention(self) -> bool:
        """Whether some of its calls kept their attention maps."""
        calls = (call for recording in self.recordings.values() for call in recording.calls)
        return any(call.keeps_attention for call in calls)

    def describe(self) -> str:
        """Its graphs and how often each was called, in words."""
        return "; ".join(f"{key}: {len(recording.calls)} calls" for key, recording in self.recordings.items())

    def unknown(self, key: ProgramKey) -> FisEditError:
        """The error for a graph that it holds no calls of: which of its graphs is the nearest, and what differs."""
        if any(known.graph_hash == key.graph_hash for known in self.recordings):
            return WeightsChangedError(
                f"base {self.name!r} was recorded with other parameters of {key}: the network, or some of its "
                f"parameters or buffers, were replaced since",
                advice="record the base again with this network",
            )
        if key.label and any(known.label == key.label for known in self.recordings):
            return CallMismatchError(
                f"base {self.name!r} has no calls of this version of {key}, but of another one: an option, a layer or "
                f"a number of the network (such as the scale of an adapter) was changed since, or a cache that it "
                f"fills at its first call was empty when it was recorded",
                advice="record again, also after changing it back",
            )
        return CallMismatchError(
            f"base {self.name!r} has no calls of {key}; it holds {self.describe()}",
            advice="edit with the network, the picture size, the batch and the precision the base was recorded with, "
            "or record again",
        )


def storage_of(tensor: Tensor) -> int:
    """Address of the memory a tensor lies in; tensors with the same address share memory."""
    return tensor.untyped_storage().data_ptr()


def check_storage(storage: torch.dtype | None) -> torch.dtype | None:
    """``storage`` itself, when spatial sites can be stored as it.

    Raises:
        OptionError: another type than those in ``STORAGE_DTYPES``.
    """
    if storage is not None and storage not in STORAGE_DTYPES:
        raise OptionError(f"storage must be None or one of {', '.join(map(str, STORAGE_DTYPES))}, got {storage!r}")
    return storage


def stored_dtype(site: Site, dtype: torch.dtype, storage: torch.dtype | None) -> torch.dtype:
    """The type a site computed as ``dtype`` is stored as: a spatial site of a wider floating type is narrowed to
    ``storage``; a value or a lossless site never is."""
    if storage is None or site.kind != "spatial" or site.lossless:
        return dtype
    return storage if dtype.is_floating_point and dtype.itemsize > storage.itemsize else dtype


def stored_bytes(sites: Iterable[Site], storage: torch.dtype | None) -> int:
    """Bytes one recorded call takes: the sites at the types they are stored as."""
    return sum(site.bytes // site.dtype.itemsize * stored_dtype(site, site.dtype, storage).itemsize for site in sites)


def own_tensor(tensor: Tensor, site: Site, storage: torch.dtype | None, protected: frozenset[int]) -> Tensor:
    """``tensor`` as a base may keep it: alone in its memory, in the stored type, an ordinary tensor without history.

    It is copied when it lies in ``protected`` memory (a graph's inputs and returned outputs, which the caller may
    overwrite), when it is a part of a larger memory (which it would hold alive), when elements overlap (expanded), when
    it is an inference tensor (which could not be written to outside inference mode), when the stored type is another,
    or when a spatial site does not lie as (batch, space, channels): edits gather rows, and a row must lie together.

    Args:
        tensor: of the site's logical shape.
        site: which site it belongs to.
        storage: the runtime's storage type.
        protected: addresses of memory that is not the base's, see ``storage_of``.

    Returns:
        A tensor of the same logical shape. Outputs and values keep their strides where they are dense.
    """
    with torch.inference_mode(False), torch.no_grad():
        source = tensor.detach()
        borrowed = (
            storage_of(tensor) in protected
            or tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
            or tensor.is_inference()
        )
        if site.kind != "spatial" or site.name.startswith(OUTPUT_PREFIX):
            return source.clone() if borrowed else source
        rows = source.permute(site.order)
        dtype = stored_dtype(site, tensor.dtype, storage)
        if not borrowed and dtype == tensor.dtype and rows.is_contiguous():
            return source
        copy = torch.empty(rows.shape, dtype=dtype, device=rows.device).copy_(rows)
        inverse = [0] * len(site.order)
        for position, dimension in enumerate(site.order):
            inverse[dimension] = position
        return copy.permute(inverse)


def write_rows(stored: Tensor, site: Site, rows: Tensor, index: Tensor, valid: Tensor | None) -> Tensor:
    """A copy of a stored spatial tensor with rows written into it.

    Args:
        stored: of the site's logical shape.
        site: a spatial site.
        rows: ``[B, N, *C]`` of any floating type; cast to the stored type.
        index: int64 ``[1 or B, N]``, distinct positions in the site's domain.
        valid: bool ``[1 or B, N]``; rows that are False are not written. None: all are.

    Returns:
        A new tensor with the shape, strides and type of ``stored``.
    """
    copy = stored.clone()
    mapped = copy.permute(site.order)
    batch, count = rows.shape[:2]
    if count == 0:
        return copy
    position = index.expand(batch, count)
    sample = torch.arange(batch, device=rows.device)[:, None]
    where: tuple[Tensor, ...] = (sample, position)
    if site.space_rank == 2:
        width = mapped.shape[2]
        where = (sample, position // width, position % width)
    values = rows.to(copy.dtype)
    if valid is not None:
        chosen = valid.expand(batch, count).reshape(batch, count, *(1,) * (rows.dim() - 2))
        values = torch.where(chosen, values, mapped[where])
    mapped.index_put_(where, values)
    return copy


class Ledger:
    """Counts the bytes of the tensors that bases hold, each distinct memory once, and guards the budget."""

    def __init__(self, budget: int | None) -> None:
        self.budget = budget
        self._lock = threading.Lock()
        self._held: dict[int, tuple[int, int]] = {}  # address -> (references, bytes)
        self._total = 0
        self._reserved = 0

    @property
    def total(self) -> int:
        """Bytes held now."""
        return self._total

    def reserve(self, needed: int, purpose: str, bases: Sequence[str]) -> None:
        """Set ``needed`` bytes aside, to be given back with ``unreserve``.

        Raises:
            BudgetError: that is more than the budget leaves.
        """
        with self._lock:
            used = self._total + self._reserved
            if self.budget is not None and used + needed > self.budget:
                existing = f"existing bases: {', '.join(map(repr, bases)) or 'none'}"
                raise BudgetError(
                    f"{purpose} needs {format_bytes(needed)} ({needed} bytes), but {format_bytes(used)} of the budget "
                    f"of {format_bytes(self.budget)} are in use ({existing})",
                    advice="raise Runtime(budget=...), drop a base with runtime.drop(name), or store less with "
                    "Runtime(storage=torch.float16)",
                )
            self._reserved += needed

    def unreserve(self, needed: int) -> None:
        """Give back what ``reserve`` set aside."""
        with self._lock:
            self._reserved -= needed

    def retain(self, tensors: Iterable[Tensor]) -> None:
        """Count one more reference to each tensor."""
        with self._lock:
            for tensor in tensors:
                size = tensor.untyped_storage().nbytes()
                references, _ = self._held.get(storage_of(tensor), (0, size))
                self._held[storage_of(tensor)] = (references + 1, size)
                self._total += size if references == 0 else 0

    def release(self, tensors: Iterable[Tensor]) -> None:
        """Take back what ``retain`` counted."""
        with self._lock:
            for tensor in tensors:
                references, size = self._held.pop(storage_of(tensor))
                if references > 1:
                    self._held[storage_of(tensor)] = (references - 1, size)
                else:
                    self._total -= size
