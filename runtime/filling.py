"""Recorded calls that filled what the network keeps, and what stands in for them in edits.

A network that makes a table at its first call and keeps it is one graph in that call and another one in all later
ones. What the first graph stored is of no use to the second. So the inputs of the call are kept as well, and an edit
that makes it by another graph has that one compute, once, what it would have stored. That is taken only where the
result is the recorded one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.runtime.base import OUTPUT_PREFIX, ProgramKey, RecordedCall, Recording, storage_of

#: By how much results of two graphs for one call may differ, as a share of the greatest value: by rounding.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass(eq=False)
class FillingCall:
    """The first recorded call of a graph that changes what the network keeps.

    Attributes:
        key: that graph.
        position: how many graph calls the recording had made before, of all graphs together.
        inputs: copies of what it was given besides parameters, by name.
        parameters: the names of its parameters, in the order of its weights.
        stand_ins: what other graphs would have stored in its place: recordings of one call.
    """

    key: ProgramKey
    position: int
    inputs: Mapping[str, Any]
    parameters: tuple[str, ...]
    stand_ins: dict[ProgramKey, Recording] = field(default_factory=dict)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that is kept, as often as it is referred to."""
        yield from (value for value in self.inputs.values() if isinstance(value, Tensor))
        for recording in self.stand_ins.values():
            for call in recording.calls:
                yield from call.stored()

    @property
    def bytes(self) -> int:
        """Bytes of the distinct tensors."""
        return sum({storage_of(tensor): tensor.untyped_storage().nbytes() for tensor in self.tensors()}.values())

    def shared_parameters(self, names: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The parameters that another graph reads as well.

        Args:
            names: of the parameters of that graph, in their order.

        Returns:
            Their numbers among the recorded ones, and among ``names``.
        """
        places = {name: number for number, name in enumerate(names)}
        both = [(number, places[name]) for number, name in enumerate(self.parameters) if name in places]
        return tuple(number for number, _ in both), tuple(place for _, place in both)


def recorded_outputs(call: RecordedCall, outputs: Sequence[Tensor]) -> list[str] | None:
    """The sites of a recorded call in which the outputs of another graph for the same inputs are found, in their order.

    The call may have returned more: what the network keeps.

    Returns:
        None: an output is none of the recorded ones, but for rounding.
    """
    names = sorted(
        (name for name in call if name.startswith(OUTPUT_PREFIX)), key=lambda name: int(name[len(OUTPUT_PREFIX) :])
    )
    found: list[str] = []
    for output in outputs:
        rest = names[names.index(found[-1]) + 1 :] if found else names
        same = next((name for name in rest if _equal_but_for_rounding(call[name], output)), None)
        if same is None:
            return None
        found.append(same)
    return found


def _equal_but_for_rounding(recorded: Tensor, computed: Tensor) -> bool:
    forms = [(value.shape, value.dtype, value.device) for value in (recorded, computed)]
    if forms[0] != forms[1]:
        return False
    if not (recorded.is_floating_point() or recorded.is_complex()):
        return torch.equal(recorded, computed)
    if not recorded.numel() or recorded.device.type == "meta":
        return True
    tolerance = TOLERANCES.get(recorded.dtype.to_real(), 0.0)
    wide = torch.promote_types(recorded.dtype, torch.float32)
    exact, other = recorded.to(wide), computed.to(wide)
    finite = exact.isfinite()
    if not torch.equal(finite, other.isfinite()):
        return False
    zero = torch.zeros((), dtype=wide, device=exact.device)
    exact, other = torch.where(finite, exact, zero), torch.where(finite, other, zero)
    return bool((exact - other).abs().max() <= tolerance * exact.abs().max())
