"""What a graph input is traced as."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StaticTensor:
    """Shape, strides, dtype and device of a graph input, all known numbers."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def empty(self) -> Tensor:
        """A tensor of this form; a fake one in a fake mode."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class DynamicNumber:
    """A Python int that stays an input of the graph; ``hint`` is its value in the call being compiled."""

    hint: int
