"""Masks found by probes: which calls are made, on what, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

from fisedit_compile.errors import CallMismatchError, OptionError, PipelineError, WeightsChangedError
from fisedit_compile.pipelines import AutomaticMask, EditSession
from fisedit_compile.pipelines.binding import PipelineBinding
from fisedit_compile.pipelines.families.schedulers import make_scheduler
from support import transformer_pipelines as transformers
from support.tiny_pipelines import picture_arguments, tiny_pipeline, tiny_unet

KEEPS_DYNAMO = True
BASE, FIRST, SECOND = "a red ball on grass", "a blue ball on grass", "a blue box on sand"
STEPS, MANY = 4, 20
LOCAL = AutomaticMask(growth=0, global_share=1.0)
"""Random networks change everything a little."""


@pytest.fixture(scope="module")
def shared() -> Iterator[EditSession]:
    torch.compiler.reset()
    yield EditSession(tiny_pipeline(), automatic_mask=LOCAL)
    torch.compiler.reset()


@pytest.fixture
def session(shared: EditSession) -> EditSession:
    shared.reset()
    shared.pipe.scheduler = make_scheduler("ddim", shared.pipe.scheduler)
    return shared


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of all probes."""
    calls: list[dict[str, Any]] = []
    original = PipelineBinding.called_alone

    def called_alone(self: PipelineBinding, arguments: Any) -> Any:
        calls.append(dict(arguments))
        return original(self, arguments)

    monkeypatch.setattr(PipelineBinding, "called_alone", called_alone)
    return calls


def noise() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def generate(session: EditSession, prompt: Any = BASE, kind: str = "text-to-image", **arguments: Any) -> Any:
    given = {"num_inference_steps": STEPS, **picture_arguments(kind), **arguments}
    return session.generate(prompt, generator=noise(), **given)


def timesteps(session: EditSession) -> list[int]:
    scheduler = make_scheduler("ddim", session.pipe.scheduler)
    scheduler.set_timesteps(len(session._history.last.trajectory.latents))
    return [int(one) for one in scheduler.timesteps]


def embeddings(pipe: Any, prompt: str) -> torch.Tensor:
    """Of the empty negative prompt and of the prompt."""
    made = pipe.encode_prompt(prompt, "cpu", 1, True, "")
    return torch.cat([made[1], made[0]])


def test_scores_are_what_the_guided_prediction_changes_by(session: EditSession, probed: list[Any]) -> None:
    base, pipe, scale = generate(session), session.pipe, 7.5
    found = session.find_mask(FIRST)
    latents = torch.randn(base.latents.shape, generator=noise()) * pipe.scheduler.init_noise_sigma
    timestep = timesteps(session)[0]
    with torch.no_grad():
        before, now = (
            pipe.unet(torch.cat([latents] * 2), timestep, embeddings(pipe, prompt), return_dict=False)[0].chunk(2)
            for prompt in (BASE, FIRST)
        )
    guided = before[0] + scale * (before[1] - before[0])
    score = (scale * (now[1] - before[1])).abs().mean(dim=1) / guided.std()
    torch.testing.assert_close(found.scores, (score - score.min()) / (score.max() - score.min()), atol=2e-3, rtol=0)
    assert found.cost.score == pytest.approx(float(score.max()), rel=1e-3)
    # The conditional half alone: once with the new prompt, and once with the old one, for the floor.
    assert [len(arguments["sample"]) for arguments in probed] == [1, 1]
    assert (found.cost.dense_steps, found.cost.floor_steps, found.cost.probes) == (0.5, 0.5, 1)
    assert found.cost.floor is not None and 0 < found.cost.floor < 1e-3 * found.cost.score
    assert 0 < int(found.mask.sum()) < found.mask.numel() and session.history == (base,)


def test_an_edit_is_that_of_the_mask_found_before(session: EditSession, probed: list[Any]) -> None:
    base = generate(session)
    found = session.find_mask(FIRST)
    given = session.edit(FIRST, mask=found.mask, keep=False)
    edited = session.edit(FIRST, keep=False)
    assert torch.equal(edited.mask, found.mask) and torch.equal(edited.pixels, given.pixels)
    assert (edited.report.dense_calls, edited.report.sparse_calls) == (0, STEPS)
    assert edited.report.finding is not None and given.report.finding is None
    assert edited.report.finding.floor_steps == 0, "the floor belongs to the generation"
    assert edited.report.to_dict()["finding"]["dense_steps"] == 0.5 and "dense steps to find" in str(edited.report)
    outside = ~edited.pixel_mask.unsqueeze(1).expand_as(edited.pixels)
    assert torch.equal(edited.pixels[outside], base.pixels[outside]) and not torch.equal(edited.pixels, base.pixels)
    assert len(probed) == 3


