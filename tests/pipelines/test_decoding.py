"""Decodes of an edit: from the recorded one, in a region, densely; each beside the dense decode of its latents."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

from fisedit_compile.errors import OptionError
from fisedit_compile.pipelines import AutomaticMask, EditSession, Picture
from fisedit_compile.pipelines.masks.cells import grow_mask, to_pixels
from fisedit_compile.runtime import Runtime
from support.tiny_pipelines import HEIGHT, WIDTH, picture_arguments, tiny_autoencoder, tiny_pipeline

KEEPS_DYNAMO = True
BASE, FIRST, SECOND = "a red ball on grass", "a blue ball on grass", "a blue box on sand"
STEPS = 3


@pytest.fixture(scope="module")
def module_session() -> Iterator[EditSession]:
    torch.compiler.reset()
    yield EditSession(tiny_pipeline())
    torch.compiler.reset()


@pytest.fixture
def pipe(module_session: EditSession) -> Any:
    """Of one module, for sessions with options of their own: they share its graphs."""
    return module_session.pipe


@pytest.fixture
def session(module_session: EditSession) -> EditSession:
    module_session.reset()
    return module_session


def generate(session: EditSession, prompt: Any = BASE, **arguments: Any) -> Picture:
    given = {"num_inference_steps": STEPS, **picture_arguments("text-to-image"), **arguments}
    return session.generate(prompt, generator=torch.Generator().manual_seed(4), **given)


def corner() -> torch.Tensor:
    mask = torch.zeros(HEIGHT, WIDTH)
    mask[0:4, 0:6] = 1
    return mask


def dense_decode(session: EditSession, picture: Picture) -> torch.Tensor:
    """What the plain pipeline makes of a picture's latents, 0 to 1."""
    vae = session.pipe.vae
    with torch.no_grad():
        raw = vae.decode(picture.latents / vae.config.scaling_factor).sample
    return (raw / 2 + 0.5).clamp(0, 1)


def masks(picture: Picture) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the picture's pixels are inside the mask, and outside."""
    assert picture.pixel_mask is not None and picture.pixels is not None
    inside = picture.pixel_mask.unsqueeze(1).expand_as(picture.pixels)
    return inside, ~inside


def check_outside(edited: Picture, base: Picture) -> None:
    inside, outside = masks(edited)
    assert edited.pixels is not None and base.pixels is not None
    assert torch.equal(edited.pixels[outside], base.pixels[outside])
    assert not torch.equal(edited.pixels[inside], base.pixels[inside])


def test_an_edit_decodes_the_mask_and_its_halo_only(session: EditSession) -> None:
    base = generate(session)
    assert base.report.decoder == "dense" and base.report.decoder_bytes > 0
    assert base.report.cache_bytes == session.runtime.stats.bytes_stored > base.report.decoder_bytes
    decoder = session._decoder.runtime
    decoder.reset_stats()
    edited = session.edit(FIRST, mask=corner())
    check_outside(edited, base)
    report = edited.report
    # Two by three cells, and one more on the two sides that are inside the picture.
    assert report.decoder == "sparse" and report.decoder_density == pytest.approx(3 * 4 / (8 * 12))
    assert decoder.stats.calls == {"record": 0, "edit": 1, "dense": 0}
    assert report.seam is not None and report.seam.greatest >= report.seam.mean > 0
    assert "recorded decode" in str(report) and report.to_dict()["decoder"] == "sparse"


def test_with_a_halo_as_large_as_the_picture_it_is_the_dense_decode(pipe: Any) -> None:
    session = EditSession(pipe, decoder="sparse", decoder_halo=12)
    generate(session)
    edited = session.edit(FIRST, mask=corner())
    inside, _ = masks(edited)
    assert edited.report.decoder == "sparse" and edited.report.decoder_density == 1.0
    assert edited.pixels is not None
    torch.testing.assert_close(edited.pixels[inside], dense_decode(session, edited)[inside], atol=1e-4, rtol=0)


