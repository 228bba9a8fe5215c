"""History, undo, callbacks, failures and wrong use; one compiled session serves them all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.callbacks import PipelineCallback
from PIL import Image
from torch._dynamo.utils import counters

from fisedit_compile.errors import MaskError, PipelineError, WeightsChangedError
from fisedit_compile.pipelines import AutomaticMask, EditSession
from support.tiny_pipelines import HEIGHT, WIDTH, picture_arguments, tiny_pipeline

KEEPS_DYNAMO = True
BASE, FIRST, SECOND = "a red ball on grass", "a blue ball on grass", "a blue box on sand"
STEPS = 4


@pytest.fixture(scope="module")
def module_session() -> Iterator[EditSession]:
    torch.compiler.reset()
    yield EditSession(tiny_pipeline())
    torch.compiler.reset()


@pytest.fixture
def session(module_session: EditSession) -> EditSession:
    module_session.reset()
    return module_session


def generate(session: EditSession, prompt: Any = BASE, **arguments: Any) -> Any:
    given = {"num_inference_steps": STEPS, **picture_arguments("text-to-image"), **arguments}
    return session.generate(prompt, generator=torch.Generator().manual_seed(4), **given)


def box() -> torch.Tensor:
    mask = torch.zeros(HEIGHT, WIDTH)
    mask[4:10, 6:16] = 1
    return mask


def test_history_and_undo(session: EditSession) -> None:
    assert session.history == ()
    base = generate(session)
    first = session.edit(FIRST, mask=box())
    second = session.edit(SECOND, mask=box())
    assert session.history == (base, first, second)
    assert session.runtime.bases == (base.name, first.name, second.name)
    assert [picture.prompt for picture in session.history] == [BASE, FIRST, SECOND]
    assert session.undo() is first
    assert session.history == (base, first) and session.runtime.bases == (base.name, first.name)
    again = session.edit(SECOND, mask=box())
    assert torch.equal(again.pixels, second.pixels), "an edit after undo starts from the same base"
    session.undo()
    assert session.undo() is base
    with pytest.raises(PipelineError, match="no edit to undo"):
        session.undo()
    assert session.history == (base,)


def test_edits_that_are_not_kept_leave_no_trace(session: EditSession) -> None:
    base = generate(session)
    tried = session.edit(FIRST, mask=box(), keep=False)
    assert session.history == (base,) and session.runtime.bases == (base.name,)
    kept = session.edit(FIRST, mask=box())
    assert torch.equal(tried.pixels, kept.pixels)


def test_generating_again_starts_a_new_history(session: EditSession) -> None:
    first = generate(session)
    session.edit(FIRST, mask=box())
    second = generate(session)
    assert session.history == (second,) and session.runtime.bases == (second.name,)
    assert torch.equal(first.pixels, second.pixels)


def test_sessions_of_a_pipeline_share_its_graphs(session: EditSession) -> None:
    base = generate(session)
    expected = session.edit(FIRST, mask=box(), keep=False)
    graphs = counters["stats"]["unique_graphs"]
    # More of them than Dynamo keeps graphs of a function by default.
    others = [EditSession(session.pipe) for _ in range(9)]
    for other in others:
        generate(other, SECOND)
    assert torch.equal(session.edit(FIRST, mask=box(), keep=False).pixels, expected.pixels), "others do not matter"
    assert session.history == (base,) and session.runtime.stats.calls["record"] >= STEPS
    for other in others[:2]:
        edited = other.edit(FIRST, mask=box())
        assert other.runtime.bases == (other.history[0].name, edited.name)
        assert other.runtime.stats.calls == {"record": STEPS, "edit": STEPS, "dense": 0}
        assert edited.report.decoder == "sparse"
        assert not torch.equal(edited.pixels, expected.pixels), "it is edited from a picture of its own"
    assert counters["stats"]["unique_graphs"] == graphs


def test_an_edit_needs_a_picture(session: EditSession) -> None:
    with pytest.raises(PipelineError, match="call generate or open first"):
        session.edit(FIRST)
    with pytest.raises(PipelineError, match="no edit to undo"):
        session.undo()


def test_the_users_generator_is_left_alone_by_edits(session: EditSession) -> None:
    own = torch.Generator().manual_seed(9)
    session.generate(BASE, num_inference_steps=STEPS, generator=own, **picture_arguments("text-to-image"))
    state = own.get_state()
    session.edit(FIRST, mask=box())
    assert torch.equal(own.get_state(), state)
    twin = torch.Generator().manual_seed(9)
    session.pipe(BASE, num_inference_steps=STEPS, generator=twin, **picture_arguments("text-to-image"))
    assert torch.equal(twin.get_state(), state), "generating must use the generator as the pipeline does"


def test_without_a_generator_one_is_made(session: EditSession) -> None:
    torch.manual_seed(2)
    base = session.generate(BASE, num_inference_steps=STEPS, **picture_arguments("text-to-image"))
    again = session.edit(BASE, mask=torch.ones(2, 2), keep=False)
    torch.testing.assert_close(again.pixels, base.pixels, atol=1e-5, rtol=0)
    torch.manual_seed(2)
    repeated = session.generate(BASE, num_inference_steps=STEPS, **picture_arguments("text-to-image"))
    assert torch.equal(repeated.pixels, base.pixels)


@pytest.mark.parametrize("form", ["pil", "numpy", "torch"])
def test_masks_of_every_type(session: EditSession, form: str) -> None:
    generate(session)
    white = (box() > 0).numpy().astype(np.uint8) * 255
    mask: Any = {"pil": Image.fromarray(white), "numpy": white, "torch": box()}[form]
    edited = session.edit(FIRST, mask=mask, keep=False)
    assert edited.mask is not None and edited.mask.nonzero().tolist() == [
        [0, row, column] for row in (2, 3, 4) for column in (3, 4, 5, 6, 7)
    ]
    assert edited.mask_image is not None
    assert np.array_equal(np.asarray(edited.mask_image), white)


def test_an_empty_mask_returns_the_base(session: EditSession) -> None:
    base = generate(session)
    edited = session.edit(FIRST, mask=torch.zeros(HEIGHT, WIDTH), keep=False)
    assert torch.equal(edited.pixels, base.pixels) and torch.equal(edited.latents, base.latents)
    assert "mask is empty" in edited.report.notes[0]


def test_several_pictures_with_a_mask_each(session: EditSession) -> None:
    base = generate(session, [BASE, SECOND])
    masks = torch.zeros(2, HEIGHT, WIDTH)
    masks[0, 2:8, 2:8] = 1
    masks[1, 8:14, 10:20] = 1
    edited = session.edit([FIRST, BASE], mask=masks)
    outside = ~edited.pixel_mask.unsqueeze(1).expand_as(edited.pixels)
    assert torch.equal(edited.pixels[outside], base.pixels[outside])
    assert all(not torch.equal(edited.pixels[sample], base.pixels[sample]) for sample in (0, 1))
    assert len(edited.images) == 2 and edited.mask.flatten(1).sum(1).tolist() == [9, 15]
    with pytest.raises(MaskError, match="2 pictures and the mask has 3"):
        session.edit([FIRST, BASE], mask=torch.ones(3, HEIGHT, WIDTH))
    with pytest.raises(PipelineError, match="number of prompts"):
        session.edit(FIRST, mask=masks[0])
    found = session.edit([BASE, BASE], keep=False)
    assert found.mask.shape == (2, 8, 12)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_output_types(session: EditSession, output_type: str) -> None:
    base = generate(session, output_type=output_type)
    edited = session.edit(FIRST, mask=box(), keep=False)
    shapes = {"np": (HEIGHT, WIDTH, 3), "pt": (3, HEIGHT, WIDTH), "latent": (4, HEIGHT // 2, WIDTH // 2)}
    if output_type == "pil":
        assert edited.image.size == (WIDTH, HEIGHT)
        outside = np.asarray(edited.mask_image) == 0
        assert np.array_equal(np.asarray(edited.image)[outside], np.asarray(base.image)[outside])
    else:
        assert tuple(edited.image.shape) == shapes[output_type]
    assert (edited.report.seam is None) == (output_type == "latent")
    expected = session.pipe(
        BASE,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(4),
        output_type=output_type,
        **picture_arguments("text-to-image"),
    ).images[0]
    difference = np.abs(np.asarray(expected, dtype=np.float64) - np.asarray(base.image, dtype=np.float64))
    assert difference.max() <= (1 if output_type == "pil" else 1e-4)


def test_without_guidance(session: EditSession) -> None:
    base = generate(session, guidance_scale=1.0)
    edited = session.edit(FIRST, mask=box())
    outside = ~edited.pixel_mask.unsqueeze(1).expand_as(edited.pixels)
    assert torch.equal(edited.pixels[outside], base.pixels[outside]) and not torch.equal(edited.pixels, base.pixels)
    with pytest.raises(PipelineError, match="guidance was off"):
        session.edit(SECOND, mask=box(), guidance_scale=7.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_inference_steps": 9}, "num_inference_steps was 4"),
        ({"height": 32}, "height was 16"),
        ({"guidance_scale": 0.5}, "guidance was on"),
        ({"generator": torch.Generator()}, "generator cannot"),
        ({"nonsense": 1}, "no argument nonsense"),
    ],
)
def test_wrong_changes_leave_everything_as_it_was(session: EditSession, changes: dict[str, Any], message: str) -> None:
    base = generate(session)
    with pytest.raises(PipelineError, match=message):
        session.edit(FIRST, mask=box(), **changes)
    assert session.history == (base,) and session.runtime.bases == (base.name,)
    with pytest.raises(MaskError, match="not both"):
        session.edit(FIRST, mask=box(), automatic_mask=AutomaticMask())


class Spy:
    """A user's callback that remembers what it was given."""

    def __init__(
        self, fail_at: int | None = None, interrupt_at: int | None = None, scale_at: int | None = None
    ) -> None:
        self.calls: list[tuple[int, frozenset[str]]] = []
        self.fail_at, self.interrupt_at, self.scale_at = fail_at, interrupt_at, scale_at

    def __call__(self, pipe: Any, call: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self.calls.append((call, frozenset(tensors)))
        if call == self.fail_at:
            raise RuntimeError("the user's callback failed")
        if call == self.interrupt_at:
            pipe._interrupt = True
        if call == self.scale_at:
            tensors["latents"] = tensors["latents"] * 0.5
        return tensors


def test_a_failing_edit_leaves_history_and_bases(session: EditSession) -> None:
    base = generate(session)
    first = session.edit(FIRST, mask=box())
    expected = session.edit(SECOND, mask=box(), keep=False)
    unet = session.pipe.unet
    for call in range(STEPS):
        for mask in (box(), None):
            with pytest.raises(RuntimeError, match="callback failed"):
                session.edit(SECOND, mask=mask, callback_on_step_end=Spy(fail_at=call))
            assert session.history == (base, first) and session.runtime.bases == (base.name, first.name)
            assert session.pipe.unet is unet and "encode_prompt" not in vars(session.pipe)
    after = session.edit(SECOND, mask=box())
    assert torch.equal(after.pixels, expected.pixels)


def test_a_failing_generation_keeps_the_previous_picture(session: EditSession) -> None:
    base = generate(session)
    with pytest.raises(RuntimeError, match="callback failed"):
        generate(session, SECOND, callback_on_step_end=Spy(fail_at=2))
    assert session.history == (base,) and session.runtime.bases == (base.name,)
    session.edit(FIRST, mask=box())


def test_the_users_callback_is_called_and_obeyed(session: EditSession) -> None:
    spy = Spy(scale_at=STEPS - 1)
    given = {"callback_on_step_end": spy, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    base = generate(session, **given)
    assert spy.calls == [(call, frozenset({"latents", "prompt_embeds"})) for call in range(STEPS)]
    expected = session.pipe(
        BASE,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(4),
        output_type="latent",
        **picture_arguments("text-to-image"),
        **given,
    ).images
    torch.testing.assert_close(base.latents, expected, atol=1e-4, rtol=1e-4)
    spy.calls.clear()
    edited = session.edit(FIRST, mask=box())
    assert len(spy.calls) == STEPS, "the recorded run's callback is called in its edits"
    outside = ~edited.pixel_mask.unsqueeze(1).expand_as(edited.pixels)
    assert torch.equal(edited.pixels[outside], base.pixels[outside])


def test_a_callback_that_wants_no_latents_gets_none(session: EditSession) -> None:
    class Own(PipelineCallback):  # type: ignore[misc]
        tensor_inputs = ["prompt_embeds"]

        def callback_fn(self, pipe: Any, call: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            assert tensors.keys() == {"prompt_embeds"}
            return {"prompt_embeds": tensors["prompt_embeds"]}

    generate(session, callback_on_step_end=Own())


def test_a_callback_must_return_a_dictionary(session: EditSession) -> None:
    with pytest.raises(PipelineError, match="must return a dictionary of tensors, got NoneType"):
        generate(session, callback_on_step_end=lambda *given: None)
    assert session.history == () and session.runtime.bases == ()


def test_an_interrupted_run_is_not_kept(session: EditSession) -> None:
    with pytest.raises(PipelineError, match="interrupted the run after call 2 of 4"):
        generate(session, callback_on_step_end=Spy(interrupt_at=1))
    assert session.history == () and session.runtime.bases == ()
    generate(session)


def test_reports(session: EditSession) -> None:
    base = generate(session)
    edited = session.edit(FIRST, automatic_mask=AutomaticMask(method="fisedit"))
    for report in (base.report, edited.report):
        parts = [seconds for stage, seconds in report.seconds.items() if stage != "total"]
        assert all(seconds >= 0 for seconds in parts) and sum(parts) == pytest.approx(report.seconds["total"])
        assert report.seconds["text"] > 0 and report.seconds["decode"] > 0
    assert base.report.speed_up is None and base.report.cache_bytes > 0
    assert edited.report.cache_bytes > base.report.cache_bytes, "the kept edit takes memory of its own"
    assert edited.report.density.keys() == {"8x12", "4x6"}
    assert edited.report.density["8x12"] == pytest.approx(float(edited.mask.float().mean()))
    assert edited.report.seam is not None and edited.report.seam.greatest >= edited.report.seam.mean > 0
    dense = base.report.seconds["total"] - base.report.seconds["setup"]
    assert edited.report.speed_up == pytest.approx(dense / edited.report.seconds["total"])
    assert edited.report.to_dict()["seconds"]["total"] == edited.report.seconds["total"]
    text = str(edited.report)
    assert "sparse steps" in text and "active at 8x12" in text and "seam error" in text


def test_changed_weights_are_noticed(session: EditSession) -> None:
    generate(session)
    weight = session.pipe.unet.conv_in.weight
    with torch.no_grad():
        weight.add_(0.5)
    try:
        with pytest.raises(WeightsChangedError):
            session.edit(FIRST, mask=box())
    finally:
        with torch.no_grad():
            weight.sub_(0.5)


def test_another_unet_is_noticed(session: EditSession) -> None:
    generate(session)
    recorded = session.pipe.unet
    session.pipe.unet = tiny_pipeline().unet
    with pytest.raises(PipelineError, match="another network"):
        session.edit(FIRST, mask=box())
    session.pipe.unet = recorded
    session.edit(FIRST, mask=box())


@pytest.mark.parametrize("use", ["undo", "reset", "edit", "find_mask", "generate"])
def test_a_callback_cannot_use_the_session_of_its_run(session: EditSession, use: str) -> None:
    generate(session)
    session.edit(FIRST, mask=box())
    pictures = session.history
    refused: list[str] = []

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        with pytest.raises(PipelineError) as raised:
            getattr(session, use)(*([] if use in ("undo", "reset") else [SECOND]))
        refused.append(str(raised.value))
        return tensors

    session.edit(SECOND, mask=box(), keep=False, callback_on_step_end=callback)
    assert refused and all("this session is at work" in message for message in refused)
    assert session.history == pictures
    assert session.undo() is pictures[0]
