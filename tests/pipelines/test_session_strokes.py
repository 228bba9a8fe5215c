"""Edits that start from strokes, of text-to-image pipelines, of photos and of unconditional models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from fisedit_compile.errors import FisEditError, MaskError, OptionError, PipelineError
from fisedit_compile.pipelines import AutomaticMask, EditSession
from fisedit_compile.pipelines.families import family_of
from fisedit_compile.pipelines.levels import NoiseLevels
from fisedit_compile.pipelines.painting import start_of_strokes
from support.tiny_pipelines import HEIGHT, WIDTH, picture_arguments, tiny_pipeline
from support.tolerances import assert_identical

KEEPS_DYNAMO = True
STEPS = 6
BEFORE, AFTER = "a red ball on grass", "a blue box on sand"
STROKE = (4, 3, 11, 9)
"""Left, top, right and bottom of what is painted."""


@pytest.fixture(scope="module")
def network() -> Any:
    """A U-Net for pixels."""
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=(HEIGHT, WIDTH),
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
    ).eval()


def unconditional(network: Any, kind: str) -> Any:
    """A pipeline of DDPM or DDIM for pixels; with the few steps and the prediction of progressive distillation."""
    if kind == "DDIMPipeline":
        scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing", prediction_type="v_prediction")
    else:
        scheduler = diffusers.DDPMScheduler()
    pipe = getattr(diffusers, kind)(unet=network, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise() -> torch.Generator:
    return torch.Generator().manual_seed(2)


def painted(picture: Any, colour: tuple[int, int, int] = (255, 0, 0)) -> Image.Image:
    over = picture.image.copy()
    over.paste(colour, STROKE)
    return over


def inside(picture: Any) -> torch.Tensor:
    return picture.pixel_mask.unsqueeze(1).expand_as(picture.pixels)


@pytest.fixture(scope="module")
def session() -> Iterator[EditSession]:
    torch.compiler.reset()
    yield EditSession(tiny_pipeline())
    torch.compiler.reset()


def generate(session: EditSession) -> Any:
    arguments = picture_arguments("text-to-image")
    return session.generate(BEFORE, num_inference_steps=STEPS, generator=noise(), **arguments)


SCHEDULERS = {
    "DDIMScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},
    "DPMSolverMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_strokes_with_every_scheduler(session: EditSession, name: str) -> None:
    usual = tiny_pipeline().scheduler.config
    session.pipe.scheduler = getattr(diffusers, name).from_config(usual, **SCHEDULERS[name])
    base = generate(session)
    first = session.edit(strokes=painted(base), strength=0.5)
    calls = base.report.dense_calls
    assert (first.report.dense_calls, first.report.sparse_calls) == (0, calls)
    assert_identical(first.pixels[~inside(first)], base.pixels[~inside(first)])
    assert (first.pixels[inside(first)] != base.pixels[inside(first)]).any()
    left, top, right, bottom = STROKE
    assert first.pixel_mask[0, top:bottom, left:right].any()
    # Of what is painted elsewhere nothing is known: the mask is the cells of the strokes.
    assert int(first.mask.sum()) <= 4 * 5
    second = session.edit(AFTER, strokes=painted(first, (0, 255, 0)), strength=0.8)
    assert_identical(second.pixels[~inside(second)], first.pixels[~inside(second)])


def test_a_full_mask_is_sdedit(session: EditSession) -> None:
    """With everything in the mask an edit by strokes is what the pipeline makes of noisy latents of the painting."""
    pipe = session.pipe
    pipe.scheduler = tiny_pipeline().scheduler
    base = generate(session)
    over = painted(base)
    edited = session.edit(AFTER, strokes=over, strength=0.5, mask=np.ones((HEIGHT, WIDTH)), keep=False)
    pixels = torch.from_numpy(np.asarray(over)).permute(2, 0, 1)[None].float() / 255
    kept = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)

    def begin(pipe: Any, call: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if call != STEPS // 2 - 1:
            return {}
        clean = pipe.vae.encode(2 * pixels - 1).latent_dist.mean * pipe.vae.config.scaling_factor
        share = kept[pipe.scheduler.timesteps[STEPS // 2]]
        return {"latents": share.sqrt() * clean + (1 - share).sqrt() * torch.randn(clean.shape, generator=noise())}

    arguments = {**picture_arguments("text-to-image"), "num_inference_steps": STEPS, "output_type": "pt"}
    expected = pipe(AFTER, callback_on_step_end=begin, **arguments).images
    torch.testing.assert_close(edited.pixels, expected, atol=1e-3, rtol=0)


def test_calls_before_the_start_compute_nothing(session: EditSession, monkeypatch: pytest.MonkeyPatch) -> None:
    base = generate(session)
    masks: list[float] = []
    original = NoiseLevels.restart

    def note(self: NoiseLevels, scheduler: Any, call: int) -> None:
        masks.append(call)
        original(self, scheduler, call)

    monkeypatch.setattr(NoiseLevels, "restart", note)
    session.edit(strokes=painted(base), strength=1 / STEPS, keep=False)
    entry = session._history.last
    assert masks == [STEPS - 1] and entry.picture is base
    edited = session.edit(strokes=painted(base), strength=1 / STEPS)
    trajectory = session._history.last.trajectory
    for call in range(STEPS - 2):
        assert_identical(trajectory.latents[call], entry.trajectory.latents[call])
    assert not torch.equal(trajectory.latents[STEPS - 2], entry.trajectory.latents[STEPS - 2])
    assert edited.report.sparse_calls == STEPS


def test_layers_masks_and_photos(session: EditSession) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    base = session.open(photo, BEFORE, num_inference_steps=STEPS, height=HEIGHT, width=WIDTH, generator=noise())
    layer = Image.new("RGBA", (60, 40), (0, 0, 0, 0))
    layer.paste((0, 0, 255, 255), (10, 8, 26, 20))
    edited = session.edit(strokes=layer)
    bytes_back = np.asarray(edited.image)
    where = edited.pixel_mask[0].numpy()
    assert where[8:20, 10:26].all() and np.array_equal(bytes_back[~where], photo[~where])
    mask = np.zeros((40, 60), dtype=bool)
    mask[5:15, 5:40] = True
    second = session.edit(strokes=painted(edited), mask=mask)
    assert np.array_equal(np.asarray(second.image)[~mask], bytes_back[~mask])
    assert base.name == session.history[0].name


@pytest.mark.parametrize("kind", ["DDIMPipeline", "DDPMPipeline"])
def test_strokes_on_unconditional_samples(network: Any, kind: str) -> None:
    pipe = unconditional(network, kind)
    assert family_of(pipe).name == "unconditional diffusion"
    session = EditSession(pipe)
    base = session.generate(num_inference_steps=4, generator=noise())
    plain = pipe(num_inference_steps=4, generator=noise(), output_type="np").images
    torch.testing.assert_close(base.pixels, torch.from_numpy(plain).permute(0, 3, 1, 2), atol=1e-5, rtol=0)
    assert (base.report.dense_calls, base.report.decoder) == (4, None)
    edited = session.edit(strokes=painted(base), strength=0.5)
    assert edited.report.sparse_calls == 4 and edited.mask.shape == (1, HEIGHT, WIDTH)
    left, top, right, bottom = STROKE
    box = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    box[top:bottom, left:right] = True
    assert not edited.pixel_mask[0, ~box].any() and edited.pixel_mask[0, box].float().mean() > 0.9
    assert_identical(edited.pixels[~inside(edited)], base.pixels[~inside(edited)])
    # Not all: pixels are clamped to black and white.
    assert (edited.pixels[inside(edited)] != base.pixels[inside(edited)]).float().mean() > 0.5
    assert_identical(session.undo().pixels, base.pixels)
    with pytest.raises(PipelineError, match="no argument prompt"):
        session.edit(AFTER)
    with pytest.raises(PipelineError, match="takes no latents"):
        session.open(np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("changes", "kind", "told"),
    [
        ({"strength": 0}, OptionError, "above 0 and below 1"),
        ({"strength": 1}, OptionError, "above 0 and below 1"),
        ({"strength": True}, OptionError, "above 0 and below 1"),
        ({"strength": 0.1}, OptionError, "less than one"),
        ({"strokes": np.zeros((HEIGHT, WIDTH + 1, 3), dtype=np.uint8)}, MaskError, "paint on the picture"),
        ({"strokes": "missing.png"}, PipelineError, "the painted picture"),
        ({"strokes": Image.new("RGBA", (WIDTH, HEIGHT))}, MaskError, "the same as the picture"),
    ],
)
def test_what_strokes_refuse(
    session: EditSession, changes: dict[str, Any], kind: type[FisEditError], told: str
) -> None:
    base = generate(session)
    with pytest.raises(kind, match=told):
        session.edit(**{"strokes": painted(base), **changes})
    assert session.history == (base,)


@pytest.mark.parametrize(("name", "turns", "start"), [("DDIM", 6, 3), ("PNDM", 7, 4), ("HeunDiscrete", 11, 6)])
def test_strokes_come_in_where_a_step_begins(name: str, turns: int, start: int) -> None:
    """Half of six steps; each level is that of the call, and the scheduler begins there anew."""
    options = {"skip_prk_steps": True} if name == "PNDM" else {}
    scheduler = getattr(diffusers, f"{name}Scheduler")(**options)
    assert start_of_strokes(scheduler, turns, 0.5) == start
    made: list[NoiseLevels] = []
    NoiseLevels.follow(scheduler, made.append)
    scheduler.set_timesteps(STEPS)
    (levels,) = made
    assert levels.calls == turns and "set_timesteps" not in vars(scheduler)
    sample, timesteps = torch.ones(1, 1, 2, 2), scheduler.timesteps
    for call in range(2):
        scheduler.step(sample, timesteps[call], sample)
    levels.restart(scheduler, start)
    stepped = scheduler.step(sample, timesteps[start], sample).prev_sample
    assert torch.isfinite(stepped).all()
    if name == "HeunDiscrete":
        assert scheduler.step_index == start + 1 and not scheduler.state_in_first_order


def test_strength_without_strokes_is_the_pipelines(session: EditSession) -> None:
    generate(session)
    with pytest.raises(PipelineError, match="no argument strength"):
        session.edit(strength=0.5)


def test_pipelines_that_begin_with_a_picture_refuse_strokes(session: EditSession) -> None:
    parts = {**session.pipe.components, "requires_safety_checker": False}
    session = EditSession(diffusers.StableDiffusionImg2ImgPipeline(**parts))
    session.pipe.set_progress_bar_config(disable=True)
    given = picture_arguments("image-to-image")
    base = session.generate(BEFORE, num_inference_steps=STEPS, generator=noise(), **given)
    with pytest.raises(PipelineError, match="strength is an argument of the pipeline"):
        session.edit(strokes=painted(base), strength=0.5)
    with pytest.raises(PipelineError, match="strength was 0.75"):
        session.edit(AFTER, strength=0.5)


@pytest.mark.parametrize(("steps", "strength"), [(3, 0.2), (7, 0.1)])
def test_the_strength_that_is_advised_is_taken(steps: int, strength: float) -> None:
    scheduler = diffusers.DDIMScheduler()
    with pytest.raises(OptionError, match="give at least") as refused:
        start_of_strokes(scheduler, steps, strength)
    advised = float(str(refused.value).partition("at least ")[2].splitlines()[0])
    assert start_of_strokes(scheduler, steps, advised) == steps - 1


def test_one_step_has_no_place_for_strokes() -> None:
    with pytest.raises(OptionError, match="generate with more"):
        start_of_strokes(diffusers.DDIMScheduler(), 1, 0.5)


def test_strokes_find_no_mask(session: EditSession) -> None:
    with pytest.raises(MaskError, match="strokes tell where to edit"):
        session.edit(strokes=np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8), automatic_mask=AutomaticMask())
