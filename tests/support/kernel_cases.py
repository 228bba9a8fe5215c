"""Random tensors for the kernels, on the device that is tested."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from fisedit_compile.operators.triton.chips import chip_of

DEVICE = os.environ.get("FISEDIT_TEST_DEVICE", "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: The interpreter keeps bfloat16 as integers and multiplies matrices of them as such; some GPUs cannot.
FACTORS = DTYPES if DEVICE != "cpu" and chip_of(torch.device(DEVICE)).supports(torch.bfloat16) else DTYPES[:2]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normally distributed values."""
    generator = torch.Generator().manual_seed(seed + 7919 * len(shape) + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def positions(samples: int, count: int, size: int, seed: int = 0) -> Tensor:
    """Distinct positions in each sample, int64 ``[samples, count]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((samples, size), generator=generator).argsort(1)[:, :count].contiguous().to(DEVICE)


def flags(samples: int, count: int, seed: int = 0) -> Tensor:
    """Which rows are no padding, bool ``[samples, count]``."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand((samples, count), generator=generator) < 0.7).to(DEVICE)


def table(samples: int, count: int, taps: int, slots: int, seed: int = 0) -> Tensor:
    """Where taps read, int64 ``[samples, count, taps]`` below ``slots``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, slots, (samples, count, taps), generator=generator).to(DEVICE)


def conv_tensors(
    batch: int = 2,
    samples: int = 1,
    source: int = 6,
    halo: int = 5,
    count: int = 7,
    taps: int = 9,
    inputs: int = 20,
    outputs: int = 24,
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
    recorded_dtype: torch.dtype | None = None,
    bias: bool = True,
    size: int = 30,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, int]:
    """Arguments of ``conv_rows``: every kind of tap occurs, whatever the sizes."""
    length = taps * inputs // groups
    weight = (normal(outputs, length, seed=seed + 1) / length**0.5).to(dtype)
    return (
        normal(batch, source, inputs, dtype=dtype, seed=seed),
        normal(batch, size, inputs, dtype=recorded_dtype or dtype, seed=seed + 2),
        torch.cat([positions(1, halo, size, seed + number) for number in range(samples)]),
        table(samples, count, taps, source + halo + 1, seed),
        weight,
        normal(outputs, dtype=dtype, seed=seed + 3) if bias else None,
        groups,
    )
