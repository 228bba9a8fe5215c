"""Random numbers: with or without a generator, edits have those of the recorded run, and nobody else's are touched."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines import EditSession
from fisedit_compile.pipelines.random_numbers import PROMPTS, SCHEDULER, RandomNumbers
from support.tiny_pipelines import HEIGHT, WIDTH, picture_arguments, tiny_pipeline

KEEPS_DYNAMO = True
BASE, FIRST = "a red ball on grass", "a blue ball on grass"
STEPS = 4
CLOSE: dict[str, float] = {"atol": 1e-4, "rtol": 0}


@pytest.fixture(scope="module")
def module_pipe() -> Iterator[Any]:
    torch.compiler.reset()
    yield tiny_pipeline()
    torch.compiler.reset()


@pytest.fixture
def pipe(module_pipe: Any) -> Iterator[Any]:
    scheduler = module_pipe.scheduler
    yield module_pipe
    module_pipe.scheduler = scheduler


def arguments(**changes: Any) -> dict[str, Any]:
    return {"num_inference_steps": STEPS, **picture_arguments("text-to-image"), **changes}


def box() -> Tensor:
    mask = torch.zeros(HEIGHT, WIDTH)
    mask[4:10, 6:16] = 1
    return mask


def check_same_noise(session: EditSession, base: Any) -> None:
    """Edits that change nothing give the picture that is edited, and take no random numbers of the process."""
    states = torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    for given in ({"mask": box(), "keep": False}, {"mask": torch.ones(HEIGHT, WIDTH)}, {"mask": box()}):
        torch.testing.assert_close(session.edit(**given).pixels, base.pixels, **CLOSE)
    assert torch.equal(states[0], torch.random.get_rng_state()) and states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()


class Adding(DDIMScheduler):
    """Adds noise after each step, from wherever a subclass says."""

    def noise(self, latents: Tensor) -> Tensor:
        return torch.randn_like(latents)

    def step(self, *positional: Any, **named: Any) -> Any:
        result = super().step(*positional, **named)
        latents = result[0] + 0.3 * self.noise(result[0])
        return (latents, *result[1:]) if isinstance(result, tuple) else type(result)(prev_sample=latents)


class SeededOnce(Adding):
    """As the Brownian trees of diffusers' stochastic solvers: a seed is drawn when the first noise is needed."""

    source: torch.Generator | None = None

    def set_timesteps(self, *positional: Any, **named: Any) -> None:
        super().set_timesteps(*positional, **named)
        self.source = None

    def noise(self, latents: Tensor) -> Tensor:
        if self.source is None:
            self.source = torch.Generator().manual_seed(int(torch.randint(0, 2**63 - 1, []).item()))
        return torch.randn(latents.shape, generator=self.source)


class InPlace(Adding):
    def noise(self, latents: Tensor) -> Tensor:
        made = torch.empty_like(latents).uniform_(-1, 1) + torch.empty(latents.shape).normal_(0, 0.1)
        return made + torch.rand(2, *latents.shape)[1]


class OfValues(Adding):
    """Draws by operators whose result depends on values."""

    def noise(self, latents: Tensor) -> Tensor:
        chance = torch.sigmoid(latents)
        return torch.bernoulli(chance) + torch.normal(chance, chance) + torch.nn.functional.dropout(latents)


class FromNumpy(Adding):
    def noise(self, latents: Tensor) -> Tensor:
        return torch.from_numpy(np.random.randn(*latents.shape)).float()


class FromPython(Adding):
    def noise(self, latents: Tensor) -> Tensor:
        return torch.full_like(latents, random.random())


@pytest.mark.parametrize("scheduler", [Adding, SeededOnce, InPlace, OfValues])
@pytest.mark.parametrize("seed", [None, 3])
def test_noise_of_schedulers_without_a_generator_is_repeated(pipe: Any, scheduler: Any, seed: int | None) -> None:
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    session = EditSession(pipe)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    base = session.generate(BASE, **arguments(generator=generator))
    check_same_noise(session, base)
    other = session.generate(BASE, **arguments(generator=generator))
    assert not torch.equal(other.latents, base.latents)


