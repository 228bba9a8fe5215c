"""Edits whose network calls differ from the recorded ones are refused before they are computed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor

from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines.masks.cells import LatentCells
from fisedit_compile.pipelines.network_calls import NetworkCalls
from fisedit_compile.pipelines.steps import StepFollower, Trajectory, followed_scheduler
from fisedit_compile.pipelines.timing import StageClock


def call(calls: NetworkCalls, tokens: int = 9, batch: int = 1, size: int = 8, **extra: Any) -> None:
    picture = torch.empty(batch, 4, size, size)
    calls.add({"hidden_states": picture, "prompt": torch.empty(batch, tokens, 3), **extra})


def recorded(*tokens: int) -> NetworkCalls:
    """A run of one turn with a call for each number of tokens, and another turn of the same."""
    calls = NetworkCalls()
    for _ in range(2):
        for count in tokens:
            call(calls, count, extra={"mask": [torch.empty(1, count)]})
        calls.end_turn()
    return calls


def test_the_same_calls_are_fine() -> None:
    calls = NetworkCalls(recorded(9, 7))
    for _ in range(2):
        call(calls, 9, extra={"mask": [torch.empty(1, 9)]})
        call(calls, 7, extra={"mask": [torch.empty(1, 7)]})
        calls.end_turn()
    with pytest.raises(PipelineError, match="made 4 network calls in the whole run, this one made 5"):
        call(calls)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokens": 12}, r"argument prompt was of shape \(1, 9, 3\) .* and is of shape \(1, 12, 3\) .* 12 tokens now"),
        ({"batch": 2}, r"hidden_states was of shape \(1, 4, 8, 8\) .* guidance or the number of prompts"),
        ({"size": 6}, r"hidden_states .* the size is not the same"),
        ({"extra": None}, r"extra\['mask'\]\[0\] was of shape \(1, 9\) .* and is not given .* guidance, the number of"),
    ],
)
def test_other_shapes_are_told(changed: dict[str, Any], message: str) -> None:
    calls = NetworkCalls(recorded(9))
    with pytest.raises(PipelineError, match=message):
        call(calls, **{"extra": {"mask": [torch.empty(1, 9)]}, **changed})


def test_a_prompt_as_long_as_the_negative_one_is_not_taken_for_it() -> None:
    calls = NetworkCalls(recorded(9, 7))
    with pytest.raises(PipelineError, match="7 tokens now and had 9"):
        call(calls, 7, extra={"mask": [torch.empty(1, 7)]})


def test_a_turn_of_another_number_of_calls_is_told() -> None:
    calls = NetworkCalls(recorded(9, 9))
    call(calls, extra={"mask": [torch.empty(1, 9)]})
    with pytest.raises(PipelineError, match=r"made 2 network calls in the first 1 turns .* made 1: guidance"):
        calls.end_turn()


def test_tokens_of_other_pictures_are_refused() -> None:
    calls = NetworkCalls(latents=["hidden_states"], tokens="hidden_states")
    calls.check_tokens(None, {140})
    calls.add({"hidden_states": torch.empty(1, 560, 4), "prompt": torch.empty(1, 9, 3)})
    calls.check_tokens(None, {140, 560})
    with pytest.raises(PipelineError, match="str gives its network 560 tokens, .* Generate without these others"):
        calls.check_tokens("a pipeline", {140})


def follow(pipe: Any, size: tuple[int, int] | None = None) -> tuple[StepFollower, dict[str, Any]]:
    """A follower behind the first turn of a run, and what it returned."""
    follower = StepFollower(None, ["latents"], StageClock(torch.device("cpu")), Trajectory(), size)
    return follower, follower(pipe, 0, None, {"latents": torch.zeros(1, 4, 6, 5)})


@pytest.fixture
def pipe() -> Any:
    return SimpleNamespace(num_timesteps=3, scheduler=SimpleNamespace(timesteps=torch.ones(3)), vae_scale_factor=8)


def test_latents_that_are_not_taken_are_noticed(pipe: Any) -> None:
    follower, returned = follow(pipe)
    latents: Tensor = returned["latents"]
    with pytest.raises(PipelineError, match="SimpleNamespace ignores the latents that callback_on_step_end returns"):
        follower(pipe, 1, None, {"latents": latents})
    returned.pop("latents")
    follower.check_obeyed(pipe)
    assert follower.trajectory.cells == LatentCells.of(latents)


def test_pictures_that_are_resized_in_the_end_are_refused(pipe: Any) -> None:
    follow(pipe, (48, 40))
    with pytest.raises(PipelineError, match="makes a picture of 48x40 pixels and resizes it to the 50x40 that"):
        follow(pipe, (50, 40))


@pytest.mark.parametrize("as_tuple", [True, False])
def test_pipelines_without_callbacks_go_on_with_the_followers_latents(as_tuple: bool) -> None:
    class Doubling:
        def step(self, output: Tensor, timestep: int, latents: Tensor) -> Any:
            return (2 * latents, output) if as_tuple else DDIMSchedulerOutput(2 * latents)

    class Adding(StepFollower):
        def __call__(self, pipe: Any, call: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            return {"latents": tensors["latents"] + 10 * call + timestep}

    follower = Adding(None, [], StageClock(torch.device("cpu")), Trajectory())
    pipe, latents = SimpleNamespace(scheduler=Doubling()), torch.ones(1)
    with followed_scheduler(pipe, follower):
        for timestep in (3, 5):
            result = pipe.scheduler.step(torch.zeros(1), timestep, latents)
            latents = result[0] if as_tuple else result.prev_sample
    assert float(latents) == 2 * (2 + 3) + 10 + 5 and "step" not in vars(pipe.scheduler)
