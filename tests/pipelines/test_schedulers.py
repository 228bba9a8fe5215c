"""The table of schedulers: names, and steps against U-Net calls."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines.families.schedulers import (
    SCHEDULER_NAMES,
    calls_for_steps,
    describe_scheduler,
    make_scheduler,
    scheduler_difference,
    steps_for_calls,
)


@pytest.fixture
def current() -> Any:
    return diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)


@pytest.mark.parametrize("steps", [1, 2, 5, 10])
@pytest.mark.parametrize("name", SCHEDULER_NAMES)
def test_steps_and_calls_match_what_the_scheduler_does(name: str, steps: int, current: Any) -> None:
    scheduler = make_scheduler(name, current)
    scheduler.set_timesteps(steps)
    calls = len(scheduler.timesteps)
    assert steps_for_calls(scheduler, calls) == steps
    assert calls_for_steps(scheduler, steps, calls) == calls
    # With a single step PNDM has no other point to repeat it from.
    assert calls == {"pndm": min(steps + 1, 2 * steps - 1), "heun": 2 * steps - 1}.get(name, steps)


def finished_steps(scheduler: Any, steps: int) -> list[int]:
    """After which calls a step is done: where the noise level of the sample is not repeated by the next call.

    The noise level is read off a run with a network whose prediction is always zero: the sample is then scaled by a
    factor that depends on the noise level only.
    """
    scheduler.set_timesteps(steps)
    sample = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    levels = []
    for timestep in scheduler.timesteps:
        scheduler.scale_model_input(sample, timestep)
        sample = scheduler.step(torch.zeros_like(sample), timestep, sample).prev_sample
        levels.append(float(sample))
    return [call + 1 for call, level in enumerate(levels) if call + 1 == len(levels) or levels[call + 1] != level]


def test_pndm_repeats_its_first_step(current: Any) -> None:
    scheduler = make_scheduler("pndm", current)
    ends = finished_steps(scheduler, 6)
    assert ends == [calls_for_steps(scheduler, step, 7) for step in range(1, 7)] == [2, 3, 4, 5, 6, 7]


def test_pndm_with_its_runge_kutta_warm_up_makes_four_calls_a_step(current: Any) -> None:
    scheduler = diffusers.PNDMScheduler.from_config(current.config, skip_prk_steps=False)
    scheduler.set_timesteps(10)
    calls = len(scheduler.timesteps)
    assert [calls_for_steps(scheduler, step, calls) for step in (1, 2, 3, 4, 10)] == [4, 8, 12, 13, 19]
    assert calls == 19 and steps_for_calls(scheduler, calls) == 10


def test_no_steps_take_no_calls(current: Any) -> None:
    assert calls_for_steps(current, 0, 10) == 0
    assert calls_for_steps(current, 12, 10) == 10


def test_the_noise_schedule_is_taken_over(current: Any) -> None:
    for name in SCHEDULER_NAMES:
        made = make_scheduler(name, current)
        assert made.config.beta_end == 0.012 and made.config.beta_schedule == "scaled_linear"
    assert make_scheduler("dpm++", current).config.algorithm_type == "dpmsolver++"


def test_an_unknown_name_lists_the_known_ones(current: Any) -> None:
    with pytest.raises(PipelineError, match="ddim, pndm, euler, dpm\\+\\+, heun"):
        make_scheduler("nope", current)


def test_networks_that_predict_flows_keep_their_schedulers() -> None:
    with pytest.raises(PipelineError, match=r"predicts a flow for its FlowMatchEulerDiscreteScheduler, and ddim"):
        make_scheduler("ddim", diffusers.FlowMatchEulerDiscreteScheduler())


def test_differences_are_told(current: Any) -> None:
    recorded = describe_scheduler(current)
    assert (
        scheduler_difference(recorded, describe_scheduler(diffusers.DDIMScheduler.from_config(current.config))) is None
    )
    other_class = scheduler_difference(recorded, describe_scheduler(make_scheduler("heun", current)))
    assert other_class is not None and "HeunDiscreteScheduler" in other_class
    changed = diffusers.DDIMScheduler.from_config(current.config, timestep_spacing="trailing")
    told = scheduler_difference(recorded, describe_scheduler(changed))
    assert told is not None and "timestep_spacing was 'leading' and is 'trailing'" in told
