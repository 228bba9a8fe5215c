"""What the choice of block sizes must know of a GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

Capability = tuple[int, int]


@dataclass(frozen=True)
class Chip:
    """A GPU.

    Attributes:
        name: as the driver calls it.
        capability: CUDA compute capability, such as ``(8, 6)``.
        processors: streaming multiprocessors.
        shared_limit: bytes of shared memory that one block of threads may use.
        shared_total: bytes of shared memory of a processor.
        clock: cycles a second.
        bandwidth: bytes a second of its memory.
    """

    name: str
    capability: Capability
    processors: int
    shared_limit: int
    shared_total: int
    clock: float
    bandwidth: float

    def supports(self, dtype: torch.dtype) -> bool:
        """Whether kernels compute in a dtype on this chip; bfloat16 products need capability 8.0."""
        if dtype == torch.bfloat16:
            return self.capability >= (8, 0)
        return dtype in (torch.float16, torch.float32)

    def flops(self, dtype: torch.dtype, tensor_float: bool) -> float:
        """Peak rate of products in a dtype, summed in float32, as operations a second.

        Args:
            dtype: of the factors.
            tensor_float: whether float32 is multiplied as TF32.
        """
        capability = _known(self.capability)
        if dtype != torch.float32:
            per_cycle = MATRIX_FLOPS[capability]
        elif tensor_float and capability >= (8, 0):
            per_cycle = MATRIX_FLOPS[capability] // 2
        else:
            per_cycle = VECTOR_FLOPS[capability]
        return per_cycle * self.clock * self.processors

    @property
    def matrix_units(self) -> bool:
        """Whether Triton uses tensor cores: for capability 7.5 it multiplies element by element, as its PTX shows."""
        return self.capability >= (8, 0)

    def __str__(self) -> str:
        major, minor = self.capability
        return f"{self.name} ({major}.{minor}, {self.processors} processors)"


#: Dense half-precision operations of one processor in a cycle, by capability.
MATRIX_FLOPS: dict[Capability, int] = {
    (7, 5): 1024,
    (8, 0): 2048,
    (8, 6): 512,
    (8, 9): 1024,
    (9, 0): 4096,
    (10, 0): 8192,
}
#: Operations in float32 without tensor cores.
VECTOR_FLOPS: dict[Capability, int] = {(7, 5): 128, (8, 0): 128, (8, 6): 256, (8, 9): 256, (9, 0): 256, (10, 0): 256}

#: Bytes of shared memory: for one block, and of a processor.
SHARED_MEMORY: dict[Capability, tuple[int, int]] = {
    (7, 5): (65536, 65536),
    (8, 0): (166912, 167936),
    (8, 6): (101376, 102400),
    (8, 9): (101376, 102400),
    (9, 0): (232448, 233472),
    (10, 0): (232448, 233472),
}

#: One well-known chip for each capability, for choices made where there is no GPU.
KNOWN_CHIPS: dict[Capability, Chip] = {
    capability: Chip(name, capability, processors, *SHARED_MEMORY[capability], clock, bandwidth)
    for capability, name, processors, clock, bandwidth in (
        ((7, 5), "T4", 40, 1.59e9, 320e9),
        ((8, 0), "A100", 108, 1.41e9, 1555e9),
        ((8, 6), "RTX 3090", 82, 1.70e9, 936e9),
        ((8, 9), "RTX 4090", 128, 2.52e9, 1008e9),
        ((9, 0), "H100", 132, 1.83e9, 3350e9),
        ((10, 0), "B200", 148, 1.85e9, 8000e9),
    )
}


def _known(capability: Capability) -> Capability:
    """The newest capability of the tables that is not newer."""
    return max((known for known in KNOWN_CHIPS if known <= capability), default=min(KNOWN_CHIPS))


@functools.cache
def chip_of(device: torch.device) -> Chip:
    """The chip behind a device; for devices that are no CUDA GPU, as in the interpreter, a small well-known one."""
    if device.type != "cuda":
        return KNOWN_CHIPS[8, 6]
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    like = KNOWN_CHIPS[_known(capability)]
    # In kilohertz and bits; not every build of PyTorch tells them.
    clock = getattr(properties, "clock_rate", 0) * 1e3 or like.clock
    bandwidth = 2.0 * getattr(properties, "memory_clock_rate", 0) * 1e3 * getattr(properties, "memory_bus_width", 0) / 8
    return Chip(
        name=properties.name,
        capability=capability,
        processors=properties.multi_processor_count,
        shared_limit=getattr(properties, "shared_memory_per_block_optin", like.shared_limit),
        shared_total=getattr(properties, "shared_memory_per_multiprocessor", like.shared_total),
        clock=clock,
        bandwidth=bandwidth or like.bandwidth,
    )
