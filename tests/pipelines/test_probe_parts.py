"""Arguments part by part, how pipelines mix predictions, and what a run keeps for probes."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines.probing.memory import CallMemory, kept_turns, prediction_of
from fisedit_compile.pipelines.probing.mixture import mixed, predictions_of, weights_of
from fisedit_compile.pipelines.probing.parts import can_be_split, differing_samples, of_samples, parts_of, same_part
from fisedit_compile.pipelines.probing.probes import changes_of


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_parts_are_compared_by_their_bits() -> None:
    nan = torch.tensor([float("nan"), 0.0])
    assert same_part(nan, nan.clone()) and not same_part(nan, torch.tensor([float("nan"), -0.0]))
    assert not same_part(torch.ones(2), torch.ones(2, dtype=torch.float64)) and not same_part(torch.ones(1), 1.0)
    assert same_part("text", "text") and not same_part(None, 0.5)
    assert same_part(torch.ones(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool))


@given(st.integers(1, 4), st.sets(st.integers(0, 3)), st.integers(1, 3))
def test_differing_samples_are_those_that_differ(batch: int, changed: set[int], width: int) -> None:
    before = random(batch, width, 2)
    now = before.clone()
    for number in changed:
        if number < batch:
            now[number, -1, 1] += 1
    expected = [number in changed for number in range(batch)]
    assert differing_samples(before, now, batch) == expected
    assert differing_samples(before, now.transpose(1, 2).contiguous().transpose(1, 2), batch) == expected


def test_what_is_not_of_samples_changes_all() -> None:
    assert differing_samples(1.0, 2.0, 3) == [True] * 3 and differing_samples(1.0, 1.0, 3) == [False] * 3
    assert differing_samples(torch.zeros(4), torch.ones(4), 2) == [True, True]
    assert differing_samples(None, torch.ones(2), 2) == [True, True]


class Pair(NamedTuple):
    left: Any
    right: Any


def test_samples_are_taken_out_of_all_that_has_them() -> None:
    arguments = {
        "sample": random(2, 3),
        "timestep": torch.tensor(5),
        "added": {"embeds": random(2, 4), "pair": Pair(random(2, 1), None)},
        "residuals": (random(2, 5), random(1, 5)),
        "plain": "text",
    }
    assert can_be_split(arguments, 2)
    taken = of_samples(arguments, [1], 2)
    assert taken["sample"].shape == (1, 3) and torch.equal(taken["sample"], arguments["sample"][1:])
    assert taken["added"]["embeds"].shape == (1, 4) and isinstance(taken["added"]["pair"], Pair)
    assert taken["residuals"][0].shape == taken["residuals"][1].shape == (1, 5) and taken["plain"] == "text"
    assert parts_of(arguments).keys() == parts_of(taken).keys()
    assert not can_be_split({**arguments, "sizes": [(1, 4, 4), (1, 4, 4)]}, 2), "one for each sample, in no tensor"


@given(st.floats(0.5, 20), st.integers(1, 3), st.booleans())
def test_weights_of_guidance_are_learnt(scale: float, pictures: int, apart: bool) -> None:
    negative, positive = random(pictures, 4, 5, 6), random(pictures, 4, 5, 6, seed=1)
    guided = negative + scale * (positive - negative)
    # One batch with the negative prompt first; or two calls, the positive first, which also predict a variance.
    more = [torch.cat([positive, positive], 1), torch.cat([negative, negative], 1)]
    outputs = more if apart else [torch.cat([negative, positive])]
    predictions = predictions_of(outputs, guided)
    weights = weights_of(predictions, guided)
    expected = [scale, 1 - scale] if apart else [1 - scale, scale]
    torch.testing.assert_close(weights, torch.tensor(expected).double().repeat(pictures, 1).T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mixed(predictions, weights).float(), guided.flatten(1), atol=1e-4, rtol=1e-4)


def test_two_equal_predictions_share_the_weight() -> None:
    same = random(1, 4, 5, 6)
    weights = weights_of(predictions_of([torch.cat([same, same])], same), same)
    torch.testing.assert_close(weights, torch.full((2, 1), 0.5).double())


def test_what_is_no_mixture_weighs_all_alike() -> None:
    predictions = predictions_of([random(2, 4, 5, 6)], random(1, 4, 5, 6, seed=2))
    assert weights_of(predictions, random(1, 4, 5, 6, seed=2)).flatten().tolist() == [1.0, 1.0]


def test_predictions_of_other_forms_are_refused() -> None:
    for output in (random(2, 4, 5), random(3, 4, 5, 6), random(2, 3, 5, 6)):
        with pytest.raises(PipelineError, match="cannot be found by probes"):
            predictions_of([output], random(2, 4, 5, 6))


def test_predictions_are_found_in_what_networks_return() -> None:
    tensor = random(1, 2)
    assert all(prediction_of(one) is tensor for one in (tensor, (tensor,), [tensor, None], {"sample": tensor}))
    assert prediction_of(None) is None and prediction_of(("text",)) is None and prediction_of(()) is None


def run(prompt: float, turns: int = 10, residual: bool = False) -> CallMemory:
    """A run with two calls a turn, of which the second is given the prompt."""
    memory = CallMemory()
    words = torch.full((1, 2), prompt)
    for turn in range(turns):
        for role in range(2):
            given: dict[str, Any] = {"sample": torch.full((1, 3), float(turn)), "time": torch.tensor(turn)}
            given["words"] = words if role else torch.zeros(1, 2)
            if residual and role:
                given["residual"] = turn * words
            memory.begin_call(given)
            memory.end_call((torch.full((1, 3), 10.0 * turn + role),))
        memory.predicted(torch.zeros(1, 3))
        memory.end_turn(turns)
    memory.close()
    return memory


def test_a_run_keeps_some_turns_and_what_varies() -> None:
    memory = run(1.0)
    assert tuple(memory.turns) == kept_turns(10) == (0, 3, 5)
    assert memory.varied == [{("sample",), ("time",)}] * 2
    call = memory.turns[3].calls[1]
    assert float(call.arguments["sample"][0, 0]) == 3.0 and call.output is not None and float(call.output[0, 0]) == 31.0


def test_kept_arguments_are_copies() -> None:
    memory, sample = CallMemory(), torch.zeros(1, 3)
    memory.begin_call({"sample": sample})
    sample.add_(1)
    assert not memory.turns[0].calls[0].arguments["sample"].any()
    memory.end_call(sample)
    memory.end_turn(2)
    memory.begin_call({"sample": sample})
    assert memory.varied == [{("sample",)}], "the object is the same, and its content is not"


def test_changes_are_told_role_by_role() -> None:
    negative, positive = changes_of(run(1.0), run(2.0, turns=1).turns[0], ("sample",))
    assert not negative.samples and positive.samples == (0,) and positive.every_turn
    applied = positive.applied({"sample": 7, "words": None})
    assert applied["sample"] == 7 and float(applied["words"][0, 0]) == 2.0
    assert not any(change.samples for change in changes_of(run(1.0), run(1.0, turns=1).turns[0], ("sample",)))


def test_what_depends_on_turn_and_prompt_is_of_the_first_turn_alone() -> None:
    recorded, edited = run(1.0, residual=True), run(2.0, turns=1, residual=True)
    recorded.turns[0].calls[1].arguments["residual"] += 1
    assert not changes_of(recorded, edited.turns[0], ("sample",))[1].every_turn