def test_a_mask_of_everything_is_decoded_densely_and_recorded(session: EditSession) -> None:
    generate(session)
    edited = session.edit(FIRST, mask=torch.ones(4, 6))
    assert edited.pixels is not None
    torch.testing.assert_close(edited.pixels, dense_decode(session, edited), atol=1e-4, rtol=0)
    assert edited.report.decoder == "dense" and "cheaper than sparse" in edited.report.decoder_reason
    second = session.edit(SECOND, mask=corner())
    assert second.report.decoder == "sparse"
    check_outside(second, edited)


def test_unchanged_latents_decode_to_the_recorded_picture(session: EditSession) -> None:
    base = generate(session)
    again = session.edit(BASE, mask=corner(), keep=False)
    assert again.pixels is not None and base.pixels is not None
    torch.testing.assert_close(again.pixels, base.pixels, atol=1e-4, rtol=0)
    assert again.report.seam is not None and again.report.seam.greatest < 1e-4


def test_edits_of_edits_and_undo(session: EditSession) -> None:
    decoder = session._decoder.runtime
    base = generate(session)
    first = session.edit(FIRST, mask=corner())
    second = session.edit(SECOND, mask=corner().flip(0))
    assert second.report.decoder == "sparse" and decoder.bases == (base.name, first.name, second.name)
    check_outside(second, first)
    session.undo()
    again = session.edit(SECOND, mask=corner().flip(0), keep=False)
    assert again.pixels is not None and second.pixels is not None and torch.equal(again.pixels, second.pixels)
    assert decoder.bases == (base.name, first.name)
    session.reset()
    assert decoder.bases == () and session.runtime.stats.bytes_stored == 0


def test_a_found_mask_is_used_for_the_decode(session: EditSession) -> None:
    base = generate(session)
    edited = session.edit(FIRST, automatic_mask=AutomaticMask(threshold=0.8, opening=0, growth=0))
    assert edited.mask is not None and edited.report.decoder == "sparse"
    assert edited.report.decoder_density == pytest.approx(float(grow_mask(edited.mask, 1).float().mean()))
    check_outside(edited, base)


def test_an_empty_mask_decodes_nothing(session: EditSession) -> None:
    base = generate(session)
    edited = session.edit(FIRST, mask=torch.zeros(4, 6))
    assert edited.report.decoder == "sparse" and edited.report.decoder_density == 0.0
    assert edited.pixels is not None and base.pixels is not None and torch.equal(edited.pixels, base.pixels)


def test_every_picture_of_a_batch_has_its_mask(session: EditSession) -> None:
    base = generate(session, [BASE, SECOND])
    edited = session.edit([FIRST, BASE], mask=torch.stack([corner(), corner().flip(0, 1)]))
    assert edited.report.decoder == "sparse"
    check_outside(edited, base)


def test_latents_are_not_decoded(session: EditSession) -> None:
    base = generate(session, output_type="latent")
    edited = session.edit(FIRST, mask=corner())
    assert base.report.decoder is None and edited.report.decoder is None and edited.report.decoder_bytes == 0
    assert session._decoder.runtime.bases == ()


def test_without_a_halo_there_is_no_seam_to_measure(pipe: Any) -> None:
    session = EditSession(pipe, decoder_halo=0)
    base = generate(session)
    edited = session.edit(FIRST, mask=corner(), keep=False)
    assert edited.report.decoder == "sparse" and edited.report.seam is None
    check_outside(edited, base)


def test_a_dense_decode_can_be_asked_for(pipe: Any) -> None:
    session = EditSession(pipe, decoder="dense")
    base = generate(session)
    edited = session.edit(FIRST, mask=corner())
    assert (edited.report.decoder, edited.report.decoder_reason) == ("dense", "asked for")
    assert edited.report.decoder_bytes == 0 and session._decoder.runtime.bases == ()
    inside, _ = masks(edited)
    assert edited.pixels is not None and torch.equal(edited.pixels[inside], dense_decode(session, edited)[inside])
    check_outside(edited, base)


