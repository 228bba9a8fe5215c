"""Photos opened by a session: what is recorded with every scheduler, what edits leave alone, what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from fisedit_compile.errors import FisEditError, MaskError, OptionError, PipelineError
from fisedit_compile.pipelines import AutomaticMask, EditSession
from support.tiny_pipelines import HEIGHT, SCALE, WIDTH, tiny_pipeline

KEEPS_DYNAMO = True
STEPS = 5
BEFORE, AFTER = "a red ball on grass", "a blue box on sand"


def photo(height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


PHOTO = photo()
BOX = np.zeros((HEIGHT, WIDTH), dtype=bool)
BOX[4:10, 8:18] = True


CONFIGURATION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
"""Of all schedulers here."""


@pytest.fixture(scope="module")
def session() -> Iterator[EditSession]:
    torch.compiler.reset()
    yield EditSession(tiny_pipeline())
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def usual_scheduler(session: EditSession) -> None:
    session.pipe.scheduler = diffusers.DDIMScheduler.from_config(CONFIGURATION)


def noise() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def opened(session: EditSession, what: Any = PHOTO, prompt: str = BEFORE, **arguments: Any) -> Any:
    return session.open(what, prompt, num_inference_steps=STEPS, generator=noise(), **arguments)


def shown(picture: Any) -> NDArray[np.uint8]:
    return np.asarray(picture.image)


class Oracle:
    """The noise of each call by the formulas of the schedulers' papers, from the betas alone."""

    def __init__(self, pipe: Any) -> None:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.kept = torch.cumprod(1 - betas, 0)
        pixels = torch.from_numpy(PHOTO).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            encoded = pipe.vae.encode(2 * pixels - 1).latent_dist.mean
        self.clean = encoded.double() * pipe.vae.config.scaling_factor
        self.noise = torch.randn(self.clean.shape, generator=noise()).double()

    def deviation(self, timestep: float) -> torch.Tensor:
        """Of the noise, where the picture is not made smaller; between two timesteps on a line."""
        whole = ((1 - self.kept) / self.kept).sqrt()
        low = min(int(timestep), 998)
        return whole[low] + (timestep - low) * (whole[low + 1] - whole[low])

    def karras(self, call: int) -> torch.Tensor:
        """The deviations of Karras and others, equation 5, with rho = 7."""
        low, high = (self.deviation(timestep) ** (1 / 7) for timestep in (0, 999))
        return (high + call / (STEPS - 1) * (low - high)) ** 7

    def growing(self, deviation: torch.Tensor) -> torch.Tensor:
        return self.clean + deviation * self.noise

    def preserving(self, deviation: torch.Tensor) -> torch.Tensor:
        return self.growing(deviation) / (1 + deviation**2).sqrt()


SCHEDULERS: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "ddim": ("DDIMScheduler", {}, "preserving", STEPS),
    "ddim few": ("DDIMScheduler", {"timestep_spacing": "trailing"}, "preserving", STEPS),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}, "preserving", STEPS + 1),
    "pndm with warm-up": ("PNDMScheduler", {"skip_prk_steps": False}, "preserving", STEPS + 9),
    "euler": ("EulerDiscreteScheduler", {}, "growing", STEPS),
    "euler ancestral": ("EulerAncestralDiscreteScheduler", {}, "growing", STEPS),
    "dpm++": ("DPMSolverMultistepScheduler", {}, "preserving", STEPS),
    "dpm++ karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "karras", STEPS),
    "unipc": ("UniPCMultistepScheduler", {}, "preserving", STEPS),
    "heun": ("HeunDiscreteScheduler", {}, "growing", 2 * STEPS - 1),
    "lcm": ("LCMScheduler", {}, "preserving", STEPS),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_call_is_recorded_at_its_own_noise(session: EditSession, name: str) -> None:
    kind, changes, formula, calls = SCHEDULERS[name]
    session.pipe.scheduler = getattr(diffusers, kind).from_config({**CONFIGURATION, **changes})
    timesteps: list[float] = []

    def note(_: Any, __: int, timestep: Any, ___: Any) -> dict[str, Any]:
        timesteps.append(float(timestep))
        return {}

    base = opened(session, callback_on_step_end=note)
    assert base.report.dense_calls == calls == len(timesteps)
    oracle = Oracle(session.pipe)
    entry = session._history.last
    levels = [entry.arguments["latents"], *entry.trajectory.latents]
    for call, (timestep, latents) in enumerate(zip(timesteps, levels, strict=False)):
        if formula == "karras":
            expected = oracle.preserving(oracle.karras(call))
        else:
            expected = getattr(oracle, formula)(oracle.deviation(timestep))
        if call == 0 and formula == "growing":
            # Pipelines multiply what they are given with it.
            expected = expected / float(session.pipe.scheduler.init_noise_sigma)
        torch.testing.assert_close(latents.double(), expected, atol=2e-4, rtol=2e-3)
    torch.testing.assert_close(levels[-1].double(), oracle.clean, atol=1e-5, rtol=1e-5)

    assert np.array_equal(shown(base), PHOTO)
    edited = session.edit(AFTER, mask=BOX)
    assert (edited.report.dense_calls, edited.report.sparse_calls) == (0, calls)
    assert np.array_equal(shown(edited)[~BOX], PHOTO[~BOX]) and not np.array_equal(shown(edited), PHOTO)
    cells = ~edited.mask.unsqueeze(1).expand_as(edited.latents)
    assert torch.equal(edited.latents[cells], levels[-1][cells])


