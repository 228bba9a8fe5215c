"""Probes: calls of the network with what an edit would give it, on the inputs of a recorded turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines.probing.memory import CallMemory, KeptCall, KeptTurn, prediction_of
from fisedit_compile.pipelines.probing.mixture import mixed, predictions_of, weights_of
from fisedit_compile.pipelines.probing.parts import can_be_split, differing_samples, of_samples, parts_of

Network = Callable[[Mapping[str, Any]], Any]
"""The pipeline's own network; takes its arguments by name."""


@dataclass(frozen=True)
class RoleChange:
    """What an edit gives the network otherwise in the calls of one role.

    Attributes:
        batch: samples of a call.
        samples: those that are given something else, by number.
        arguments: that are others, as the edit has them in its first turn.
        left_out: names of arguments that the edit does not give.
        every_turn: whether the edit gives these in all turns. Arguments that depend on the turn as well are known of
            the first turn alone.
    """

    batch: int
    samples: tuple[int, ...]
    arguments: Mapping[str, Any]
    left_out: frozenset[str]
    every_turn: bool

    def applied(self, recorded: Mapping[str, Any]) -> dict[str, Any]:
        """Recorded arguments with those of the edit."""
        return {name: value for name, value in {**recorded, **self.arguments}.items() if name not in self.left_out}


def changes_of(recorded: CallMemory, rehearsed: KeptTurn, latents: Sequence[str]) -> tuple[RoleChange, ...]:
    """What an edit changes, role by role, decided by the bits of the arguments of the first turn.

    Args:
        recorded: of the picture that is edited.
        rehearsed: the first turn of the edit.
        latents: what the network calls its latents; a probe is given the recorded ones.
    """
    pairs = zip(recorded.turns[0].calls, rehearsed.calls, recorded.varied, strict=True)
    return tuple(_change(before, now, {place[0] for place in varied}, latents) for before, now, varied in pairs)


def _change(before: KeptCall, now: KeptCall, varied: set[str | int], latents: Sequence[str]) -> RoleChange:
    batch, missing = _batch(before, latents), object()
    samples, names = [False] * batch, set()
    old, new = parts_of(before.arguments), parts_of(now.arguments)
    for place in {**old, **new}:
        apart = differing_samples(old.get(place, missing), new.get(place, missing), batch)
        if any(apart) and place[0] not in latents:
            names.add(str(place[0]))
            samples = [one or other for one, other in zip(samples, apart, strict=True)]
    if not all(can_be_split(call.arguments, batch) for call in (before, now)):
        samples = [any(samples)] * batch
    return RoleChange(
        batch,
        tuple(number for number, changed in enumerate(samples) if changed),
        {name: now.arguments[name] for name in names if name in now.arguments},
        frozenset(names - now.arguments.keys()),
        not names & varied,
    )


def _batch(call: KeptCall, latents: Sequence[str]) -> int:
    given = next((call.arguments[name] for name in latents if isinstance(call.arguments.get(name), Tensor)), None)
    told = call.output if given is None else given
    return 1 if told is None else int(told.shape[0])


