"""A kernel with everything it needs to be launched, or to be compiled where there is no GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fisedit_compile.operators.triton.devices import on_device


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        kernel: a function decorated by ``triton.jit``.
        grid: programs in each direction.
        arguments: tensors, integers and floating-point numbers by parameter name.
        constants: values of ``tl.constexpr`` parameters.
        warps, stages: of each program.
    """

    kernel: Any
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 2

    def run(self) -> None:
        """Launch on the current stream of the tensors' device."""
        tensor = next(value for value in self.arguments.values() if isinstance(value, torch.Tensor))
        with on_device(tensor):
            self.kernel[self.grid](**self.arguments, **self.constants, num_warps=self.warps, num_stages=self.stages)
