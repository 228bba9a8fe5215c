"""That a call of a compiled network comes to its graphs.

PyTorch's compiler may run a network, or a call of it, without its graphs: the limit of graphs was reached outside of
record and edit, the compiler is switched off or told to run eagerly, a function's code is skipped. Then nothing is
recorded or edited, and the result looks like any other. No setting prevents all of that, so calls are looked at.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fisedit_compile.runtime.relay import PhaseSource

if TYPE_CHECKING:
    from fisedit_compile.runtime.phases import EditPhase, RecordPhase


def _nothing() -> None:
    """Behind a call outside of record and edit."""


@dataclass(frozen=True)
class ReachCheck:
    """Called before a call of a compiled network; what it returns is called behind that call, and raises where none of
    the network's graphs ran in between inside record or edit. After an error it does nothing: that one leaves.

    Attributes:
        source: what the network was compiled with.
    """

    source: PhaseSource

    def __call__(self) -> Callable[[], None]:
        """Begin a call.

        Returns:
            What ends it, in the same thread. It raises CallMismatchError.
        """
        phase = self.source.phase()
        if phase is None:
            return _nothing
        before, handled = phase.calls, sys.exc_info()[1]

        def end() -> None:
            if sys.exc_info()[1] is handled:
                _check(phase, before)

        return end


def _check(phase: RecordPhase | EditPhase, before: int) -> None:
    if phase.calls == before:
        raise phase.fail(
            "a call of a compiled network came to none of its graphs: PyTorch ran it without its compiler, so it was "
            "neither recorded nor edited. Expected every call inside record and edit to be compiled. If the network "
            "was called with many sizes or Python numbers before, its limit of graphs is reached: call "
            "torch._dynamo.reset(), or raise torch._dynamo.config.recompile_limit before the first call; see also that "
            "the compiler is not disabled or told to run eagerly (TORCHDYNAMO_DISABLE, torch.compiler.set_stance). "
            "TORCH_LOGS=recompiles,graph_breaks shows what PyTorch does"
        )
