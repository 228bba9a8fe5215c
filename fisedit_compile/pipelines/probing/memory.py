"""What a run keeps of its network calls for probes: arguments, outputs, and what the scheduler was given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fisedit_compile.pipelines.arguments import keep_value
from fisedit_compile.pipelines.probing.parts import Place, parts_of, same_part
from fisedit_compile.private.tensors import NOT_COUNTED, version_of


@dataclass
class KeptCall:
    """A network call that may be probed.

    Attributes:
        arguments: copies, by name.
        output: the prediction, ``[batch, ...]``; None: the network returned none.
    """

    arguments: dict[str, Any]
    output: Tensor | None = None


@dataclass
class KeptTurn:
    """A turn of the pipeline's loop that may be probed.

    Attributes:
        calls: of the network, in order; the place of a call in its turn is its role.
        prediction: what the scheduler was given, ``[B, ...]``: the guided prediction. None: that is not known.
    """

    calls: list[KeptCall]
    prediction: Tensor | None = None


def probed_turns(turns: int) -> tuple[int, int]:
    """The turns of a loop that are probed: the first one, and one in the first half."""
    return 0, 3 * turns // 10


def middle_turn(turns: int) -> int:
    """The turn of a loop that is probed where the recorded prompt says nothing."""
    return turns // 2


def kept_turns(turns: int | None) -> tuple[int, ...]:
    """The turns of a loop of which everything is kept that probes may need.

    Args:
        turns: of the loop; None: not known yet.
    """
    return (0,) if turns is None else tuple(sorted({*probed_turns(turns), middle_turn(turns)}))


class CallMemory:
    """What one run keeps; it is filled by hooks in front of and behind the network and the scheduler.

    Attributes:
        turns: that may be probed, by number.
        varied: for every role, the parts of the arguments that were not the same in all turns.
    """

    def __init__(self) -> None:
        self.turns: dict[int, KeptTurn] = {}
        self.varied: list[set[Place]] = []
        self._first: list[dict[Place, Any]] = []
        self._given: list[dict[Place, tuple[Any, int]]] = []
        self._turn = self._role = 0
        self._total: int | None = None

    def begin_call(self, arguments: Mapping[str, Any]) -> None:
        """The network is about to be called with these arguments."""
        if self._turn in kept_turns(self._total):
            kept = {name: keep_value(value) for name, value in arguments.items()}
            self.turns.setdefault(self._turn, KeptTurn([])).calls.append(KeptCall(kept))
        parts = parts_of(arguments)
        if not self._turn:
            self._first.append(parts_of(self.turns[0].calls[-1].arguments))
            self._given.append({place: _version(value) for place, value in parts.items()})
            self.varied.append(set())
        elif self._role < len(self._first):
            self._compare(self._role, parts)

    def _compare(self, role: int, parts: Mapping[Place, Any]) -> None:
        """Note which parts are not those of the first turn; what is the very object that it was needs no look."""
        first, given, missing = self._first[role], self._given[role], object()
        for place in {**first, **parts}.keys() - self.varied[role]:
            value = parts.get(place, missing)
            was, version = given.get(place, (missing, NOT_COUNTED))
            unchanged = value is was and version != NOT_COUNTED and _version(value)[1] == version
            if not unchanged and not same_part(first.get(place, missing), value):
                self.varied[role].add(place)
                given.pop(place, None)

    def end_call(self, output: Any) -> None:
        """The network returned."""
        turn = self.turns.get(self._turn)
        if turn is not None and self._role < len(turn.calls):
            prediction = prediction_of(output)
            turn.calls[self._role].output = None if prediction is None else prediction.detach().clone()
        self._role += 1

    def predicted(self, prediction: Any) -> None:
        """The scheduler is about to make a step of this prediction."""
        turn = self.turns.get(self._turn)
        if turn is not None and isinstance(prediction, Tensor):
            turn.prediction = prediction.detach().clone()

    def end_turn(self, total: int) -> None:
        """A turn of the loop is done; it has so many."""
        self._total = total
        self._turn, self._role = self._turn + 1, 0

    def close(self) -> None:
        """The run is over."""
        self._first, self._given = [], []


def _version(value: Any) -> tuple[Any, int]:
    return value, version_of(value) if isinstance(value, Tensor) else NOT_COUNTED


def prediction_of(output: Any) -> Tensor | None:
    """The prediction in what a network returned: a tensor, or the first of several; None: there is none."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, (list, tuple)) and output and isinstance(output[0], Tensor):
        return output[0]
    return None
