"""Finding the mask of an edit by probes.

The network is called with the *new* prompt on inputs of the *recorded* run. Where the guided prediction differs from
the recorded one, the picture will differ: a score for every latent cell, of which a region is made.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisedit_compile.errors import MaskError, PipelineError
from fisedit_compile.pipelines.families.schedulers import steps_for_calls
from fisedit_compile.pipelines.history import Entry
from fisedit_compile.pipelines.masks.regions import find_region, to_unit_range
from fisedit_compile.pipelines.masks.settings import AutomaticMask
from fisedit_compile.pipelines.probing.memory import KeptTurn, middle_turn, probed_turns
from fisedit_compile.pipelines.probing.parts import same_part
from fisedit_compile.pipelines.probing.probes import (
    Mixed,
    Prober,
    RoleChange,
    changes_of,
    known,
    mixed_difference,
    recorded_mix,
    relative_difference,
)
from fisedit_compile.pipelines.probing.rehearsal import Rehearsal
from fisedit_compile.pipelines.report import MaskCost
from fisedit_compile.pipelines.runs import Tools

MOST_DENSE_STEPS = 1.5
"""What the probes of an edit may cost, in dense steps, where one of them does not cost more."""
FEW_STEPS = 20
"""Runs of fewer steps are probed once."""
ABOVE_FLOOR = 4.0
"""How many times the floor the greatest score has to be."""


@dataclass(frozen=True, eq=False)
class FoundMask:
    """Where a new prompt changes the picture.

    Attributes:
        mask: bool ``[B, latent height, latent width]``, true where the picture may change; ``edit`` takes it.
        scores: ``[B, height, width]`` at the latents' resolution, or that of the tokens they are packed to: how much
            the prediction changes, from 0 to 1, the greatest change of a picture.
        seconds: that finding it took.
        text_seconds: of them, for encoding texts, which an edit does not encode again.
        cost: what was computed for it, and how it came about.
    """

    mask: Tensor = field(repr=False)
    scores: Tensor = field(repr=False)
    seconds: float
    text_seconds: float
    cost: MaskCost


class MaskSearch:
    """Finds the mask of one edit.

    Args:
        tools: of the session.
        given: arguments of the edit.
        base: the picture that is edited.
        settings: how to find the mask.
    """

    def __init__(self, tools: Tools, given: dict[str, Any], base: Entry, settings: AutomaticMask) -> None:
        self._tools, self._base, self._settings = tools, base, settings
        self._rehearsal = Rehearsal(tools, given, base)
        self._edited = base.picture.mask is not None

    def find(self) -> FoundMask:
        """Find it.

        Raises:
            PipelineError: the edit does not fit the recorded run; its predictions cannot be told; or the user asked
                for its end.
            MaskError: a prediction holds NaN.
        """
        began = time.perf_counter()
        memory = self._base.trajectory.memory
        first = self._rehearsal.first_turn()
        changes = changes_of(memory, first, self._base.trajectory.calls.latents)
        prober = Prober(self._network, memory, changes)
        weights = self._new_weights(first)
        cost = MaskCost("probe")
        maps: list[Tensor] = []
        if any(change.samples for change in changes):
            floor, floor_share = self._base.floor.measured(self._network, changes, self._scores)
            maps = [self._probed(prober, turn, weights) for turn in self._turns(prober, changes)]
            cost = replace(cost, floor=floor, floor_steps=floor_share * self._steps_per_turn)
        elif weights is not None:
            # What the pipeline makes of the recorded predictions tells, whatever its guidance is.
            recorded = memory.turns[0]
            maps = [self._mean(relative_difference(recorded, known(recorded.prediction), known(first.prediction)))]
        cost = replace(cost, probes=prober.calls, dense_steps=prober.share * self._steps_per_turn)
        return self._made(maps, cost, began)

    def _network(self, arguments: Mapping[str, Any]) -> Any:
        output = self._tools.binding.called_alone(arguments)
        if self._rehearsal.cancelled:
            raise PipelineError(
                "the run was cancelled while its mask was looked for (the pipeline's _interrupt was set); the history "
                "is as before"
            )
        return output

    @property
    def _turn_count(self) -> int:
        return len(self._base.trajectory.latents)

    @property
    def _steps(self) -> int:
        return steps_for_calls(self._tools.pipe.scheduler, self._turn_count)

    @property
    def _steps_per_turn(self) -> float:
        return self._steps / self._turn_count

    def _new_weights(self, first: KeptTurn) -> Tensor | None:
        """The weights ``[K, B]`` with which the edit mixes predictions; None: as the recorded run."""
        recorded = self._base.trajectory.memory.turns[0]
        before, now = recorded_mix(recorded), recorded_mix(first)
        if same_part(recorded.prediction, first.prediction):
            return None
        if torch.equal(before.predictions, now.predictions):
            return now.weights
        # A network in several graphs repeats its predictions but for rounding.
        near = torch.allclose(before.weights, now.weights, rtol=1e-3, atol=1e-3)
        return None if near else now.weights

    def _turns(self, prober: Prober, changes: tuple[RoleChange, ...]) -> list[KeptTurn]:
        """The turns to probe; at least one."""
        price = prober.share_of_one * self._steps_per_turn * (2 if self._edited else 1)
        numbers: tuple[int, ...] = probed_turns(self._turn_count)
        most = 1 if self._steps < FEW_STEPS else max(1, int(MOST_DENSE_STEPS / price))
        if not all(change.every_turn for change in changes):
            numbers = numbers[:1]
        elif without_words(self._base.arguments):
            # The first call then says next to nothing of where.
            numbers = (middle_turn(self._turn_count),)
        turns = [turn for number in numbers[:most] if (turn := prober.turn(number)) is not None]
        if not turns:
            raise PipelineError(
                f"{type(self._tools.pipe).__name__} gives its scheduler nothing that a mask could be found from by "
                "probes, or calls the network otherwise in the first step; give a mask, or "
                "AutomaticMask(method='fisedit')"
            )
        return turns

    def _probed(self, prober: Prober, turn: KeptTurn, weights: Tensor | None) -> Tensor:
        """The scores of a turn, ``[B, height, width]``, for which the network is called."""
        recorded = recorded_mix(turn)
        # The recording of an edit is what its mask made of it, and no zero.
        before = replace(recorded, predictions=prober.predictions(turn, changed=False)) if self._edited else recorded
        after = prober.predictions(turn, changed=True)
        return self._scores(turn, before, Mixed(after, recorded.weights if weights is None else weights))

    def _scores(self, turn: KeptTurn, before: Mixed, after: Mixed) -> Tensor:
        """How far two guided predictions of a turn are apart in each position, ``[B, height, width]``."""
        return self._mean(mixed_difference(turn, before, after))

    def _mean(self, difference: Tensor) -> Tensor:
        """The mean over channels in each position, ``[B, height, width]``."""
        return self._base.trajectory.cells.maps(difference).mean(dim=1)

    def _made(self, maps: list[Tensor], cost: MaskCost, began: float) -> FoundMask:
        cells, latents = self._base.trajectory.cells, self._base.trajectory.latents[-1]
        scores = torch.zeros_like(cells.maps(latents)[:, 0], dtype=torch.float32)
        pixels = cells.pixels_per_position(self._tools.pipe, self._base.decoded)
        region = np.zeros(tuple(scores.shape), dtype=bool)
        if maps:
            greatest = torch.stack([found.amax(dim=(1, 2)) for found in maps]).amax(dim=0)
            if not bool(torch.isfinite(greatest).all()):
                raise MaskError("the network's predictions hold NaN or infinity; no mask can be found")
            scores = to_unit_range(torch.stack([to_unit_range(found) for found in maps]).amax(dim=0))
            real = (greatest > 0) & (greatest >= ABOVE_FLOOR * (cost.floor or 0.0))
            for number in real.nonzero().flatten().tolist():
                region[number] = find_region(scores[number].cpu().numpy(), self._settings, pixels)
            cost = replace(cost, score=float(greatest.max()))
        shares = region.reshape(len(region), -1).mean(axis=1)
        everything = shares > self._settings.most_local
        region[everything] = True
        cost = replace(cost, share=float(shares.mean()), everything=bool(everything.any()))
        mask = cells.expand(torch.from_numpy(region).to(latents.device))
        return FoundMask(mask, scores, time.perf_counter() - began, self._rehearsal.text_seconds, cost)


def without_words(arguments: Mapping[str, Any]) -> bool:
    """Whether all prompts of a call are empty texts."""
    prompt = arguments.get("prompt")
    texts = [prompt] if isinstance(prompt, str) else prompt
    return isinstance(texts, (list, tuple)) and bool(texts) and all(text == "" for text in texts)
