"""Edit sessions with every scheduler; one compiled session serves them all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines import AutomaticMask, EditSession
from fisedit_compile.pipelines.families.schedulers import SCHEDULER_NAMES, make_scheduler
from support.tiny_pipelines import picture_arguments, tiny_pipeline

KEEPS_DYNAMO = True
BASE, FIRST, SECOND = "a red ball on grass", "a blue ball on grass", "a blue box on sand"
STEPS = 6
CALLS = {"pndm": STEPS + 1, "heun": 2 * STEPS - 1}
DENSE_CALLS = {"pndm": 3, "heun": 4}


@pytest.fixture(scope="module")
def session() -> Iterator[EditSession]:
    torch.compiler.reset()
    yield EditSession(tiny_pipeline())
    torch.compiler.reset()


def generate(session: EditSession, **arguments: Any) -> Any:
    given = {"num_inference_steps": STEPS, **picture_arguments("text-to-image"), **arguments}
    return session.generate(BASE, generator=torch.Generator().manual_seed(4), **given)


def outside_is_kept(edited: Any, base: Any) -> bool:
    outside = ~edited.pixel_mask.unsqueeze(1).expand_as(edited.pixels)
    cells = ~edited.mask.unsqueeze(1).expand_as(edited.latents)
    return torch.equal(edited.pixels[outside], base.pixels[outside]) and torch.equal(
        edited.latents[cells], base.latents[cells]
    )


@pytest.mark.parametrize("name", SCHEDULER_NAMES)
def test_every_scheduler(session: EditSession, name: str) -> None:
    session.pipe.scheduler = make_scheduler(name, session.pipe.scheduler)
    calls = CALLS.get(name, STEPS)
    base = generate(session)
    assert (base.report.scheduler_steps, base.report.dense_calls) == (STEPS, calls)

    # Two of six steps find the mask.
    edited = session.edit(FIRST, automatic_mask=AutomaticMask(method="fisedit"))
    dense = DENSE_CALLS.get(name, 2)
    assert (edited.report.scheduler_steps, edited.report.dense_calls) == (STEPS, dense)
    assert edited.report.sparse_calls == calls - dense
    assert 0 < int(edited.mask.sum()) < edited.mask.numel()
    assert outside_is_kept(edited, base) and not torch.equal(edited.latents, base.latents)

    mask = torch.zeros(8, 12)
    mask[2:5, 3:8] = 1
    second = session.edit(SECOND, mask=mask)
    assert (second.report.dense_calls, second.report.sparse_calls) == (0, calls)
    assert outside_is_kept(second, edited) and not torch.equal(second.latents, edited.latents)

    # The same noise, the same prompt: every sparse step must repeat the recorded one.
    session.undo()
    session.undo()
    again = session.edit(BASE, mask=mask, keep=False)
    torch.testing.assert_close(again.latents, base.latents, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SCHEDULER_NAMES)
def test_a_full_mask_is_the_dense_edit(session: EditSession, name: str) -> None:
    pipe = session.pipe
    pipe.scheduler = make_scheduler(name, pipe.scheduler)
    generate(session)
    edited = session.edit(FIRST, mask=torch.ones(4, 6), keep=False)
    given = {"num_inference_steps": STEPS, **picture_arguments("text-to-image")}
    noise = torch.Generator().manual_seed(4)
    expected = pipe(FIRST, generator=noise, output_type="pt", **given).images
    torch.testing.assert_close(edited.pixels, expected, atol=1e-4, rtol=0)
    assert edited.report.sparse_calls == 0 and "whole picture" in edited.report.notes[0]


def test_noise_drawn_at_every_step_is_drawn_again(session: EditSession) -> None:
    session.pipe.scheduler = make_scheduler("ddim", session.pipe.scheduler)
    base = generate(session, eta=1.0)
    mask = torch.zeros(8, 12)
    mask[2:5, 3:8] = 1
    edited = session.edit(BASE, mask=mask, keep=False)
    torch.testing.assert_close(edited.latents, base.latents, atol=1e-4, rtol=1e-4)
    without = generate(session, eta=0.0)
    assert not torch.allclose(without.latents, base.latents, atol=1e-2)


def test_a_prompt_that_changes_nothing_gives_an_empty_mask(session: EditSession) -> None:
    session.pipe.scheduler = make_scheduler("ddim", session.pipe.scheduler)
    base = generate(session)
    edited = session.edit(
        BASE, keep=False, automatic_mask=AutomaticMask(method="fisedit", threshold=0.999999, opening=9)
    )
    assert not edited.mask.any() and torch.equal(edited.pixels, base.pixels)
    assert "empty" in edited.report.notes[0] and edited.report.sparse_calls == STEPS - 2


def test_a_mask_found_to_be_full_goes_on_densely(session: EditSession) -> None:
    session.pipe.scheduler = make_scheduler("ddim", session.pipe.scheduler)
    generate(session)
    everywhere = AutomaticMask(method="fisedit", growth=12)
    edited = session.edit(FIRST, automatic_mask=everywhere)
    assert edited.mask.all() and edited.report.dense_calls == STEPS
    assert "whole picture" in edited.report.notes[0]
    # It was recorded, so it can be edited.
    mask = torch.zeros(8, 12)
    mask[2:5, 3:8] = 1
    assert outside_is_kept(session.edit(SECOND, mask=mask), edited)


def test_a_single_step_finds_its_mask_too_late(session: EditSession) -> None:
    session.pipe.scheduler = make_scheduler("ddim", session.pipe.scheduler)
    base = generate(session, num_inference_steps=1)
    edited = session.edit(FIRST, keep=False, automatic_mask=AutomaticMask(method="fisedit"))
    assert edited.report.sparse_calls == 0 and "only after the last step" in edited.report.notes[0]
    assert outside_is_kept(edited, base)


def test_another_scheduler_needs_another_generation(session: EditSession) -> None:
    session.pipe.scheduler = make_scheduler("ddim", session.pipe.scheduler)
    generate(session)
    recorded = session.pipe.scheduler
    session.pipe.scheduler = make_scheduler("euler", recorded)
    with pytest.raises(PipelineError, match="generated with DDIMScheduler, the pipeline now has EulerDiscrete"):
        session.edit(FIRST)
    session.pipe.scheduler = type(recorded).from_config(recorded.config, timestep_spacing="trailing")
    with pytest.raises(PipelineError, match="timestep_spacing"):
        session.edit(FIRST)
    session.pipe.scheduler = recorded
    session.edit(FIRST, keep=False)
