"""What a run of an edit session cost and did."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

_TITLES = {
    "text": "text encoding",
    "prepare": "preparation",
    "setup": "first-call set-up",
    "dense": "dense steps",
    "mask": "finding the mask",
    "sparse": "sparse steps",
    "decode": "decoding",
    "total": "total",
}


@dataclass(frozen=True)
class SeamError:
    """Difference of the decoded pictures in the cells around the mask, before the base's pixels were pasted, 0 to 1."""

    greatest: float
    mean: float


@dataclass(frozen=True)
class MaskCost:
    """What finding a mask cost, and how it came about.

    Attributes:
        method: ``probe`` or ``fisedit``.
        dense_steps: what it cost in dense scheduler steps; half a batch counts half.
        probes: network calls for it beside the run; 0 with ``fisedit``.
        floor_steps: dense steps spent on the floor, which is measured at the first find of a history.
        score: with ``probe``, the greatest change of the guided prediction, over the deviation of the recorded one;
            None: nothing that decides the prediction is changed.
        floor: the same number for the old prompt run again; None: it was not needed.
        share: share of the picture that was found; None with ``fisedit``.
        everything: whether it was so great that the mask of a picture became everything.
    """

    method: str
    dense_steps: float = 0.0
    probes: int = 0
    floor_steps: float = 0.0
    score: float | None = None
    floor: float | None = None
    share: float | None = None
    everything: bool = False