@pytest.mark.parametrize("changes", [{}, {"prompt": BASE}, {"prompt": BASE, "negative_prompt": ""}])
def test_nothing_changed_needs_no_network(session: EditSession, probed: list[Any], changes: dict[str, Any]) -> None:
    base = generate(session)
    edited = session.edit(keep=False, **changes)
    assert not edited.mask.any() and torch.equal(edited.pixels, base.pixels) and not probed
    assert edited.report.finding.dense_steps == edited.report.finding.floor_steps == 0
    assert "the network is given what it was given before" in edited.report.notes[0]


def test_other_guidance_needs_no_network(session: EditSession, probed: list[Any]) -> None:
    generate(session)
    edited = session.edit(guidance_scale=3.0)
    finding = edited.report.finding
    assert 0 < int(edited.mask.sum()) < edited.mask.numel() and not probed
    assert finding.dense_steps == 0 and finding.score > 0 and finding.floor is None
    back = session.edit(guidance_scale=3.0, keep=False)
    assert not back.mask.any() and torch.equal(back.pixels, edited.pixels)


def test_long_runs_are_probed_twice_in_their_first_half(session: EditSession, probed: list[Any]) -> None:
    generate(session, num_inference_steps=MANY)
    found = session.find_mask(FIRST)
    assert found.cost.probes == 2 and found.cost.dense_steps == 1.0 and found.cost.floor_steps == 0.5
    times = timesteps(session)
    # The first call is that of the floor.
    assert [int(arguments["timestep"]) for arguments in probed[1:]] == [times[turn] for turn in (0, 6)]
    probed.clear()
    both = session.find_mask(FIRST, negative_prompt="sand")
    assert both.cost.dense_steps == 1.0 and [len(arguments["sample"]) for arguments in probed] == [2]


def test_on_an_edit_the_reference_is_computed_again(session: EditSession, probed: list[Any]) -> None:
    generate(session, num_inference_steps=MANY)
    session.edit(FIRST)
    probed.clear()
    again = session.find_mask(FIRST)
    assert not again.mask.any() and not probed, "the old prompt gives the recorded inputs"
    found = session.find_mask(SECOND)
    assert found.cost.dense_steps == 1.0 and found.cost.floor_steps == 0 and found.mask.any()
    old, new = probed
    assert torch.equal(old["sample"], new["sample"]) and len(new["sample"]) == 1
    assert torch.equal(new["encoder_hidden_states"], embeddings(session.pipe, SECOND)[1:])
    assert torch.equal(old["encoder_hidden_states"], embeddings(session.pipe, FIRST)[1:])


def test_a_floor_first_measured_on_an_edit_is_that_of_the_generation(session: EditSession, probed: list[Any]) -> None:
    base = generate(session)
    mask = torch.zeros(8, 12)
    mask[2:5, 3:8] = 1
    session.edit(FIRST, mask=mask)
    assert not probed
    cost = session.find_mask(SECOND).cost
    assert cost.floor_steps == 0.5 and cost.floor < 1e-3 * cost.score and len(probed) == 3
    assert torch.equal(probed[0]["encoder_hidden_states"], embeddings(session.pipe, BASE)[1:])
    session.undo()
    assert session.history == (base,) and session.find_mask(SECOND).cost.floor == cost.floor


def test_what_does_not_exceed_the_floor_is_rounding(session: EditSession, monkeypatch: pytest.MonkeyPatch) -> None:
    base = generate(session)
    score = session.find_mask(FIRST).cost.score
    assert score is not None
    floor = session._history.last.floor
    monkeypatch.setattr(floor, "value", score / 3.9)
    edited = session.edit(FIRST, keep=False)
    assert not edited.mask.any() and torch.equal(edited.pixels, base.pixels)
    assert "no more than rounding" in edited.report.notes[0]
    monkeypatch.setattr(floor, "value", score / 4.1)
    assert session.find_mask(FIRST).mask.any()


def test_global_changes_are_made_everywhere(session: EditSession) -> None:
    base = generate(session)
    arguments = {"num_inference_steps": STEPS, **picture_arguments("text-to-image")}
    edited = session.edit(FIRST, automatic_mask=AutomaticMask(growth=0, global_share=0.01))
    wanted = session.pipe(FIRST, generator=noise(), output_type="pt", **arguments).images
    assert edited.mask.all() and edited.report.finding.everything and edited.report.finding.share < 1
    torch.testing.assert_close(edited.pixels, wanted, atol=1e-4, rtol=0)
    assert "a change of all of it" in edited.report.notes[0] and "nothing was kept" in edited.report.notes[0]
    assert edited.report.dense_calls == STEPS and not torch.equal(edited.pixels, base.pixels)
    local = session.edit(SECOND, keep=False, automatic_mask=LOCAL)
    assert not local.report.finding.everything and not local.mask.all()


