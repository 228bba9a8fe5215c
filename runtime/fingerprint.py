"""Recognising a network's parameters: by identity, and by their content.

Adding to ``parameter.data`` (what fusing a LoRA does) changes neither ``_version`` nor ``data_ptr``, and inference
tensors have no version at all. So the content is looked at: the sum of all its bits, read as integers, and at most
``SAMPLES`` elements of each parameter, where they are. Summing reads all weights once, as one sparse call does. A
change goes unnoticed only if it leaves the sum of a tensor as it is, such as one that exchanges elements, and touches
no sampled element.

What is no ``nn.Parameter`` (a buffer, or any other tensor that a module holds) has no identity: networks replace such
tensors by equal ones as they run (``self.mean = self.mean.type_as(x)``). They are known by their content alone.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fisedit_compile.errors import WeightsChangedError
from fisedit_compile.private.tensors import version_of

SAMPLES = 64
"""Most elements looked at in one parameter."""

# Same-width integer types: samples are compared as bits, so that NaN equals itself and -0.0 differs from 0.0.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_GOLDEN = 0.6180339887498949

_LAYOUT = "the memory format"
"""How a difference begins that is one of strides: what is compared of the content are places in memory."""

Form = tuple[tuple[int, ...], torch.dtype, str, tuple[int, ...]]


@lru_cache(maxsize=4096)
def sample_positions(count: int, device: torch.device) -> Tensor:
    """Which elements of a tensor of ``count`` elements are looked at: int64 ``[min(count, SAMPLES)]`` on ``device``.

    Multiples of the golden section are spread evenly over the tensor and, unlike equal steps, over the columns of
    a matrix of any width: a low-rank change that leaves some columns alone is seen all the same.
    """
    with torch.inference_mode(False):
        if count <= SAMPLES:
            return torch.arange(count, device=device)
        return torch.tensor([int(number * _GOLDEN % 1 * count) for number in range(SAMPLES)], device=device)


def _plain_tensors(parameter: Tensor) -> list[Tensor]:
    """The ordinary tensors that hold a parameter's content (several for a wrapper such as a quantised weight)."""
    if hasattr(parameter, "__tensor_flatten__"):
        names, _ = parameter.__tensor_flatten__()
        return [plain for name in names for plain in _plain_tensors(getattr(parameter, name))]
    if parameter.layout is not torch.strided:
        return [parameter.to_dense()]
    return [parameter]


def _line(tensor: Tensor) -> Tensor:
    """The elements of ``tensor`` as they lie in memory, as integers of the same width; shape ``[n]``."""
    flat = tensor.detach()
    if flat.is_complex():
        flat = torch.view_as_real(flat)
    bits = _BITS[flat.element_size()]
    count = flat.numel()
    if count == 0 or flat.device.type == "meta":
        return torch.empty(0, dtype=bits)
    if not flat.is_contiguous() and torch.empty_like(flat, device="meta").stride() != flat.stride():
        # A view with gaps: the memory in between belongs to somebody else and may change.
        flat = flat.contiguous()
    return flat.as_strided((count,), (1,), flat.storage_offset()).view(bits)


def sample(tensor: Tensor) -> Tensor:
    """At most ``SAMPLES`` elements of ``tensor``, as integers of the same width; shape ``[n]``, on its device."""
    line = _line(tensor)
    return line.index_select(0, sample_positions(line.numel(), line.device)) if line.numel() else line


def total(tensor: Tensor) -> Tensor:
    """The sum of all bits of ``tensor``, read as integers of 64 bits and modulo 2**64; int64 ``[]``, on its device."""
    line = _line(tensor)
    width = 8 // line.element_size()
    whole = line.numel() - line.numel() % width
    if line.storage_offset() % width or not whole:
        return line.sum(dtype=torch.int64)
    words = line[:whole].view(torch.int64).sum()
    return words if whole == line.numel() else words + line[whole:].sum(dtype=torch.int64)


def has_identity(tensor: Tensor) -> bool:
    """Whether a tensor that a module holds is known by the object that it is, not by its content alone."""
    return isinstance(tensor, nn.Parameter)


