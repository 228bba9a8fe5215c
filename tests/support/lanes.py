"""A lane on a CPU whose copies happen as late as they may: whoever does not wait for them reads NaN."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fisedit_compile.runtime.tiers import Arrival

NAN = 0xFF  # in every byte of a floating-point number


class LateLane:
    """Copies wait in a queue until somebody waits for them.

    Attributes:
        log: what was asked for, in order: ``out``, ``in``, ``wait`` or ``finish``, with a number for each copy in.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self._queue: list[Callable[[], object]] = []
        self._blocks: list[Tensor] = []
        self._arrivals = self._copied = 0

    def holds(self, tensor: Tensor) -> bool:
        return any(tensor.untyped_storage().data_ptr() == block.untyped_storage().data_ptr() for block in self._blocks)

    def takes(self, tensor: Tensor) -> bool:
        return not self.holds(tensor)

    def allocate(self, size: int) -> Tensor:
        # Kept, so that no other tensor is ever taken for one of them.
        self._blocks.append(torch.full((size,), NAN, dtype=torch.uint8))
        return self._blocks[-1]

    def copy_out(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        self.log.append("out")
        self._queue += [partial(target.copy_, source) for source, target in zip(sources, targets, strict=True)]

    def copy_in(self, sources: Sequence[Tensor]) -> Arrival:
        number, self._arrivals = self._arrivals, self._arrivals + 1
        self.log.append(f"in {number}")
        blocks = [torch.full_like(source, NAN) for source in sources]
        self._queue += [partial(block.copy_, source) for source, block in zip(sources, blocks, strict=True)]
        arrived = self._copied + len(self._queue)

        def wait() -> None:
            self.log.append(f"wait {number}")
            self._run(arrived - self._copied)

        return Arrival(blocks, wait)

    def finish(self) -> None:
        self.log.append("finish")
        self._run(len(self._queue))

    def _run(self, count: int) -> None:
        for _ in range(count):
            with torch.inference_mode(False):
                self._queue.pop(0)()
            self._copied += 1
