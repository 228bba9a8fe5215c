"""What PyTorch keeps of the memory of an NVIDIA GPU."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch


def end_failed_capture(device: torch.device, pool: Any) -> None:
    """Tell a GPU's allocator that a capture into ``pool`` is over; PyTorch before 2.13 forgets to when one fails."""
    with suppress(RuntimeError):  # it was told
        torch._C._cuda_endAllocateToPool(device.index, pool)
