"""A network that talks to a runtime as a compiled one does, without any compiler.

``h = x * weight + time`` and ``output = 2 * h``: every position for itself, so the sparse result outside the mask is
the recorded one and inside it the dense one. It stores ``h`` (spatial), its mean (a value) and the output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fisedit_compile.runtime import (
    Domain,
    EditPhase,
    PhaseSource,
    PlanInput,
    PlanSpec,
    ProgramKey,
    RecordedCall,
    RecordPhase,
    Runtime,
    Site,
)

CHANNELS, DOMAIN = 3, Domain(4, 6)
MAP_ORDER = (0, 2, 3, 1)


class FakeNetwork:
    """A network of one graph; ``weight`` is its only parameter.

    Attributes:
        fails: raise in the middle of the next call.
        last: what the last edit call was given.
    """

    def __init__(self, runtime: PhaseSource, name: str = "network", batch: int = 2) -> None:
        self.runtime = runtime
        self.weight = torch.nn.Parameter(torch.arange(1.0, CHANNELS + 1))
        self.name = name
        self.batch = batch
        shape = (batch, CHANNELS, DOMAIN.height, DOMAIN.width)
        self.sites = (
            Site("h", "spatial", DOMAIN, MAP_ORDER, 2, shape, torch.float32),
            Site("mean", "value", None, (), 0, (batch,), torch.float32),
            Site("output:0", "spatial", DOMAIN, MAP_ORDER, 2, shape, torch.float32, lossless=True),
        )
        self.fails = False
        self.last: RecordedCall | None = None
        self.plans: list[object] = []

    @property
    def key(self) -> ProgramKey:
        return ProgramKey(f"hash of {self.name}", (id(self.weight),), self.name)

    @property
    def spec(self) -> PlanSpec:
        return PlanSpec(DOMAIN, (DOMAIN,), (), self.batch, torch.device("cpu"))

    def dense(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """``(h, output)``, both ``[batch, CHANNELS, 4, 6]``."""
        h = x * self.weight.detach().view(1, -1, 1, 1) + time
        if self.fails:
            self.fails = False
            raise ArithmeticError("the computation failed")
        return h, 2 * h

    def __call__(self, x: Tensor, time: Tensor) -> Tensor:
        phase = self.runtime.phase()
        if phase is None:
            return self.dense(x, time)[1]
        if isinstance(phase, RecordPhase):
            phase.begin(self.key, [self.weight], [time], self.runtime.bytes_needed(self.sites))
            return self._store(phase, x, time)
        call = phase.begin(self.key, [self.weight], [time])
        self.last = call
        with phase.running(call):
            if not phase.dense_call:
                return self._edit(phase, call, x, time)
            return self._store(phase, x, time) if phase.saving else self.dense(x, time)[1]

    def _store(self, phase: RecordPhase | EditPhase, x: Tensor, time: Tensor) -> Tensor:
        h, output = self.dense(x, time)
        stores = {"h": h, "mean": h.mean((1, 2, 3)), "output:0": output}
        phase.commit(self.key, stores, self.sites, [x, time, output])
        return output

    def _edit(self, phase: EditPhase, call: RecordedCall, x: Tensor, time: Tensor) -> Tensor:
        plan = phase.plan(self.spec)
        self.plans.append(plan)
        output = call["output:0"].clone()
        if plan is None:
            if phase.saving:
                phase.commit(self.key, call, self.sites)
            return output
        index = plan.tensor(PlanInput("index", DOMAIN))
        assert index is not None
        valid = plan.tensor(PlanInput("valid", DOMAIN))
        h_rows, output_rows = (rows_of(value, index) for value in self.dense(x, time))
        if phase.saving:
            mean = call["mean"] + 1
            updates: Sequence[Tensor | None] = (h_rows, mean, output_rows)
            sites = phase.updated_sites(call, self.sites, updates, plan)
            phase.commit(self.key, sites, self.sites, [x, time])
        active = torch.zeros(self.batch, DOMAIN.size, dtype=torch.bool)
        active.scatter_(1, index.expand(self.batch, -1), True if valid is None else valid.expand(self.batch, -1))
        return torch.where(active.view(self.batch, 1, 4, 6), self.dense(x, time)[1], output)


def record_phase(runtime: Runtime) -> RecordPhase:
    """The calling thread's phase, inside record."""
    phase = runtime.phase()
    assert isinstance(phase, RecordPhase)
    return phase


def edit_phase(runtime: Runtime) -> EditPhase:
    """The calling thread's phase, inside edit."""
    phase = runtime.phase()
    assert isinstance(phase, EditPhase)
    return phase


def rows_of(value: Tensor, index: Tensor) -> Tensor:
    """Rows ``[B, N, C]`` of a map ``[B, C, H, W]`` at positions ``[1 or B, N]``."""
    rows = value.flatten(2).transpose(1, 2)
    return rows.gather(1, index.expand(value.shape[0], -1)[..., None].expand(-1, -1, value.shape[1]))


def inputs(
    count: int, seed: int = 0, batch: int = 2, dtype: torch.dtype = torch.float32
) -> list[tuple[Tensor, Tensor]]:
    """``count`` pairs of a map ``[batch, CHANNELS, 4, 6]`` and a 0-d time: 0, 10, 20, ..."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, CHANNELS, DOMAIN.height, DOMAIN.width)
    return [(torch.randn(shape, generator=generator), torch.tensor(10.0 * step)) for step in range(count)]


def run(network: FakeNetwork, calls: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Call ``network`` with every pair."""
    return [network(x, time) for x, time in calls]


def left_half(samples: int = 0) -> Tensor:
    """A mask of the left half: bool ``[4, 6]``, or ``[samples, 4, 6]``."""
    mask = torch.zeros(DOMAIN.height, DOMAIN.width, dtype=torch.bool)
    mask[:, :3] = True
    return mask.expand(samples, -1, -1).clone() if samples else mask
