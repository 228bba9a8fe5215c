"""The schedulers an edit session knows by name, and how many network calls each of their steps takes.

A pipeline calls ``callback_on_step_end`` once for each network call, or pair of them where guidance is a second call.
A scheduler step may take several: two with Heun's method, four in the Runge-Kutta warm-up of PNDM.  Masks are found
after a number of *steps*, recorded runs are lined up by *calls*, so the two are counted apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines.differences import told_apart

PNDM_WARM_UP_STEPS = 3
"""How many steps of PNDM run as Runge-Kutta steps of four calls each, unless they are skipped."""


@dataclass(frozen=True)
class KnownScheduler:
    """A scheduler that can be chosen by name.

    Attributes:
        name: what the command line calls it.
        class_name: its class in diffusers.
        options: changes to the pipeline's scheduler configuration.
        calls: how its steps map to network calls, in words.
    """

    name: str
    class_name: str
    options: Mapping[str, Any]
    calls: str


SCHEDULERS: tuple[KnownScheduler, ...] = (
    KnownScheduler("ddim", "DDIMScheduler", {}, "one call a step"),
    KnownScheduler("pndm", "PNDMScheduler", {"skip_prk_steps": True}, "two calls in the first step, then one"),
    KnownScheduler("euler", "EulerDiscreteScheduler", {}, "one call a step"),
    KnownScheduler("dpm++", "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}, "one call a step"),
    KnownScheduler("heun", "HeunDiscreteScheduler", {}, "two calls a step, one in the last"),
    KnownScheduler("lcm", "LCMScheduler", {}, "one call a step"),
)

PREDICTIONS = ("epsilon", "sample", "v_prediction")
"""What a network may predict for these schedulers; others are for flow matching."""

SCHEDULER_NAMES: tuple[str, ...] = tuple(known.name for known in SCHEDULERS)


def make_scheduler(name: str, current: Any) -> Any:
    """Build the scheduler ``name`` with the noise schedule of the scheduler ``current``.

    Raises:
        PipelineError: the name is none of :data:`SCHEDULER_NAMES`, or the scheduler is of another kind (flow matching).
    """
    import diffusers

    for known in SCHEDULERS:
        if known.name == name:
            predicted = current.config.get("prediction_type", "a flow")
            if predicted not in PREDICTIONS:
                raise PipelineError(
                    f"the pipeline's network predicts {predicted} for its {type(current).__name__}, and {name} expects "
                    f"one of {', '.join(PREDICTIONS)}; keep the pipeline's own scheduler"
                )
            return getattr(diffusers, known.class_name).from_config(current.config, **known.options)
    raise PipelineError(f"unknown scheduler {name!r}; choose one of {', '.join(SCHEDULER_NAMES)}")


def calls_for_steps(scheduler: Any, steps: int, total_calls: int) -> int:
    """After how many network calls ``steps`` steps of the scheduler are finished.

    Args:
        scheduler: a diffusers scheduler.
        steps: a number of scheduler steps, from 0.
        total_calls: number of calls of the whole run; the result is never more.
    """
    if steps <= 0:
        return 0
    if type(scheduler).__name__ == "PNDMScheduler":
        if scheduler.config.skip_prk_steps:
            calls = steps + 1
        else:
            calls = steps + 3 * min(steps, PNDM_WARM_UP_STEPS)
    else:
        calls = steps * int(getattr(scheduler, "order", 1))
    return min(calls, total_calls)


def steps_for_calls(scheduler: Any, total_calls: int) -> int:
    """How many scheduler steps a run of ``total_calls`` network calls makes: the least number that takes them all."""
    steps = range(total_calls + 1)
    return next(count for count in steps if calls_for_steps(scheduler, count, total_calls) == total_calls)


def describe_scheduler(scheduler: Any) -> tuple[str, dict[str, Any]]:
    """The class and the configuration of a scheduler: what two runs must share to be compared call by call."""
    settings = {name: value for name, value in dict(scheduler.config).items() if not name.startswith("_")}
    return type(scheduler).__name__, settings


def scheduler_difference(recorded: tuple[str, dict[str, Any]], current: tuple[str, dict[str, Any]]) -> str | None:
    """In words, how two scheduler descriptions differ, or None when they are the same."""
    if recorded[0] != current[0]:
        return f"the picture was generated with {recorded[0]}, the pipeline now has {current[0]}"
    names = sorted(recorded[1].keys() | current[1].keys())
    changed = [name for name in names if _text(recorded[1].get(name)) != _text(current[1].get(name))]
    if not changed:
        return None
    pairs = ((name, *told_apart(recorded[1].get(name), current[1].get(name))) for name in changed)
    values = ", ".join(f"{name} was {was} and is {now}" for name, was, now in pairs)
    return f"settings of the {recorded[0]} changed: {values}"


def _text(value: Any) -> str:
    """A comparable form of a setting: arrays do not compare to one truth value, and tuples come back as lists."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return repr(list(value)) if isinstance(value, (list, tuple)) else repr(value)
