"""Options of a session, and pipelines that the user compiled or cannot be used."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from PIL import Image

from fisedit_compile import EditSession, backend
from fisedit_compile.errors import BudgetError, MaskError, OptionError, PipelineError
from fisedit_compile.options import VALID_OPTIONS
from fisedit_compile.runtime import tiers
from support.lanes import LateLane
from support.small_pipeline import SmallPipeline
from support.tiny_pipelines import HEIGHT, WIDTH, picture_arguments, tiny_pipeline
from support.transformer_pipelines import transformer_pipeline

BASE, FIRST = "a red ball on grass", "a blue ball on grass"
STEPS = 3
KEEPS_DYNAMO = True


@pytest.fixture(scope="module")
def pipe() -> Iterator[Any]:
    """Of tests that leave it as it is: their sessions share its graphs."""
    torch.compiler.reset()
    yield tiny_pipeline()
    torch.compiler.reset()


def generate(session: EditSession) -> Any:
    noise = torch.Generator().manual_seed(4)
    return session.generate(BASE, num_inference_steps=STEPS, generator=noise, **picture_arguments("text-to-image"))


def box() -> torch.Tensor:
    mask = torch.zeros(HEIGHT, WIDTH)
    mask[4:10, 6:16] = 1
    return mask


def test_storage_and_norm_take_less_memory(pipe: Any) -> None:
    usual = generate(EditSession(pipe))
    session = EditSession(pipe, storage=torch.bfloat16, norm="cached")
    base = generate(session)
    torch.testing.assert_close(base.pixels, usual.pixels, atol=1e-5, rtol=0)
    assert base.report.cache_bytes < 0.75 * usual.report.cache_bytes
    edited = session.edit(FIRST, mask=box())
    outside = ~edited.pixel_mask.unsqueeze(1).expand_as(edited.pixels)
    assert torch.equal(edited.pixels[outside], base.pixels[outside])


def test_a_network_that_cannot_be_traced_is_masked_as_a_whole(caplog: pytest.LogCaptureFixture) -> None:
    pipe = tiny_pipeline()
    forward = pipe.unet.forward

    def under_autocast(*arguments: Any, **keywords: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return forward(*arguments, **keywords)

    pipe.unet.forward = under_autocast
    session = EditSession(pipe)
    base = generate(session)
    first = session.edit(FIRST, mask=box())
    second = session.edit(BASE)
    assert [record.getMessage() for record in caplog.records if "is masked at its outputs" in record.getMessage()]
    for before, after in ((base, first), (first, second)):
        outside = ~after.pixel_mask.unsqueeze(1).expand_as(after.pixels)
        assert torch.equal(after.pixels[outside], before.pixels[outside])
        assert not torch.equal(after.pixels, before.pixels)
    assert first.report.dense_calls == 0, "every call was masked"


def test_recordings_on_the_host_give_the_same_pictures(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies come as late as they may; decodes are recorded there as well."""
    monkeypatch.setattr(tiers, "lane_for", lambda device: LateLane())
    here, there = EditSession(pipe), EditSession(pipe, tier="host")
    for session in (here, there):
        generate(session)
        session.edit(FIRST, mask=box())
        session.edit(BASE, mask=box().flip(1))
    for expected, found in zip(here.history, there.history, strict=True):
        assert torch.equal(found.pixels, expected.pixels)
        assert found.report.decoder == expected.report.decoder


def test_a_budget_that_is_too_small(pipe: Any) -> None:
    session = EditSession(pipe, budget=100_000)
    with pytest.raises(BudgetError, match="give EditSession a greater budget, free older pictures with") as caught:
        generate(session)
    assert "Runtime" not in str(caught.value) and "runtime" not in str(caught.value)
    assert session.history == () and session.runtime.bases == ()


