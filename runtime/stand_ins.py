"""What stands in, in an edit, for a recorded call that filled what the network keeps (see ``filling``)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from fisedit_compile.errors import FisEditError
from fisedit_compile.runtime.base import Base, ProgramKey, Recording, Scalar
from fisedit_compile.runtime.filling import FillingCall
from fisedit_compile.runtime.fingerprint import Weights
from fisedit_compile.runtime.scalars import copy_scalar
from fisedit_compile.runtime.spec import Site
from fisedit_compile.runtime.store import BaseWriter, Store

ErrorType = TypeVar("ErrorType", bound=FisEditError)


class StandIns:
    """Finds and makes them for one edit.

    Attributes:
        refused: why a graph could not stand in, the last time that it was tried.
    """

    def __init__(self, store: Store, base: Base) -> None:
        self._store = store
        self._base = base
        self.refused: str | None = None

    def due(
        self,
        key: ProgramKey,
        position: int,
        made: Collection[ProgramKey],
        parameters: Sequence[Tensor],
        names: Sequence[str],
    ) -> FillingCall | None:
        """The recorded call in place of which a graph is called, if that filled what the network keeps and was a call
        of another graph of the same network.

        Args:
            key: the graph.
            position: how many graph calls the edit has made.
            made: the graphs of which it has made some.
            parameters: of the graph, the very objects.
            names: of these parameters.
        """
        for filling in self._base.filling:
            if filling.position != position or filling.key in made or filling.key.graph_hash == key.graph_hash:
                continue
            numbers, places = filling.shared_parameters(names)
            if not numbers and filling.key.label != key.label:
                continue
            weights = self._base.recordings[filling.key].weights
            if weights.are([parameters[place] for place in places], numbers):
                return filling
        return None

    def weights(
        self, filling: FillingCall, key: ProgramKey, parameters: Sequence[Tensor], names: Sequence[str]
    ) -> Weights:
        """The weights of a graph that is to stand in for a recorded call, looked at now.

        Raises:
            WeightsChangedError: they are not those of the recording, as far as its graphs read them.
        """
        known = self._base.recordings.get(key)
        if known is not None:
            known.weights.verify(parameters, self._base.name)
            return known.weights
        numbers, places = filling.shared_parameters(names)
        recorded = self._base.recordings[filling.key].weights
        recorded.verify([parameters[place] for place in places], self._base.name, numbers)
        return Weights(parameters)

    def keep(
        self,
        filling: FillingCall,
        key: ProgramKey,
        weights: Weights,
        scalars: Sequence[Scalar],
        tensors: Mapping[str, Tensor],
        sites: Sequence[Site],
        protected: Sequence[Tensor] = (),
    ) -> None:
        """Keep what a graph would have stored in place of a recorded call, for this edit and later ones of the base.

        Args:
            filling: the recorded call.
            key: the graph.
            weights: of ``weights``.
            scalars: its scalar inputs in that call; copied.
            tensors, sites, protected: see ``RecordPhase.commit``. Tensors of the recorded call are shared with it.

        Raises:
            BudgetError: the budget does not leave them.
        """
        recorded = self._base.recordings[filling.key].calls[0]
        shared = frozenset(id(tensor) for tensor in recorded.stored())
        writer = BaseWriter(self._store, Base(self._base.name, parent=self._base))
        needed = sum(tensor.nbytes for tensor in tensors.values() if id(tensor) not in shared)
        writer.reserve(needed, f"computing the first recorded call of base {self._base.name!r} again")
        copied = tuple(copy_scalar(scalar) for scalar in scalars)
        writer.append(key, weights, copied, tensors, sites, protected, shared, recorded.lane)
        dropped = self._store.bases.get(self._base.name) is not self._base
        if dropped or key in filling.stand_ins:
            # Nobody would count down what is counted now: the base was dropped meanwhile, or another thread was faster.
            self._store.ledger.release(writer.base.tensors())
        filling.stand_ins.setdefault(key, writer.base.recordings[key])

    def find(self, key: ProgramKey, position: int, made: Collection[ProgramKey]) -> tuple[ProgramKey, Recording | None]:
        """The recorded graph as a call of which this one counts, and the recording with its counterpart."""
        for filling in self._base.filling:
            if filling.position == position and filling.key not in made and key in filling.stand_ins:
                return filling.key, filling.stand_ins[key]
        return key, self._base.recordings.get(key)

    def explained(self, error: ErrorType) -> ErrorType:
        """An error about calls that do not line up, with why nothing stood in for a recorded call, if that was so."""
        if self.refused is not None:
            error.reword(
                f"{error.fact}. In its first call inside record the network filled something that it keeps, such as a "
                f"table or a counter. That made another graph of this call than of later ones, and the recorded call "
                f"could not be computed again by the later one ({self.refused}). Call the network once before it is "
                "recorded, with inputs of the same sizes",
                error.advice,
            )
        return error