def test_a_region_equals_the_dense_decode_of_unchanged_latents(pipe: Any) -> None:
    """The statistics are then those of the recorded decode, and the margin covers what this small decoder looks at."""
    session = EditSession(pipe, decoder="region", decoder_halo=0)
    base = generate(session)
    edited = session.edit(BASE, mask=corner(), keep=False)
    assert edited.report.decoder == "region" and edited.report.decoder_bytes == 0
    inside, _ = masks(edited)
    assert edited.pixels is not None and base.pixels is not None
    torch.testing.assert_close(edited.pixels[inside], base.pixels[inside], atol=2e-3, rtol=0)


def test_regions_of_edits_of_edits(pipe: Any) -> None:
    session = EditSession(pipe, decoder="region")
    base = generate(session)
    first = session.edit(FIRST, mask=corner())
    second = session.edit(SECOND, mask=corner().flip(0, 1))
    assert (first.report.decoder, second.report.decoder) == ("region", "region")
    check_outside(first, base)
    check_outside(second, first)
    inside, _ = masks(first)
    assert first.pixels is not None
    torch.testing.assert_close(first.pixels[inside], dense_decode(session, first)[inside], atol=0.05, rtol=0)
    assert not any("forward" in vars(module) for module in session.pipe.vae.modules())


def test_a_decode_the_budget_has_no_room_for_is_a_region(pipe: Any) -> None:
    needed = generate(EditSession(pipe, decoder="dense")).report.cache_bytes
    session = EditSession(pipe, budget=needed)
    base = generate(session)
    assert base.report.decoder_bytes == 0 and base.report.cache_bytes == needed
    edited = session.edit(FIRST, mask=corner(), keep=False)
    assert edited.report.decoder == "region" and "of the budget" in edited.report.decoder_reason
    check_outside(edited, base)


def test_without_room_and_without_regions_it_is_dense(pipe: Any) -> None:
    needed = generate(EditSession(pipe, decoder="dense")).report.cache_bytes
    session = EditSession(pipe, budget=needed, decoder="sparse")
    base = generate(session)
    edited = session.edit(FIRST, mask=corner(), keep=False)
    assert edited.report.decoder == "dense" and "of the budget" in edited.report.decoder_reason
    check_outside(edited, base)


def test_recorded_decodes_give_way_to_the_unet(pipe: Any) -> None:
    trial = EditSession(pipe, decoder="dense")
    generate(trial)
    room = trial.edit(FIRST, mask=corner()).report.cache_bytes
    session = EditSession(pipe, budget=room)
    base = generate(session)
    assert base.report.decoder_bytes > 0
    first = session.edit(FIRST, mask=corner())
    assert first.report.decoder == "dense" and "gave way" in first.report.decoder_reason
    assert first.report.cache_bytes <= room
    check_outside(first, base)


def test_a_kept_edit_without_room_for_its_decode_is_still_sparse(pipe: Any) -> None:
    trial = EditSession(pipe)
    generate(trial)
    whole = trial.edit(FIRST, mask=corner()).report
    session = EditSession(pipe, budget=whole.cache_bytes - 1)
    base = generate(session)
    first = session.edit(FIRST, mask=corner())
    assert first.report.decoder == "sparse" and first.report.decoder_bytes == 0
    check_outside(first, base)
    assert session.edit(SECOND, mask=corner(), keep=False).report.decoder == "dense"


@pytest.mark.parametrize("switch", ["enable_slicing", "enable_tiling"])
def test_parts_of_an_autoencoder_are_decoded_densely(session: EditSession, switch: str) -> None:
    vae = session.pipe.vae
    getattr(vae, switch)()
    try:
        base = generate(session)
        edited = session.edit(FIRST, mask=corner())
    finally:
        vae.disable_slicing()
        vae.disable_tiling()
    assert edited.report.decoder == "dense" and "tiling or slicing" in edited.report.decoder_reason
    check_outside(edited, base)


def test_an_offloaded_autoencoder_is_decoded_densely(session: EditSession) -> None:
    add_hook_to_module(session.pipe.vae, ModelHook())
    try:
        base = generate(session)
        edited = session.edit(FIRST, mask=corner())
    finally:
        remove_hook_from_module(session.pipe.vae)
    assert edited.report.decoder == "dense" and "offloaded" in edited.report.decoder_reason
    check_outside(edited, base)