#: For tensors without an identity, how often they had been changed in place when they were looked at, and their digest.
_seen: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def content_identity(tensor: Tensor) -> str:
    """A text that is equal for tensors of equal content; looked at anew only after a change in place that counted."""
    version = version_of(tensor)
    known: tuple[int, str] | None = _seen.get(tensor)
    if known is None or known[0] != version:
        known = _seen[tensor] = (version, Fingerprint.take([tensor]).digest)
    return known[1]


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """What is remembered of a list of parameters.

    Attributes:
        forms: shape, dtype, device and strides of every tensor, in order; a stride along a dimension of size 1 is 0.
        owners: for every tensor, the number of the parameter it belongs to.
        samples: for every (device, element size) the concatenated samples, on the CPU.
        totals: for every tensor, the sum of its bits.
        spans: for every tensor, its group in ``samples`` and where its sample begins and ends.
    """

    forms: tuple[Form, ...]
    owners: tuple[int, ...]
    samples: dict[tuple[str, int], Tensor]
    totals: tuple[int, ...]
    spans: tuple[tuple[tuple[str, int], int, int], ...]

    @classmethod
    def take(cls, parameters: Sequence[Tensor]) -> Fingerprint:
        """Look at ``parameters`` now. One pass; few transfers to the host for every device and element size."""
        forms, owners, spans = [], [], []
        totals: dict[str, list[Tensor]] = {}
        groups: dict[tuple[str, int], list[Tensor]] = {}
        lengths: dict[tuple[str, int], int] = {}
        with torch.no_grad():
            for number, parameter in enumerate(parameters):
                for plain in _plain_tensors(parameter):
                    taken = sample(plain)
                    device = str(plain.device)
                    group = (device, taken.element_size())
                    begin = lengths.get(group, 0)
                    lengths[group] = begin + taken.numel()
                    groups.setdefault(group, []).append(taken)
                    totals.setdefault(device, []).append(total(plain))
                    strides = (step if size > 1 else 0 for size, step in zip(plain.shape, plain.stride(), strict=True))
                    forms.append((tuple(plain.shape), plain.dtype, device, tuple(strides)))
                    owners.append(number)
                    spans.append((group, begin, lengths[group]))
            samples = {group: torch.cat(taken).cpu() for group, taken in groups.items()}
            sums = {device: iter(torch.stack(found).tolist()) for device, found in totals.items()}
        return cls(tuple(forms), tuple(owners), samples, tuple(next(sums[form[2]]) for form in forms), tuple(spans))

    def part(self, numbers: Sequence[int]) -> Fingerprint:
        """That of some of the parameters, given by number, in the order of ``numbers``."""
        chosen = [(at, place) for place, number in enumerate(numbers) for at in self._tensors_of(number)]
        spans = []
        groups: dict[tuple[str, int], list[Tensor]] = {}
        lengths: dict[tuple[str, int], int] = {}
        for at, _ in chosen:
            group, begin, end = self.spans[at]
            start = lengths.get(group, 0)
            lengths[group] = start + end - begin
            groups.setdefault(group, []).append(self.samples[group][begin:end])
            spans.append((group, start, lengths[group]))
        return Fingerprint(
            tuple(self.forms[at] for at, _ in chosen),
            tuple(place for _, place in chosen),
            {group: torch.cat(taken) for group, taken in groups.items()},
            tuple(self.totals[at] for at, _ in chosen),
            tuple(spans),
        )

    def _tensors_of(self, number: int) -> Iterator[int]:
        return (at for at, owner in enumerate(self.owners) if owner == number)

    def difference(self, other: Fingerprint) -> str | None:
        """How ``other`` differs from this one, in words; None when nothing differs."""
        if len(self.forms) != len(other.forms):
            return f"{len(self.forms)} tensors before, {len(other.forms)} now"
        for owner, before, now in zip(self.owners, self.forms, other.forms, strict=True):
            if before[:3] != now[:3]:
                return f"parameter {owner} was {_form(before)} and is {_form(now)} now"
        laid = [number for number, before in enumerate(self.forms) if before != other.forms[number]]
        if laid:
            first = laid[0]
            return (
                f"{_LAYOUT} of {len(laid)} of {len(self.forms)} tensors is another, first of parameter "
                f"{self.owners[first]} ({_form(self.forms[first])}): its strides were {self.forms[first][3]} and are "
                f"{other.forms[first][3]}"
            )
        same = all(torch.equal(taken, other.samples[group]) for group, taken in self.samples.items())
        if same and self.totals == other.totals:
            return None
        changed = []
        for number, (owner, form, (group, begin, end)) in enumerate(
            zip(self.owners, self.forms, self.spans, strict=True)
        ):
            sampled = torch.equal(self.samples[group][begin:end], other.samples[group][begin:end])
            if not sampled or self.totals[number] != other.totals[number]:
                changed.append((owner, form))
        count, (owner, form) = len(changed), changed[0]
        return f"the content of {count} of {len(self.forms)} tensors changed, first parameter {owner} ({_form(form)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fingerprint) and self.difference(other) is None

    def __hash__(self) -> int:
        return hash(self.digest)

    @cached_property
    def digest(self) -> str:
        """A short text that is equal for equal parameters: 32 hexadecimal digits."""
        digest = hashlib.blake2b(repr((self.forms, self.totals)).encode(), digest_size=16)
        for group, taken in sorted(self.samples.items()):
            digest.update(repr(group).encode())
            digest.update(taken.numpy().tobytes())
        return digest.hexdigest()