def test_pictures_of_a_batch_have_masks_of_their_own(session: EditSession, probed: list[Any]) -> None:
    base = generate(session, [BASE, SECOND])
    edited = session.edit([FIRST, SECOND], keep=False)
    assert edited.mask[0].any() and not edited.mask[1].any()
    assert torch.equal(edited.pixels[1], base.pixels[1]) and not torch.equal(edited.pixels[0], base.pixels[0])
    assert [len(arguments["sample"]) for arguments in probed] == [1, 1]
    assert edited.report.finding.dense_steps == 0.25


@pytest.mark.parametrize(("prompt", "turn"), [("", 2), (BASE, 0)])
def test_without_words_a_middle_call_is_probed(session: EditSession, probed: list[Any], prompt: str, turn: int) -> None:
    generate(session, prompt)
    assert session.find_mask(FIRST).mask.any()
    assert int(probed[-1]["timestep"]) == timesteps(session)[turn]


def test_two_calls_a_step(session: EditSession, probed: list[Any]) -> None:
    session.pipe.scheduler = make_scheduler("heun", session.pipe.scheduler)
    generate(session)
    edited = session.edit(FIRST, keep=False)
    calls = 2 * STEPS - 1
    assert edited.report.sparse_calls == calls and edited.report.finding.probes == 1
    assert edited.report.finding.dense_steps == pytest.approx(0.5 * STEPS / calls)
    assert 0 < int(edited.mask.sum()) < edited.mask.numel()


def test_another_setting_of_the_network_is_refused_before_a_probe(probed: list[Any]) -> None:
    pipe = tiny_pipeline()
    pipe.unet = tiny_unet(middle=True).eval()
    session = EditSession(pipe)
    generate(session)
    block = pipe.unet.mid_block.resnets[0]
    block.output_scale_factor, before = 2 * block.output_scale_factor, block.output_scale_factor
    try:
        with pytest.raises(CallMismatchError, match="a number of the network"):
            session.find_mask(FIRST)
    finally:
        block.output_scale_factor = before
    assert not probed and not session.find_mask(BASE).mask.any()


def test_growth_is_in_pixels_of_the_picture_with_either_method(session: EditSession) -> None:
    base = generate(session)
    # A latent cell has two pixels in each direction.
    for method in ("probe", "fisedit"):
        settings = AutomaticMask(method, threshold=0.8, opening=0)
        several = (replace(settings, growth_pixels=4), replace(settings, growth=2))
        pixels, cells = (session.edit(FIRST, keep=False, automatic_mask=one).mask for one in several)
        assert torch.equal(pixels, cells) and 0 < int(pixels.sum()) < pixels.numel()
    cells = session._history.last.trajectory.cells
    assert cells.pixels_per_position(session.pipe, base.pixels) == cells.pixels_per_position(session.pipe, None) == 2


def test_fisedits_method_finds_no_mask_without_an_edit(session: EditSession) -> None:
    generate(session)
    with pytest.raises(OptionError, match="find_mask needs AutomaticMask"):
        session.find_mask(FIRST, automatic_mask=AutomaticMask(method="fisedit"))
    edited = session.edit(FIRST, keep=False, automatic_mask=AutomaticMask(method="fisedit"))
    assert edited.report.finding.method == "fisedit" and edited.report.finding.dense_steps == 1


def test_what_cannot_be_edited_is_refused_before_a_probe(session: EditSession, probed: list[Any]) -> None:
    with pytest.raises(PipelineError, match="no picture to edit"):
        session.find_mask(FIRST)
    generate(session)
    with pytest.raises(PipelineError, match="height"):
        session.find_mask(FIRST, height=32)
    weight = session.pipe.unet.conv_in.weight
    with torch.no_grad():
        weight.mul_(2)
    try:
        with pytest.raises(WeightsChangedError):
            session.find_mask(FIRST)
    finally:
        with torch.no_grad():
            weight.div_(2)
    assert not probed and session.find_mask(FIRST).mask.any()


def test_a_cancelled_search_leaves_the_history(session: EditSession, monkeypatch: pytest.MonkeyPatch) -> None:
    base = generate(session)
    original = PipelineBinding.called_alone

    def cancelling(self: PipelineBinding, arguments: Any) -> Any:
        session.pipe._interrupt = True
        return original(self, arguments)

    with monkeypatch.context() as patch:
        patch.setattr(PipelineBinding, "called_alone", cancelling)
        with pytest.raises(PipelineError, match="cancelled while its mask was looked for"):
            session.edit(FIRST)
    assert session.history == (base,) and session.edit(FIRST).mask.any()