class Prober:
    """Calls the network on the turns of one recorded run.

    Args:
        network: to call.
        memory: of the recorded run.
        changes: role by role.

    Attributes:
        calls: how often the network was called.
        share: of a turn's samples, how many were computed in all.
    """

    def __init__(self, network: Network, memory: CallMemory, changes: Sequence[RoleChange]) -> None:
        self.calls, self.share = 0, 0.0
        self._network, self._memory, self._changes = network, memory, changes

    @property
    def share_of_one(self) -> float:
        """The share of a turn's samples that one probe computes."""
        return sum(len(change.samples) for change in self._changes) / self._batch

    @property
    def _batch(self) -> int:
        return sum(change.batch for change in self._changes)

    def turn(self, number: int) -> KeptTurn | None:
        """A turn that can be probed; None: it was not kept, or its calls are not those of the first one."""
        turn = self._memory.turns.get(number)
        if turn is None or len(turn.calls) != len(self._changes) or turn.prediction is None:
            return None
        return turn if all(call.output is not None for call in turn.calls) else None

    def predictions(self, turn: KeptTurn, changed: bool) -> Tensor:
        """The predictions of a turn ``[K, B, values]``: computed for samples that change, recorded for the others.

        Args:
            turn: of the recorded run.
            changed: with what the edit gives the network; else with what the recorded run gave it.
        """
        outputs = [self._output(call, change, changed) for call, change in zip(turn.calls, self._changes, strict=True)]
        return predictions_of(outputs, known(turn.prediction))

    def _output(self, call: KeptCall, change: RoleChange, changed: bool) -> Tensor:
        recorded = known(call.output)
        if not change.samples:
            return recorded
        arguments = change.applied(call.arguments) if changed else dict(call.arguments)
        if len(change.samples) < change.batch:
            arguments = of_samples(arguments, list(change.samples), change.batch)
        made = prediction_of(self._network(arguments))
        self.calls += 1
        self.share += len(change.samples) / self._batch
        result = recorded.clone()
        result[list(change.samples)] = known(made)
        return result


def known(prediction: Tensor | None) -> Tensor:
    """A prediction that must be there.

    Raises:
        PipelineError: it is not.
    """
    if prediction is None:
        raise PipelineError(
            "the network returns no tensor as its prediction, or the scheduler is given none, so a mask cannot be "
            "found by probes; give a mask, or AutomaticMask(method='fisedit')"
        )
    return prediction


@dataclass(frozen=True)
class Mixed:
    """Predictions and how they are mixed to the guided one.

    Attributes:
        predictions: ``[K, B, values]``.
        weights: ``[K, B]``.
    """

    predictions: Tensor
    weights: Tensor


def recorded_mix(turn: KeptTurn) -> Mixed:
    """The predictions of a turn as they were recorded, and how the pipeline mixed them."""
    guided = known(turn.prediction)
    predictions = predictions_of([known(call.output) for call in turn.calls], guided)
    return Mixed(predictions, weights_of(predictions, guided))


def mixed_difference(turn: KeptTurn, before: Mixed, after: Mixed) -> Tensor:
    """How far two guided predictions of a turn are apart, as :func:`relative_difference`."""
    guided = [mixed(one.predictions, one.weights) for one in (before, after)]
    return relative_difference(turn, *guided)


def relative_difference(turn: KeptTurn, before: Tensor, after: Tensor) -> Tensor:
    """How far two guided predictions of a turn are apart, of their form ``[B, ...]``: absolute, over the deviation of
    the recorded one."""
    guided = known(turn.prediction)
    apart = (after.flatten(1).double() - before.flatten(1).double()).abs()
    deviation = guided.flatten(1).double().std(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return (apart / deviation).float().reshape(guided.shape)


class Floor:
    """How far the guided prediction is from the recorded one when the *old* prompt runs again: what rounding does.

    It belongs to the generation with which a history began, and is measured once.

    Args:
        memory: of that generation.

    Attributes:
        value: the greatest score; None: not measured yet.
    """

    def __init__(self, memory: CallMemory) -> None:
        self.value: float | None = None
        self._memory = memory

    def measured(
        self, network: Network, changes: Sequence[RoleChange], scores: Callable[[KeptTurn, Mixed, Mixed], Tensor]
    ) -> tuple[float, float]:
        """The value, and which share of a turn was computed for it now.

        Args:
            network: to call.
            changes: of an edit; the samples that it changes are those which run again.
            scores: of two guided predictions of a turn, ``[B, height, width]``.
        """
        if self.value is not None:
            return self.value, 0.0
        prober = Prober(network, self._memory, changes)
        turn = self._memory.turns[0]
        recorded = recorded_mix(turn)
        again = Mixed(prober.predictions(turn, changed=False), recorded.weights)
        self.value = float(scores(turn, recorded, again).max())
        return self.value, prober.share