def test_a_full_mask_is_the_pipeline_from_the_photos_first_latents(session: EditSession) -> None:
    opened(session)
    pipe, arguments = session.pipe, {**session._history.last.arguments, "prompt": AFTER}
    edited = session.edit(AFTER, mask=np.ones_like(BOX), keep=False)
    torch.testing.assert_close(edited.pixels, pipe(**arguments, output_type="pt").images, atol=1e-4, rtol=0)


@settings(max_examples=6)
@given(st.integers(16, 70), st.floats(1.25, 1.8), st.integers(0, 9), st.sampled_from([None, 0, 3]))
def test_outside_of_masks_photos_of_any_size_are_their_own_bytes(
    session: EditSession, height: int, ratio: float, seed: int, seam: int | None
) -> None:
    width, generator = int(height * ratio), np.random.default_rng(seed)
    picture = photo(height, width, seed)
    base = opened(session, Image.fromarray(picture), height=HEIGHT, width=WIDTH)
    assert base.pixels.shape == (1, 3, height, width) and np.array_equal(shown(base), picture)
    mask = np.zeros((height, width), dtype=bool)
    top, left = generator.integers(0, height // 2), generator.integers(0, width // 2)
    mask[top : top + height // 3, left : left + width // 3] = True
    first = session.edit(AFTER, mask=mask, seam=seam)
    assert np.array_equal(shown(first)[~mask], picture[~mask]) and (shown(first)[mask] != picture[mask]).any()
    assert torch.equal(first.pixel_mask, torch.from_numpy(mask)[None])
    second = session.edit(BEFORE, mask=~mask, seam=seam)
    assert np.array_equal(shown(second)[mask], shown(first)[mask])
    assert np.array_equal(shown(session.undo()), shown(first))


def test_a_photo_is_encoded_and_decoded_once_and_its_edits_decode_sparsely(session: EditSession) -> None:
    vae, counts = session.pipe.vae, {"encode": 0, "decode": 0}
    hooks = [
        part.register_forward_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
        for name, part in (("encode", vae.encoder), ("decode", vae.post_quant_conv))
    ]
    base = opened(session)
    for hook in hooks:
        hook.remove()
    assert counts == {"encode": 1, "decode": 1}
    assert (base.report.dense_calls, base.report.sparse_calls, base.report.decoder) == (STEPS, 0, "dense")
    assert base.mask is None and base.prompt == BEFORE and session.history == (base,)
    edited = session.edit(AFTER, mask=BOX)
    assert edited.report.decoder == "sparse" and edited.report.dense_seconds is not None
    assert edited.report.seam is not None and edited.report.seam_left is not None
    assert edited.report.to_dict()["seam_left"]["mean"] == edited.report.seam_left.mean
    assert "left at the seam, mean" in str(edited.report)
    plain = session.edit(AFTER, mask=BOX, seam=0)
    assert plain.report.seam_left is None and plain.report.seam is not None
    assert np.array_equal(shown(plain)[~BOX], PHOTO[~BOX])


@pytest.mark.parametrize("decoder", ["region", "dense"])
def test_edits_are_decoded_into_what_the_model_made_of_the_photo(session: EditSession, decoder: str) -> None:
    """Not into the photo: that has another size, and is not what the decoder makes."""
    other, picture = EditSession(session.pipe, decoder=decoder), photo(40, 60)
    opened(other, picture, height=HEIGHT, width=WIDTH)
    mask = np.zeros((40, 60), dtype=bool)
    mask[4:12, 4:12] = True
    decoded = [other._history.last.decoded]
    for prompt in (AFTER, BEFORE):
        edited = other.edit(prompt, mask=mask)
        assert edited.report.decoder == decoder and np.array_equal(shown(edited)[~mask], picture[~mask])
        decoded.append(other._history.last.decoded)
    cells = edited.mask.repeat_interleave(SCALE, 1).repeat_interleave(SCALE, 2).unsqueeze(1).expand(1, 3, -1, -1)
    assert all(one.shape == (1, 3, HEIGHT, WIDTH) for one in decoded)
    for before, after in zip(decoded, decoded[1:], strict=False):
        assert torch.equal(before[~cells], after[~cells]) and not torch.equal(before[cells], after[cells])
    if decoder == "dense":
        with torch.no_grad():
            whole = session.pipe.vae.decode(edited.latents / session.pipe.vae.config.scaling_factor).sample
        expected = (whole / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(decoded[-1][cells], expected[cells], atol=1e-4, rtol=0)


def test_edits_by_words_alone(session: EditSession) -> None:
    base = opened(session, prompt="")
    edited = session.edit(AFTER)
    outside = ~edited.pixel_mask.unsqueeze(1).expand_as(edited.pixels)
    assert 0 < int(edited.mask.sum()) and torch.equal(edited.pixels[outside], base.pixels[outside])


def test_an_edit_that_changes_nothing_gives_the_photo_back(session: EditSession) -> None:
    base = opened(session, photo(30, 52))
    for changes in ({}, {"prompt": AFTER, "mask": np.zeros((30, 52))}):
        edited = session.edit(**changes)
        assert not edited.pixel_mask.any() and torch.equal(edited.pixels, base.pixels)
        assert edited.report.seam_left is None


@pytest.mark.parametrize("size", [(37, 50), (10 * HEIGHT, 10 * WIDTH)])
def test_a_found_mask_given_back_makes_the_edit_by_words_alone(session: EditSession, size: tuple[int, int]) -> None:
    opened(session, photo(*size), height=HEIGHT, width=WIDTH)
    local = AutomaticMask(growth=0, global_share=1.0)
    alone = session.edit(AFTER, automatic_mask=local, keep=False)
    for mask in (session.find_mask(AFTER, automatic_mask=local).mask, alone.mask):
        given_back = session.edit(AFTER, mask=mask, keep=False)
        assert torch.equal(given_back.pixel_mask, alone.pixel_mask)
        assert torch.equal(given_back.pixels, alone.pixels)


def test_masks_and_seams_of_generated_pictures(session: EditSession) -> None:
    arguments = {"num_inference_steps": STEPS, "height": HEIGHT, "width": WIDTH}
    base = session.generate(BEFORE, generator=noise(), **arguments)
    plain = session.edit(AFTER, mask=BOX, keep=False)
    assert plain.report.seam_left is None
    blended = session.edit(AFTER, mask=BOX, keep=False, seam=3)
    assert blended.report.seam_left is not None
    outside = ~blended.pixel_mask.unsqueeze(1).expand_as(base.pixels)
    assert torch.equal(blended.pixels[outside], base.pixels[outside])
    changed = (blended.pixels != plain.pixels).any(dim=1)
    assert changed.any() and not changed[~blended.pixel_mask].any()


def test_masks_refer_to_the_photo(session: EditSession) -> None:
    opened(session, photo(30, 52), height=HEIGHT, width=WIDTH)
    for size in ((30, 52), (60, 104), (HEIGHT, WIDTH), (HEIGHT // SCALE, WIDTH // SCALE)):
        mask = np.zeros(size)
        mask[: size[0] // 2] = 1
        edited = session.edit(AFTER, mask=mask, keep=False)
        assert edited.pixel_mask[0, :15].all() and not edited.pixel_mask[0, 15:].any()
    with pytest.raises(MaskError, match="aspect ratio of the picture, 30:52"):
        session.edit(AFTER, mask=np.ones((52, 30)))


def test_what_was_done_to_a_photo_is_said(session: EditSession) -> None:
    layer = np.concatenate([photo(40, 60), np.full((40, 60, 1), 128, dtype=np.uint8)], axis=2)
    notes = opened(session, Image.fromarray(layer), height=HEIGHT, width=WIDTH).report.notes
    assert "white" in notes[0] and "16x24 pixels" in notes[1]
    # Without a size it is about what the pipeline makes by default, in whole cells of all resolutions.
    assert any("16x24 pixels" in note for note in opened(session, photo(100, 150)).report.notes)


def test_the_same_noise_gives_the_same_recording(session: EditSession) -> None:
    opened(session)
    first = session.edit(AFTER, mask=BOX, keep=False)
    opened(session)
    assert torch.equal(session.edit(AFTER, mask=BOX, keep=False).pixels, first.pixels)
    torch.manual_seed(3)
    session.open(PHOTO, BEFORE, num_inference_steps=STEPS)
    torch.testing.assert_close(session.edit(AFTER, mask=BOX, keep=False).pixels, first.pixels, atol=1e-4, rtol=0)


class Formless(diffusers.DDIMScheduler):
    """A scheduler without a formula for noise."""

    add_noise = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"photo": photo(15, 40)}, "at least 16"),
        ({"photo": np.zeros((16, 16, 3), dtype=np.uint16)}, "floats from 0 to 1"),
        ({"prompt": [BEFORE, AFTER]}, "one prompt"),
        ({"num_images_per_prompt": 2}, "one prompt"),
        ({"latents": torch.zeros(1, 4, 8, 12)}, "latents cannot be given"),
        ({"output_type": "latent"}, "latent"),
        ({"height": HEIGHT}, "both height and width"),
        ({"height": 17, "width": 24}, "multiples of 8"),
        ({"height": 24, "width": 16}, "squeeze"),
        ({"unknown": 1}, "no argument unknown"),
        ({"generator": 3}, "generator must be"),
    ],
)
def test_what_is_refused_before_anything_is_computed(
    session: EditSession, arguments: dict[str, Any], told: str
) -> None:
    base = opened(session)

    def fail(*_: Any) -> None:
        raise AssertionError("computed")

    hooks = [part.register_forward_pre_hook(fail) for part in (session.pipe.vae.encoder, session.pipe.text_encoder)]
    try:
        with pytest.raises(FisEditError, match=told):
            session.open(**{"photo": PHOTO, "num_inference_steps": STEPS, **arguments})
    finally:
        for hook in hooks:
            hook.remove()
    assert session.history == (base,)


def test_schedulers_without_a_formula_are_refused(session: EditSession) -> None:
    session.pipe.scheduler = Formless.from_config(CONFIGURATION)
    with pytest.raises(PipelineError, match="Formless has neither add_noise nor scale_noise"):
        opened(session)


@pytest.mark.parametrize("kind", ["image-to-image", "inpaint"])
def test_pipelines_that_encode_for_themselves_are_refused(kind: str) -> None:
    with pytest.raises(PipelineError, match="encodes them itself .*strength"):
        EditSession(tiny_pipeline(kind)).open(PHOTO)


def test_a_cancelled_opening_leaves_the_history(session: EditSession) -> None:
    base = opened(session)

    def cancel(pipe: Any, call: int, *_: Any) -> dict[str, Any]:
        pipe._interrupt = call == 2
        return {}

    with pytest.raises(PipelineError, match="cancelled|interrupted"):
        opened(session, callback_on_step_end=cancel)
    assert session.history == (base,) and tuple(session.runtime.bases) == (base.name,)
    assert np.array_equal(shown(session.edit(AFTER, mask=BOX))[~BOX], PHOTO[~BOX])


def test_a_wrong_normalisation_is_noticed(session: EditSession) -> None:
    """What the pipeline gives its decoder must be what came from the encoder."""
    family = session._tools.family
    base = opened(session)

    def doubled(pipe: Any, pixels: torch.Tensor) -> Any:
        encoded = family.encode(pipe, pixels)
        return SimpleNamespace(latents=2 * encoded.latents, raw=encoded.raw)

    object.__setattr__(session._tools, "family", SimpleFamily(family, doubled))
    try:
        with pytest.raises(PipelineError, match="other latents than the autoencoder made"):
            opened(session)
    finally:
        object.__setattr__(session._tools, "family", family)
    assert session.history == (base,)


class SimpleFamily:
    """A family with another encoding."""

    def __init__(self, family: Any, encode: Any) -> None:
        self._family, self.encode = family, encode

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)


def test_flagged_photos_are_refused(session: EditSession) -> None:
    pipe = session.pipe
    original = pipe.run_safety_checker
    pipe.run_safety_checker = lambda image, *_: (torch.zeros_like(image), [True])
    try:
        with pytest.raises(PipelineError, match="flagged the photo"):
            opened(session)
    finally:
        pipe.run_safety_checker = original
        del pipe.run_safety_checker


@pytest.mark.parametrize("seam", [-1, 0.5, "2"])
def test_seams_are_numbers_of_pixels(session: EditSession, seam: Any) -> None:
    opened(session)
    with pytest.raises(OptionError, match="seam must be"):
        session.edit(AFTER, mask=BOX, seam=seam)