def test_callbacks_are_called_by_the_edit_alone(session: EditSession) -> None:
    generate(session)
    turns: list[int] = []

    def callback(pipe: Any, turn: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        turns.append(turn)
        return {}

    session.find_mask(FIRST, callback_on_step_end=callback)
    assert not turns
    session.edit(FIRST, callback_on_step_end=callback, keep=False)
    assert turns == list(range(STEPS))


@pytest.mark.parametrize("kind", ["xl", "inpaint-9"])
def test_added_conditions_and_inputs(kind: str, probed: list[Any]) -> None:
    session = EditSession(tiny_pipeline(kind), automatic_mask=LOCAL)
    # Three quarters of the steps, where there is a picture to begin with.
    generate(session, kind=kind, num_inference_steps=MANY + 8)
    found = session.find_mask(FIRST)
    assert found.cost.probes == 2 and found.cost.dense_steps == 1.0 and found.mask.any()
    assert all(len(arguments["sample"]) == 1 for arguments in probed)
    if kind == "xl":
        # The first one is that of the floor.
        old, *new = (arguments["added_cond_kwargs"] for arguments in probed)
        assert all(torch.equal(one["time_ids"], old["time_ids"]) for one in new)
        assert not any(torch.equal(one["text_embeds"], old["text_embeds"]) for one in new)
    else:
        assert all(arguments["sample"].shape[1] == 9 for arguments in probed)
    assert not session.find_mask(BASE).mask.any()


def controlled_pipeline() -> Any:
    pipe = tiny_pipeline()
    torch.manual_seed(1)
    # ControlNets have a middle block.
    pipe.unet = tiny_unet(middle=True).eval()
    # Its embedding of pictures makes one cell of 8x8 pixels; here a cell has 2x2.
    controlnet = ControlNetModel.from_unet(pipe.unet, conditioning_channels=3, load_weights_from_unet=False).eval()
    controlnet.controlnet_cond_embedding = torch.nn.Conv2d(3, 8, 2, stride=2)
    for parameter in controlnet.parameters():
        if not parameter.any():  # what is added is zero in the beginning
            torch.nn.init.normal_(parameter, std=0.05)
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    made = StableDiffusionControlNetPipeline(**parts, controlnet=controlnet, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def test_what_depends_on_call_and_prompt_is_known_of_the_first_call(probed: list[Any]) -> None:
    session = EditSession(controlled_pipeline(), automatic_mask=LOCAL)
    picture = picture_arguments("image-to-image")["image"]
    arguments = {"num_inference_steps": MANY, **picture_arguments("text-to-image"), "image": picture}
    session.generate(BASE, generator=noise(), **arguments)
    found = session.find_mask(FIRST)
    assert found.cost.probes == 1 and found.mask.any()
    old, new = (arguments["mid_block_additional_residual"] for arguments in probed)
    assert not torch.equal(old, new), "the residuals are those of the new prompt"
    assert not session.find_mask(BASE).mask.any()


COSTS = {"flux": 1.0, "sd3": 0.5, "qwen-image": 0.5, "pixart": 0.5}


@pytest.mark.parametrize("kind", COSTS)
def test_transformers(kind: str, probed: list[Any]) -> None:
    session = EditSession(transformers.transformer_pipeline(kind), automatic_mask=LOCAL)
    arguments = {"num_inference_steps": STEPS, **transformers.picture_arguments(kind)}
    session.generate(generator=noise(), **arguments, **transformers.prompt_arguments(kind, 1))
    edited = session.edit(**transformers.prompt_arguments(kind, 2), keep=False)
    finding = edited.report.finding
    assert finding.dense_steps == finding.floor_steps == COSTS[kind] and finding.probes == 1 and len(probed) == 2
    assert 0 < int(edited.mask.sum()) < edited.mask.numel() and edited.report.dense_calls == 0
    assert not session.edit(**transformers.prompt_arguments(kind, 1), keep=False).mask.any() and len(probed) == 2
    if kind == "flux":
        # Its guidance is an input of the network.
        assert session.edit(guidance_scale=9.0, keep=False).mask.any() and len(probed) == 3
    elif kind != "sd3":
        name = "true_cfg_scale" if kind == "qwen-image" else "guidance_scale"
        assert session.edit(**{name: 2.0}, keep=False).mask.any() and len(probed) == 2