def test_another_autoencoder_is_decoded_densely(session: EditSession) -> None:
    base, recorded = generate(session), session.pipe.vae
    session.pipe.vae = tiny_autoencoder().eval()
    try:
        edited = session.edit(FIRST, mask=corner(), keep=False)
        inside, _ = masks(edited)
        assert edited.pixels is not None and torch.equal(edited.pixels[inside], dense_decode(session, edited)[inside])
    finally:
        session.pipe.vae = recorded
    assert "another than when" in edited.report.decoder_reason
    check_outside(edited, base)


@pytest.mark.parametrize("choice", ["sparse", "region"])
def test_changed_weights_of_the_decoder_are_noticed(choice: str) -> None:
    torch.compiler.reset()
    session = EditSession(tiny_pipeline(), decoder=choice)
    base = generate(session)
    weight = session.pipe.vae.decoder.conv_out.weight
    with torch.no_grad():
        weight.add_(0.5)
    edited = session.edit(FIRST, mask=corner(), keep=False)
    assert edited.report.decoder == "dense" and "weights changed" in edited.report.decoder_reason
    inside, _ = masks(edited)
    assert edited.pixels is not None
    torch.testing.assert_close(edited.pixels[inside], dense_decode(session, edited)[inside], atol=1e-5, rtol=0)
    check_outside(edited, base)


def test_the_autoencoder_is_left_as_it_was(session: EditSession) -> None:
    vae = session.pipe.vae
    attributes, decoder = set(vars(vae)), vae.decoder
    generate(session)
    session.edit(FIRST, mask=corner())
    assert set(vars(vae)) == attributes and vae.decoder is decoder


@pytest.mark.parametrize("wrong", [{"decoder": "fast"}, {"decoder_halo": -1}])
def test_choices_that_do_not_exist(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        EditSession(tiny_pipeline(), **wrong)


def test_seconds_of_compiling_the_decoder_are_set_up() -> None:
    torch.compiler.reset()
    session = EditSession(tiny_pipeline())
    first, second = generate(session).report.seconds, generate(session).report.seconds
    assert first["setup"] > second["setup"] and min(first.values()) >= 0
    assert sum(value for stage, value in first.items() if stage != "total") == pytest.approx(first["total"])


@pytest.mark.parametrize("kind", ["image-to-image", "xl-inpaint"])
def test_input_pictures_are_encoded_once(kind: str) -> None:
    torch.compiler.reset()
    pipe = tiny_pipeline(kind)
    session = EditSession(pipe)
    calls: list[int] = []
    handle = pipe.vae.encoder.register_forward_hook(lambda *given: calls.append(1))
    given = {"num_inference_steps": 4, **picture_arguments(kind)}
    base = session.generate(BASE, generator=torch.Generator().manual_seed(4), **given)
    made = len(calls)
    assert made > 0 and base.report.encodes_reused == 0
    edited = session.edit(FIRST, mask=torch.ones(4, 6))
    assert len(calls) == made and edited.report.encodes_reused == made
    wanted = pipe(FIRST, generator=torch.Generator().manual_seed(4), output_type="pt", **given).images
    assert edited.pixels is not None
    torch.testing.assert_close(edited.pixels, wanted, atol=1e-4, rtol=0)
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.add_(0.1)
    before = len(calls)
    session.edit(SECOND, mask=torch.ones(4, 6))
    assert len(calls) == before + made, "an encoder with other weights must encode again"
    handle.remove()


def test_halo_and_pixels_have_the_same_cells() -> None:
    mask = torch.zeros(1, 8, 12, dtype=torch.bool)
    mask[0, 3, 3] = True
    assert int(to_pixels(grow_mask(mask, 1), HEIGHT, WIDTH).sum()) == 9 * 4


def test_a_runtime_that_can_be_done_without_shares_the_budget() -> None:
    runtime = Runtime(storage=torch.float16, budget="1MB")
    other = runtime.expendable()
    assert other.storage == torch.float16 and other.budget == 1_000_000