def _form(form: Form) -> str:
    shape, dtype, device, _ = form
    return f"{list(shape)} {str(dtype).removeprefix('torch.')} on {device}"


class Weights:
    """The parameters one graph was recorded with, buffers and the like among them: weak references to those that have
    an identity, and the fingerprint of all."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.fingerprint = Fingerprint.take(parameters)
        self._references = tuple(
            weakref.ref(parameter) if has_identity(parameter) else None for parameter in parameters
        )

    @property
    def alive(self) -> bool:
        """Whether every parameter that has an identity still exists."""
        return all(reference is None or reference() is not None for reference in self._references)

    def are(self, parameters: Sequence[Tensor], numbers: Sequence[int]) -> bool:
        """Whether ``parameters`` are the recorded ones of these numbers, whatever their content is now."""
        references = (self._references[number] for number in numbers)
        pairs = zip(references, parameters, strict=True)
        return all(reference is None or reference() is parameter for reference, parameter in pairs)

    def verify(self, parameters: Sequence[Tensor], base: str, numbers: Sequence[int] | None = None) -> None:
        """Check that ``parameters`` are the recorded ones, unchanged.

        Args:
            parameters: the very objects.
            base: for messages.
            numbers: which of the recorded ones these are; None: all, in their order.

        Raises:
            WeightsChangedError: a parameter is another tensor (the number of an object may be used again after the
                object is gone), or its shape, dtype, device or content changed.
        """
        advice = "record the base again with these weights, or restore the weights it was recorded with"
        places = range(len(self._references)) if numbers is None else numbers
        references = [self._references[number] for number in places]
        if len(parameters) != len(references):
            raise WeightsChangedError(
                f"base {base!r} was recorded with {len(references)} parameters, got {len(parameters)}",
                advice=advice,
            )
        for number, reference, parameter in zip(places, references, parameters, strict=True):
            if reference is not None and reference() is not parameter:
                raise WeightsChangedError(
                    f"base {base!r} was recorded with another network: parameter {number} of shape "
                    f"{list(parameter.shape)} is not the recorded tensor",
                    advice=advice,
                )
        recorded = self.fingerprint if numbers is None else self.fingerprint.part(numbers)
        difference = recorded.difference(Fingerprint.take(parameters))
        if difference is not None:
            if difference.startswith(_LAYOUT):
                raise WeightsChangedError(f"since base {base!r} was recorded, {difference}", advice=advice)
            raise WeightsChangedError(
                f"the weights changed since base {base!r} was recorded: {difference}", advice=advice
            )
