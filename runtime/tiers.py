"""Recordings in the host's memory: copied there, and back before they are needed, while the device computes.

A recorded call of a large network takes hundreds of megabytes, and a picture fifty of them: more than most devices
have left. With ``Runtime(tier="host")`` each call's tensors are packed into a few blocks of pinned memory. Copies in
both directions run on a lane of their own, in order: what the next call of an edit needs is on its way while one
computes. The host waits when it is more than two calls ahead, so the device holds the tensors of a few calls only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fisedit_compile.errors import OptionError

TIERS = ("device", "host")
#: Most bytes of a block, unless one tensor is larger: pinned memory is handed out in powers of two.
BLOCK = 1 << 24
#: Calls whose copies may be under way.
AHEAD = 2
#: Bytes that tensors in a block begin at a multiple of.
ALIGNMENT = 64


def check_tier(tier: str) -> str:
    """``tier`` itself.

    Raises:
        OptionError: it is none of ``TIERS``.
    """
    if tier not in TIERS:
        raise OptionError(f"tier must be one of {', '.join(map(repr, TIERS))}, got {tier!r}")
    return tier


class Lane(Protocol):
    """Copies between a device and the host that run in order, beside what the device computes."""

    def holds(self, tensor: Tensor) -> bool:
        """Whether a recorded tensor lies on the host because of this lane."""

    def takes(self, tensor: Tensor) -> bool:
        """Whether a tensor lies on the lane's device."""

    def allocate(self, size: int) -> Tensor:
        """``size`` bytes of the host's memory, uint8."""

    def copy_out(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """Copy tensors of the device to the host, behind what the device was asked to compute so far. Until that is
        done, nobody may write into the sources; they may be forgotten."""

    def copy_in(self, sources: Sequence[Tensor]) -> Arrival:
        """Start to copy blocks of bytes to the device, behind earlier copies."""

    def finish(self) -> None:
        """Wait until all copies are done."""


@dataclass(frozen=True)
class Arrival:
    """Copies on their way to the device.

    Attributes:
        blocks: the copies; not to be used before ``wait``.
        wait: lets what the device is asked to compute from now on come behind them, and behind nothing later.
    """

    blocks: list[Tensor]
    wait: Callable[[], None]


class CudaLane:
    """A stream beside the one that computes, and pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pending: deque[torch.cuda.Event] = deque()

    def holds(self, tensor: Tensor) -> bool:
        """See ``Lane``."""
        return tensor.device.type == "cpu" and tensor.is_pinned()

    def takes(self, tensor: Tensor) -> bool:
        """See ``Lane``."""
        return tensor.device == self._device

    def _keep_pace(self, event: torch.cuda.Event) -> None:
        """Wait until at most ``AHEAD`` events are to come, this one included: a host that runs ahead of the device
        would ask for memory for more and more copies."""
        self._pending.append(event)
        while len(self._pending) > AHEAD:
            self._pending.popleft().synchronize()

    def allocate(self, size: int) -> Tensor:
        """See ``Lane``."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def copy_out(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """See ``Lane``."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source, non_blocking=True)
                # Its memory is not handed out again before the copy is done.
                source.record_stream(self._stream)
            copied = self._stream.record_event()
        self._keep_pace(copied)

    def copy_in(self, sources: Sequence[Tensor]) -> Arrival:
        """See ``Lane``."""
        self._keep_pace(torch.cuda.current_stream(self._device).record_event())
        with torch.cuda.stream(self._stream):
            blocks = [source.to(self._device, non_blocking=True) for source in sources]
            arrived = self._stream.record_event()

        def wait() -> None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(arrived)
            for block in blocks:
                # They belong to the lane's stream: not to be handed out again before this one is done with them.
                block.record_stream(current)

        return Arrival(blocks, wait)

    def finish(self) -> None:
        """See ``Lane``."""
        self._stream.synchronize()


def lane_for(device: torch.device) -> Lane | None:
    """A lane for a device; None where recordings lie in the host's memory anyway, or copies cannot run beside."""
    return CudaLane(device) if device.type == "cuda" else None


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _view(block: Tensor, offset: int, like: Tensor) -> Tensor:
    """A tensor like another one, its memory in a block of bytes."""
    return block[offset : offset + _bytes(like)].view(like.dtype).as_strided(like.shape, like.stride())


def _place(tensor: Tensor) -> tuple[int, int]:
    """Address of the memory a tensor lies in, and where it begins there, in bytes."""
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()) * tensor.element_size()


def offload(tensors: Mapping[str, Tensor], lane: Lane) -> dict[str, Tensor]:
    """The tensors on the host; copies are under way until ``lane.finish``.

    Args:
        tensors: by name, each alone in its memory and without gaps; equal ones are copied once. Those that lie
            elsewhere than on the lane's device stay as they are.
        lane: of their device.

    Returns:
        Tensors of the same shapes, strides and types, several to a block of memory.
    """
    distinct = {id(tensor): tensor for tensor in tensors.values() if lane.takes(tensor)}
    blocks: list[list[tuple[Tensor, int]]] = []
    sizes: list[int] = []
    for tensor in distinct.values():
        if not blocks or sizes[-1] + _bytes(tensor) > BLOCK:
            blocks.append([])
            sizes.append(0)
        blocks[-1].append((tensor, sizes[-1]))
        sizes[-1] += -(-_bytes(tensor) // ALIGNMENT) * ALIGNMENT
    parked: dict[int, Tensor] = {}
    with torch.inference_mode(False), torch.no_grad():
        for content, size in zip(blocks, sizes, strict=True):
            block = lane.allocate(size)
            for tensor, offset in content:
                parked[id(tensor)] = _view(block, offset, tensor)
        lane.copy_out(list(distinct.values()), list(parked.values()))
    return {name: parked.get(id(tensor), tensor) for name, tensor in tensors.items()}


class Loading:
    """Recorded tensors on their way to the device."""

    def __init__(self, tensors: Mapping[str, Tensor], lane: Lane) -> None:
        """Start to copy those of ``tensors`` that the lane holds; what lies between them in their memory comes too."""
        self._tensors = dict(tensors)
        self._waited = False
        parked = {name: tensor for name, tensor in tensors.items() if lane.holds(tensor)}
        spans: dict[int, tuple[int, int, Tensor]] = {}
        for tensor in parked.values():
            address, start = _place(tensor)
            first, last, _ = spans.get(address, (start, start, tensor))
            spans[address] = min(first, start), max(last, start + _bytes(tensor)), tensor
        with torch.inference_mode(False), torch.no_grad():
            sources = []
            for first, last, tensor in spans.values():
                source = torch.empty(0, dtype=torch.uint8)
                sources.append(source.set_(tensor.untyped_storage(), first, (last - first,), (1,)))
            self._arrival = lane.copy_in(sources)
            blocks = dict(zip(spans, self._arrival.blocks, strict=True))
            for name, tensor in parked.items():
                address, start = _place(tensor)
                self._tensors[name] = _view(blocks[address], start - spans[address][0], tensor)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor on the device, for what the device is asked to compute from now on."""
        if not self._waited:
            self._arrival.wait()
            self._waited = True
        return self._tensors[name]