@pytest.mark.parametrize("scheduler", [FromNumpy, FromPython])
def test_noise_from_elsewhere_is_refused(pipe: Any, scheduler: Any) -> None:
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    session = EditSession(pipe)
    with pytest.raises(PipelineError, match=f"{scheduler.__name__} makes other latents when a step is repeated"):
        session.generate(BASE, **arguments())
    assert session.history == () and session.runtime.bases == ()


def test_first_noise_from_elsewhere_is_refused(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = type(pipe).prepare_latents

    def from_numpy(self: Any, *positional: Any, **named: Any) -> Tensor:
        latents: Tensor = prepare(self, *positional, **named)
        return torch.from_numpy(np.random.randn(*latents.shape)).float()

    monkeypatch.setattr(type(pipe), "prepare_latents", from_numpy)
    session = EditSession(pipe)
    base = session.generate(BASE, **arguments())
    with pytest.raises(PipelineError, match="first given other latents .* comes from elsewhere"):
        session.edit(FIRST, mask=box())
    assert session.history == (base,)


def test_pictures_that_are_encoded_with_the_global_generator_are_the_same_again() -> None:
    session = EditSession(tiny_pipeline("image-to-image"))
    base = session.generate(BASE, num_inference_steps=STEPS, **picture_arguments("image-to-image"))
    check_same_noise(session, base)


def test_without_a_generator_the_picture_is_the_pipelines(pipe: Any) -> None:
    pipe.scheduler = Adding.from_config(pipe.scheduler.config)
    torch.manual_seed(11)
    expected = pipe(BASE, output_type="pt", **arguments()).images
    state = torch.random.get_rng_state()
    torch.manual_seed(11)
    base = EditSession(pipe).generate(BASE, **arguments())
    torch.testing.assert_close(base.pixels, torch.as_tensor(expected), **CLOSE)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_callbacks_draw_what_they_want(pipe: Any) -> None:
    """The callback of an edit may be another one, and draw more or less, or from the run's own generator."""
    pipe.scheduler = Adding.from_config(pipe.scheduler.config)
    session, own = EditSession(pipe), torch.Generator().manual_seed(3)

    def drawing(given: Any, call: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        noise = torch.randn(tensors["latents"].shape, generator=own) + torch.randn_like(tensors["latents"])
        return {"latents": tensors["latents"] + 0.1 * noise}

    def idle(given: Any, call: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        torch.rand(7)
        return tensors

    base = session.generate(BASE, **arguments(generator=own, callback_on_step_end=drawing))
    state = own.get_state()
    check_same_noise(session, base)
    assert torch.equal(own.get_state(), state)
    quiet = session.generate(BASE, **arguments(generator=own))
    edit = session.edit(mask=box(), callback_on_step_end=idle)
    torch.testing.assert_close(edit.pixels, quiet.pixels, **CLOSE)


def test_a_run_that_draws_otherwise_is_refused() -> None:
    recorded = RandomNumbers()
    with recorded.running():
        torch.randn(2)
    again = RandomNumbers(recorded)
    with again.running(), pytest.raises(PipelineError, match=r"by aten\.randn\.default .* of another form"):
        torch.randn(3)
    again = RandomNumbers(recorded)
    with again.running():
        torch.randn(2)
        with pytest.raises(PipelineError, match=r"by aten\.rand\.default where the run of the picture drew nothing"):
            torch.rand(1)
    with again.running(), again.section(SCHEDULER):
        torch.rand(1)


def test_only_what_drew_is_followed() -> None:
    recorded = RandomNumbers()
    with recorded.running(), recorded.section(PROMPTS):
        value = torch.randn(2)
    again = RandomNumbers(recorded)
    with again.running():
        with again.section(PROMPTS):
            assert torch.equal(torch.randn(2), value) and again._on
            with again.paused():
                assert not again._on
        with again.section(SCHEDULER):
            assert not again._on


def test_compiled_functions_run_where_random_operators_are_followed() -> None:
    torch.compiler.reset()
    function, value = torch.compile(lambda x: (x * 2).relu() + 1, backend="aot_eager"), torch.randn(3)
    with RandomNumbers().running():
        found = function(value)
    assert torch.equal(found, (value * 2).relu() + 1)
    torch.compiler.reset()