@dataclass(frozen=True)
class Report:
    """What a generation or an edit cost and did.

    Attributes:
        seconds: by stage.  ``text``: text encoding; ``prepare``: everything else before the first network call;
            ``setup``: what the first network call of a phase took beyond the average of the phase's other calls, that
            is tracing, compiling, packing weights and making index plans (a phase of a single call cannot be split,
            its set-up stays in the phase), and tracing and compiling the decoder; ``dense`` and ``sparse``: network
            calls and scheduler steps of that phase; ``mask``: finding the automatic mask, with its probes, but without
            dense steps of the run; ``decode``: decoding and what follows; ``total``.
        scheduler_steps: number of scheduler steps.
        dense_calls, sparse_calls: number of network calls in each phase.
        stabilised_calls: number of dense calls that took the attention to shared words from the recorded run.
        density: active share of each resolution, such as ``{"64x64": 0.1}``, finest first; empty for a generation.
        dense_seconds: of an edit: total of the recorded dense run its history began with, without that run's set-up;
            ``speed_up`` compares with it.  None for a generation.
        cache_bytes: bytes that all recorded runs of the session hold, this one and decodes included.
        decoder: how the picture was decoded: ``sparse``, ``region`` or ``dense``; None: it was not.
        decoder_reason: why it was decoded that way, where there is something to say.
        decoder_density: active share of the latents' cells in the decode, the halo included; None: it was dense.
        decoder_bytes: bytes that the recorded decode of this picture refers to; 0: there is none.
        encodes_reused: how many encodes of input pictures were taken from the generation.
        finding: what finding the mask cost; None: it was given, or there is none.
        seam: the seam error of an edit that was decoded and pasted, otherwise None.
        seam_left: of an edit that was mixed with the picture before along the mask's edge, inside: the steps across the
            edge that are left; None: it was not mixed.
        notes: sentences on what was out of the ordinary, such as an empty mask.
    """

    seconds: Mapping[str, float]
    scheduler_steps: int
    dense_calls: int
    sparse_calls: int
    dense_seconds: float | None
    cache_bytes: int
    density: Mapping[str, float] = field(default_factory=dict)
    decoder: str | None = None
    decoder_reason: str = ""
    decoder_density: float | None = None
    decoder_bytes: int = 0
    encodes_reused: int = 0
    finding: MaskCost | None = None
    seam: SeamError | None = None
    seam_left: SeamError | None = None
    notes: tuple[str, ...] = ()
    stabilised_calls: int = 0

    @property
    def speed_up(self) -> float | None:
        """Seconds of the recorded dense run, without its set-up, over all seconds of this edit, with its set-up; None
        for a generation."""
        return None if self.dense_seconds is None else self.dense_seconds / self.seconds["total"]

    @property
    def speed_up_without_setup(self) -> float | None:
        """As ``speed_up``, with the set-up left out on both sides: what a second edit of the same kind reaches."""
        if self.dense_seconds is None:
            return None
        return self.dense_seconds / (self.seconds["total"] - self.seconds["setup"])

    def rows(self) -> list[tuple[str, str]]:
        """Pairs of a title and a value, for a table."""
        rows = [
            (_TITLES[stage], f"{value:.3f} s")
            for stage, value in self.seconds.items()
            if value or stage in ("setup", "total")
        ]
        rows.append(("scheduler steps", str(self.scheduler_steps)))
        rows.append(("dense network calls", str(self.dense_calls)))
        if self.stabilised_calls:
            rows.append(("of them stabilised", str(self.stabilised_calls)))
        rows.append(("sparse network calls", str(self.sparse_calls)))
        if self.finding is not None:
            rows.append(("dense steps to find the mask", f"{self.finding.dense_steps:g}"))
            if self.finding.floor_steps:
                rows.append(("dense steps for the floor", f"{self.finding.floor_steps:g}"))
        rows.extend((f"active at {resolution}", f"{share:.1%}") for resolution, share in self.density.items())
        if self.dense_seconds is not None:
            rows.append(("speed-up", f"{self.speed_up:.2f}x"))
            rows.append(("speed-up without set-up", f"{self.speed_up_without_setup:.2f}x"))
        rows.append(("cache", f"{self.cache_bytes / 2**20:.1f} MiB"))
        if self.decoder is not None:
            rows.append(("decoder", self.decoder))
        if self.decoder_density is not None:
            rows.append(("active in the decoder", f"{self.decoder_density:.1%}"))
        if self.decoder_bytes:
            rows.append(("recorded decode", f"{self.decoder_bytes / 2**20:.1f} MiB"))
        if self.seam is not None:
            rows.append(("seam error, greatest", f"{self.seam.greatest:.4f}"))
            rows.append(("seam error, mean", f"{self.seam.mean:.4f}"))
        if self.seam_left is not None:
            rows.append(("left at the seam, greatest", f"{self.seam_left.greatest:.4f}"))
            rows.append(("left at the seam, mean", f"{self.seam_left.mean:.4f}"))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values that JSON can hold."""
        return {
            "seconds": dict(self.seconds),
            "scheduler_steps": self.scheduler_steps,
            "dense_calls": self.dense_calls,
            "sparse_calls": self.sparse_calls,
            "stabilised_calls": self.stabilised_calls,
            "density": dict(self.density),
            "dense_seconds": self.dense_seconds,
            "speed_up": self.speed_up,
            "speed_up_without_setup": self.speed_up_without_setup,
            "cache_bytes": self.cache_bytes,
            "decoder": self.decoder,
            "decoder_reason": self.decoder_reason,
            "decoder_density": self.decoder_density,
            "decoder_bytes": self.decoder_bytes,
            "encodes_reused": self.encodes_reused,
            "finding": None if self.finding is None else asdict(self.finding),
            "seam": None if self.seam is None else {"greatest": self.seam.greatest, "mean": self.seam.mean},
            "seam_left": None if self.seam_left is None else asdict(self.seam_left),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(title) for title, _ in rows)
        lines = [f"{title:<{width}}  {value}" for title, value in rows]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def finest_first(density: Mapping[str, float]) -> dict[str, float]:
    """Densities by domain (``"64x48"``, ``"64x48 moved 1f3a"``), the one of most positions first."""
    return dict(sorted(density.items(), key=lambda item: -math.prod(map(int, item[0].split()[0].split("x")))))


def notes_on(mask: Tensor, sparse_calls: int, finding: MaskCost | None = None) -> tuple[str, ...]:
    """What a reader of the report should know about an unusual mask.

    Args:
        mask: bool, of the edit.
        sparse_calls: how many network calls were sparse.
        finding: how the mask came about; None: it was given.
    """
    if not bool(mask.any()):
        return (_why_empty(finding),)
    if finding is not None and finding.everything:
        found = f"the change covers {finding.share:.0%} of the picture, which is a change of all of it"
        if bool(mask.all()):
            return (f"{found}: the mask became everything, all steps ran densely, and nothing was kept of the picture",)
        return (f"{found}, on an average of the pictures: the masks of those that change most became everything",)
    if bool(mask.all()) and not sparse_calls:
        return ("the mask covers the whole picture, so all steps ran densely",)
    if not sparse_calls:
        return ("the mask was known only after the last step, so no step ran sparsely",)
    return ()


def _why_empty(finding: MaskCost | None) -> str:
    if finding is None:
        return "the mask is empty, so the picture is the one that was edited"
    empty = "the mask is empty: nothing was found to change, so the picture is the one that was edited"
    if finding.method != "probe":
        return empty
    if finding.score is None:
        return f"{empty} (the network is given what it was given before; what a callback changes needs a mask)"
    return f"{empty} (the predictions differ by no more than rounding)"