def test_masks_as_they_are_saved(pipe: Any, tmp_path: Path) -> None:
    session = EditSession(pipe)
    base = generate(session)
    levels = (box() * 255).to(torch.uint8).numpy()
    Image.fromarray(levels).resize((2 * WIDTH, 2 * HEIGHT)).save(tmp_path / "mask.jpg")
    layer = Image.new("RGBA", (WIDTH, HEIGHT), (200, 30, 30, 0))
    layer.putalpha(Image.fromarray(levels))
    layer.save(tmp_path / "layer.png")
    faint = np.repeat(levels[..., None] // 3, 3, axis=2) + np.uint8(1)
    wanted = session.edit(FIRST, mask=box(), keep=False)
    for mask, threshold in ((tmp_path / "layer.png", 0.5), (layer, 0.5), (faint, 0.25), (tmp_path / "mask.jpg", 0.5)):
        edited = session.edit(FIRST, mask=mask, white_threshold=threshold, keep=False)
        same = torch.equal(edited.mask, wanted.mask) and torch.equal(edited.pixels, wanted.pixels)
        assert same or str(mask).endswith("jpg") and edited.mask.sum() < 2 * wanted.mask.sum()
    for mask, told in ((box().T, "Turn it"), (box()[:, :-8], "Crop or pad it"), ("no.png", "no such file")):
        with pytest.raises(MaskError, match=told):
            session.edit(FIRST, mask=mask)
    with pytest.raises(MaskError, match="there is none; leave it out"):
        session.edit(FIRST, white_threshold=0.2)
    with pytest.raises(OptionError, match="got 128"):
        session.edit(FIRST, mask=box(), white_threshold=128)
    assert session.history == (base,)


def test_what_is_done_to_the_network_is_named(pipe: Any) -> None:
    session = EditSession(pipe)
    generate(session)
    pipe.unet.to(memory_format=torch.channels_last)
    try:
        with pytest.raises(PipelineError, match="the memory format of weights was changed since the picture"):
            session.edit(FIRST, mask=box())
    finally:
        pipe.unet.to(memory_format=torch.contiguous_format)
    assert session.edit(FIRST, mask=box(), keep=False).report.sparse_calls == STEPS


def test_a_budget_for_one_picture_only(pipe: Any) -> None:
    needed = generate(EditSession(pipe)).report.cache_bytes
    session = EditSession(pipe, budget=needed)
    base = generate(session)
    with pytest.raises(BudgetError):
        session.edit(FIRST, mask=box())
    assert session.history == (base,) and session.runtime.bases == (base.name,)
    session.edit(FIRST, mask=box(), keep=False)
    session.reset()
    assert session.history == () and session.runtime.stats.bytes_stored == 0
    generate(session)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"norm": "exakt"}, "option norm must be one of exact, cached, got 'exakt'"),
        ({"storage": torch.int8}, "int8"),
        ({"budget": "much"}, "budget must be a positive number of bytes"),
        ({"lowering": "none"}, "option lowering must be one of"),
        ({"packing": "much"}, "option packing must be a positive number of bytes"),
        ({"convolution": "fast"}, "option convolution must be one of"),
        ({"cuda_graphs": 1}, "option cuda_graphs must be True or False"),
        ({"disable_passes": ["verify"]}, "cannot disable verify; passes that can be disabled are"),
        ({"content": "guidance"}, "option content must be a list of names"),
        ({"tokens": {"encoder_hidden_states": 9}}, "option tokens must map names of inputs"),
        ({"nrom": "exact"}, "EditSession has no option nrom; it takes storage, budget, tier, norm, .* prompt_tokens\n"),
        ({"runtime": None}, r"no option runtime; it takes .*; a session has a runtime of its own \(session.runtime\)"),
    ],
)
def test_options_that_do_not_exist(pipe: Any, wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(OptionError, match=told):
        EditSession(pipe, **wrong)


def test_a_session_takes_every_option_of_the_backend() -> None:
    taken = {
        name
        for name, parameter in inspect.signature(EditSession).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    assert taken >= {*VALID_OPTIONS} - {"runtime"}


def test_options_of_the_backend_reach_network_and_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    parse = backend.parse_options

    def noting(mode: Any, options: Any, devices: Any = ()) -> Any:
        seen.append(dict(options))
        return parse(mode, options, devices)

    monkeypatch.setattr(backend, "parse_options", noting)
    given = {"packing": False, "convolution": "rows", "cuda_graphs": False, "disable_passes": ["convolve_maps"]}
    session = EditSession(SmallPipeline(), content=["more"], tokens={"other": (3, 4)}, **given)
    session.generate("red", num_inference_steps=2)
    assert all(options.items() >= given.items() for options in seen)
    of_inputs = [(options.get("content"), options.get("tokens")) for options in seen]
    assert of_inputs == [(["guidance", "more"], {"other": (3, 4)}), (None, None)]


def test_the_latents_of_the_picture_are_no_option() -> None:
    with pytest.raises(OptionError, match="tokens names hidden_states, .* the session tells the compiler by itself"):
        EditSession(transformer_pipeline("flux"), tokens={"hidden_states": (14, 10)})


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_unet_the_user_compiled(how: str) -> None:
    pipe = tiny_pipeline()
    if how == "wrapped":
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    else:
        pipe.unet.compile(backend="eager")
    unet = pipe.unet
    session = EditSession(pipe)
    base = generate(session)
    edited = session.edit(FIRST, mask=box())
    assert edited.report.sparse_calls == STEPS and not torch.equal(edited.pixels, base.pixels)
    assert pipe.unet is unet
    assert how == "wrapped" or unet._compiled_call_impl is not None


def test_pipelines_without_a_unet() -> None:
    class Other:
        unet: Any = None

    with pytest.raises(PipelineError, match="with a unet or a transformer, and Other has none"):
        EditSession(Other())
    other = Other()
    other.unet = torch.nn.Identity()
    with pytest.raises(PipelineError, match="with a scheduler, and Other has none"):
        EditSession(other)


def test_an_offloaded_unet_is_refused() -> None:
    pipe = tiny_pipeline()
    add_hook_to_module(pipe.unet, ModelHook())
    session = EditSession(pipe)
    with pytest.raises(PipelineError, match="offloaded"):
        generate(session)
    pipe.remove_all_hooks()
    assert pipe.unet is not None and session.history == ()
