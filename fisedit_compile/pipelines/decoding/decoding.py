"""Decoding the latents of an edit: sparsely, as a grown region, or densely, whichever is cheaper and possible.

The decoder is a network like any other: recorded in the generation, edited with the mask of the edit. It looks beyond
the mask, though, so its mask is grown by a *halo* of cells: pixels inside the mask then come out nearly as the dense
decode has them, and those in the halo tell how visible the seam is. Everything outside the mask is pasted from the
picture before.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fisedit_compile.errors import BudgetError, CallMismatchError, OptionError, WeightsChangedError
from fisedit_compile.pipelines.compiling import CompiledNetwork
from fisedit_compile.pipelines.decoding.region import (
    LOWEST_SHARE,
    RegionDecoder,
    Statistics,
    box_share,
    noting_decoder,
    unsupported,
)
from fisedit_compile.pipelines.masks.cells import grow_mask
from fisedit_compile.pipelines.twin import uncompiled, unmarked
from fisedit_compile.private.accelerate import is_offloaded
from fisedit_compile.private.dynamo import keep_sizes
from fisedit_compile.private.modules import compiled_call, original_module
from fisedit_compile.runtime import Relay, Runtime
from fisedit_compile.runtime.fingerprint import Weights

DECODERS = ("auto", "sparse", "region", "dense")

DECODER_RELAY = Relay()
"""What decoders are compiled with, so that the sessions of a pipeline share their graphs."""

SPARSE_EFFICIENCY = 0.6
"""Share of the arithmetic that a sparse decode saves which becomes speed; the rest is reading and writing rows."""

SAVING_COST = 0.1
"""What a kept edit copies, as a share of a dense decode: 2.8 GiB against 1.3 T multiply-accumulates, for Stable
Diffusion at 512x512."""


@dataclass(frozen=True)
class DecodeRecord:
    """What an edit can reuse of the decode of a picture.

    Attributes:
        decoder: the network.
        base: name of its recorded call; None when nothing was recorded, which ``reason`` explains.
        statistics: of its group norms, when they were noted.
        weights: of the network when they were noted.
        reason: why no call was recorded.
    """

    decoder: nn.Module
    base: str | None = None
    statistics: Statistics | None = None
    weights: Weights | None = None
    reason: str = ""


@dataclass(frozen=True)
class Decoding:
    """How a picture was decoded.

    Attributes:
        how: ``sparse``, ``region`` or ``dense``.
        reason: why, in words.
        mask: bool ``[B or 1, height, width]`` at the latents' resolution: what was decoded; None: everything.
        share: estimated cost as a share of a dense decode's arithmetic.
        setup: seconds of tracing and compiling, a part of the decode.
    """

    how: str
    reason: str
    mask: Tensor | None = None
    share: float = 1.0
    setup: float = 0.0


@dataclass
class DecodeJob:
    """The decode of one pipeline call: what it starts from, and in the end how it went.

    Attributes:
        name: of the picture that is made.
        keep: whether later edits may start from it.
        record: of the picture that is edited; None for a generation.
        mask: gives the mask when the decode begins; None from it: not known.
        pixels: of the picture that is edited ``[B, 3, height, width]``, 0 to 1.
        outcome: None until the decode is done.
        made: what later edits can reuse.
    """

    name: str
    keep: bool = True
    record: DecodeRecord | None = None
    mask: Callable[[], Tensor | None] = lambda: None
    pixels: Tensor | None = None
    outcome: Decoding | None = None
    made: DecodeRecord | None = None


@dataclass(frozen=True)
class _Plan:
    """A choice: how, why, at which estimated share of a dense decode."""

    how: str
    reason: str
    share: float = 1.0


class SparseDecoder:
    """Decodes for a session; falls back to a dense decode, with the reason, and never fails an edit for want of room.

    Args:
        runtime: where decodes are recorded; see ``Runtime.expendable``.
        options: of the backend, without ``runtime``.
        choice: one of :data:`DECODERS`; ``auto`` takes the cheapest.
        halo: cells by which the mask is grown.

    Raises:
        OptionError: there is no such choice, or the halo is negative.
    """

    def __init__(self, runtime: Runtime, options: dict[str, Any], choice: str, halo: int) -> None:
        if choice not in DECODERS:
            raise OptionError(f"decoder must be one of {', '.join(DECODERS)}, got {choice!r}")
        if halo < 0:
            raise OptionError(f"decoder_halo must not be negative, got {halo}")
        self.runtime = runtime
        self.halo = halo
        self._choice = choice
        self._options = dict(options)
        self._compiled: CompiledNetwork | None = None
        self._compiled_from: tuple[nn.Module, Any] | None = None

    def decode(self, vae: Any, job: DecodeJob, call: Callable[[], Any]) -> Any:
        """Decode once.

        Args:
            vae: a view of the autoencoder; its ``decoder`` is exchanged while it decodes.
            job: what is decoded; its outcome is set.
            call: decodes with whatever ``vae.decoder`` is.

        Returns:
            What ``call`` returns.
        """
        with DECODER_RELAY.using(self.runtime):
            return self._decode(vae, job, call)

    def _decode(self, vae: Any, job: DecodeJob, call: Callable[[], Any]) -> Any:
        decoder = original_module(vae.decoder)
        obstacle = _obstacle(vae, decoder)
        if obstacle is not None or self._choice == "dense":
            reason = obstacle or "asked for"
            job.outcome, job.made = Decoding("dense", reason), DecodeRecord(decoder, reason=reason)
            return call()
        plan, mask = self._plan(decoder, job)
        record = job.record
        if record is not None and mask is not None and plan.how != "dense":
            try:
                if plan.how == "sparse" and record.base is not None:
                    result = self._decode_sparsely(vae, decoder, job, record.base, mask, call)
                elif record.statistics is not None and record.weights is not None and job.pixels is not None:
                    record.weights.verify(list(decoder.parameters()), "of the decode")
                    stand_in = RegionDecoder(decoder, record.statistics, mask, 2 * job.pixels - 1)
                    result = _exchanged(vae, stand_in, call)
                    job.made = record
                job.outcome = Decoding(plan.how, plan.reason, mask, plan.share)
                return result
            except (CallMismatchError, WeightsChangedError) as error:
                plan = _Plan("dense", f"the recorded decode does not fit: {error.fact}")
        return self._decode_densely(vae, decoder, job, plan.reason, call)

    def _plan(self, decoder: nn.Module, job: DecodeJob) -> tuple[_Plan, Tensor | None]:
        """Choose how to decode, and the grown mask."""
        record, mask = job.record, job.mask()
        if record is None:
            return _Plan("dense", "a generation"), None
        if mask is None:
            return _Plan("dense", "the mask is not known"), None
        if record.decoder is not decoder:
            return _Plan("dense", "the autoencoder is another than when the picture was generated"), None
        grown = grow_mask(mask, self.halo)
        plans, reasons = [], []
        if self._choice in ("auto", "sparse"):
            if record.base is not None and record.base in self.runtime.bases:
                density = float(grown.float().mean(dim=(1, 2)).max())
                share = density / SPARSE_EFFICIENCY + (SAVING_COST if job.keep else 0.0)
                plans.append(_Plan("sparse", "its decode was recorded", share))
            else:
                reasons.append(record.reason or "the recorded decode gave way to the network's recordings")
        if self._choice in ("auto", "region"):
            if record.statistics is not None and job.pixels is not None:
                boxed = box_share(grown.any(dim=0)) if bool(grown.any()) else 0.0
                share = LOWEST_SHARE + (1 - LOWEST_SHARE) * boxed
                why = f"no decode was recorded: {'; '.join(reasons)}" if reasons else "asked for"
                plans.append(_Plan("region", why, share))
            elif not plans:
                reasons.append(unsupported(decoder) or "no statistics were noted")
        if not plans:
            return _Plan("dense", "; ".join(reasons)), grown
        best = min(plans, key=lambda plan: plan.share)
        if best.share >= 1.0 and self._choice == "auto":
            return _Plan("dense", f"the mask is so large that this is cheaper than {best.how}"), grown
        return best, grown

    def _compiled_decoder(self, decoder: nn.Module) -> Any:
        made_from = (decoder, compiled_call(decoder))
        if self._compiled is None or self._compiled_from != made_from:
            with unmarked(decoder):
                self._compiled = CompiledNetwork(uncompiled(decoder), DECODER_RELAY, self._options)
            self._compiled_from = made_from
            self._compiled.stand_in.register_forward_pre_hook(lambda _, latents: keep_sizes(latents))
        return self._compiled.stand_in

    def _decode_sparsely(
        self, vae: Any, decoder: nn.Module, job: DecodeJob, base: str, mask: Tensor, call: Callable[[], Any]
    ) -> Any:
        """An edit of the recorded decode; where there is no room to keep it, one that is not kept."""
        compiled = self._compiled_decoder(decoder)
        reason = ""
        if job.keep:
            try:
                with self.runtime.edit(base, mask=mask, save_as=job.name):
                    result = _exchanged(vae, compiled, call)
                job.made = DecodeRecord(decoder, job.name)
                return result
            except BudgetError as error:
                reason = error.fact
        with self.runtime.edit(base, mask=mask):
            result = _exchanged(vae, compiled, call)
        job.made = DecodeRecord(decoder, reason=reason)
        return result

    def _decode_densely(
        self, vae: Any, decoder: nn.Module, job: DecodeJob, reason: str, call: Callable[[], Any]
    ) -> Any:
        """A dense decode; recorded where there is room, and otherwise with its statistics noted."""
        missing = ""
        if job.keep and self._choice in ("auto", "sparse"):
            start = _now(vae)
            try:
                with self.runtime.record(job.name) as run:
                    result = _exchanged(vae, self._compiled_decoder(decoder), call)
                    setup = 0.0 if run.first_call is None else run.first_call - start
                job.made = DecodeRecord(decoder, job.name)
                job.outcome = Decoding("dense", reason, setup=setup)
                return result
            except BudgetError as error:
                missing = error.fact
        noting = job.keep and self._choice != "sparse" and unsupported(decoder) is None
        noter, statistics = noting_decoder(decoder) if noting else (decoder, None)
        result = _exchanged(vae, noter, call)
        weights = Weights(list(decoder.parameters())) if noting else None
        job.made = DecodeRecord(decoder, None, statistics, weights, missing)
        job.outcome = Decoding("dense", reason)
        return result


def _obstacle(vae: Any, decoder: Any) -> str | None:
    """Why an autoencoder can only be decoded densely; None when nothing stands in the way."""
    if not isinstance(decoder, nn.Module):
        return f"{type(vae).__name__} has no decoder network of its own"
    if getattr(vae, "use_tiling", False) or getattr(vae, "use_slicing", False):
        return "tiling or slicing of the autoencoder is on, and its parts are decoded one by one"
    if any(map(is_offloaded, (vae, decoder))):
        return "the autoencoder is offloaded between calls"
    return None


def _exchanged(vae: Any, decoder: Any, call: Callable[[], Any]) -> Any:
    """The result of ``call`` while ``decoder`` is the autoencoder's."""
    original = vae.decoder
    vae.decoder = decoder
    try:
        return call()
    finally:
        vae.decoder = original


def _now(vae: Any) -> float:
    """Seconds on the clock of ``RecordRun.first_call``, when an accelerator has nothing left to do."""
    device = next(vae.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
