"""Which dense graph a call runs: the plain one, or one that keeps or takes attention to the words of a prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fisedit_compile.errors import CallMismatchError, OptionError
from fisedit_compile.passes.caching.stabilise import NAME
from fisedit_compile.passes.common.program import Program, SparseProgram, Stabilisation
from fisedit_compile.runtime import EditPhase, RecordedCall, RecordPhase, Site

STABILISED = "dense call: stabilised"


@dataclass(frozen=True)
class DenseWay:
    """How a call runs densely.

    Attributes:
        running: the graph of the program that returns outputs only.
        storing: the one that also returns what is stored.
        sites: what that is.
        inputs: what both take behind all other inputs.
    """

    running: str
    storing: str
    sites: tuple[Site, ...]
    inputs: tuple[Tensor, ...] = ()


class DenseWays:
    """The ways in which the calls of one graph run densely.

    Args:
        program: of the graph; None: it could not be traced.
        label: names the graph in messages.
        whole: why the graph runs as a whole; None: it does not.

    Attributes:
        plain: neither keeps nor takes attention maps.
    """

    def __init__(self, program: Program | None, label: str, whole: str | None = None) -> None:
        self._label = label
        self._graphs: Stabilisation | None = program.stabilisation if isinstance(program, SparseProgram) else None
        self._batch = program.batch if isinstance(program, SparseProgram) else 1
        self._reasons = _reasons(program, whole)
        sites = program.sites if program is not None else ()
        self.plain = DenseWay("dense", "record", sites)
        self._keeping = (
            self.plain if self._graphs is None else DenseWay("dense", "record_maps", (*sites, *self._graphs.sites))
        )

    def of_recording(self, phase: RecordPhase) -> DenseWay:
        """How a call is recorded."""
        if not phase.attention.wanted:
            return self.plain
        if self._graphs is None:
            phase.attention.refuse(self._label, self._reasons)
            return self.plain
        phase.attention.calls += 1
        return self._keeping

    def stored_by(self, call: RecordedCall) -> tuple[Site, ...]:
        """What a recorded call stored."""
        return self._keeping.sites if call.keeps_attention else self.plain.sites

    def of_edit(self, phase: EditPhase, call: RecordedCall) -> DenseWay:
        """How a call of an edit runs densely. What the recorded call kept, a saved one keeps.

        Raises:
            CallMismatchError: it is to be stabilised, and the recorded call kept no attention maps.
            OptionError: the alignment is not one of the network's tokens and batch.
        """
        alignment, kept = phase.stabilising.alignment, call.keeps_attention
        if alignment is None or not phase.dense_call or self._graphs is None:
            return self._keeping if kept else self.plain
        if not kept:
            raise CallMismatchError(
                f"a dense call of {self._label} is to take its attention to shared words from the recording, and the "
                f"recorded call of base {phase.base.name!r} kept no attention maps",
                advice="record more calls with attention maps, or give the mask, or run.align(None), before this call",
            )
        maps = tuple(call[site.name] for site in self._graphs.sites)
        inputs = (*self._alignments(self._graphs, alignment, maps[0].device), *maps)
        phase.stabilising.calls += 1
        phase.count_ways({STABILISED: 1})
        return DenseWay("stabilised", "stabilised_save", self._keeping.sites, inputs)

    def _alignments(self, graphs: Stabilisation, alignment: Tensor, device: torch.device) -> list[Tensor]:
        """One for each number of tokens ``[B, tokens]``; no token of the others is shared."""
        samples, tokens = alignment.shape
        if tokens not in graphs.tokens:
            counts = " or ".join(map(str, graphs.tokens))
            raise OptionError(f"the alignment has {tokens} tokens, and cross-attention of {self._label} has {counts}")
        if self._batch % samples:
            raise OptionError(
                f"the alignment has {samples} samples, and {self._label} has a batch of {self._batch}, which is no "
                "multiple of it"
            )
        given = alignment.repeat(self._batch // samples, 1).to(device)
        return [
            given if count == tokens else torch.full((self._batch, count), -1, device=device) for count in graphs.tokens
        ]


def _reasons(program: Program | None, whole: str | None) -> list[str]:
    """Why a graph has attention whose maps cannot be kept, as far as it has any that is known."""
    misses = () if program is None else program.report.misses
    known = [miss.reason for miss in misses if miss.pass_name == NAME]
    return known if whole is None else [f"it runs as a whole: {whole}", *known]
