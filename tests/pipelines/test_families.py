"""Families of pipelines: which pipeline is of which, and one of one's own, by the page that explains how."""

from __future__ import annotations

import copy
import re
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fisedit_compile as fisedit
from fisedit_compile.errors import MaskError, PipelineError
from fisedit_compile.pipelines import EditSession, families
from fisedit_compile.pipelines.families import FAMILIES, family_of
from fisedit_compile.pipelines.families.sizes import default_size_of
from fisedit_compile.runtime import Domain
from support.small_pipeline import SmallPipeline
from support.tiny_pipelines import tiny_pipeline
from support.transformer_pipelines import KINDS, transformer_pipeline
from support.tree import ROOT

PAGE = ROOT / "docs" / "adding-a-pipeline.md"
SIZE = 28, 44


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the code of the page defines; the family that it registers is gone behind the test."""
    monkeypatch.setattr(families, "FAMILIES", list(FAMILIES))
    torch.compiler.reset()
    module = ModuleType("adding_a_pipeline")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    defined = vars(module)
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), defined)
    return defined


def test_pipelines_of_diffusers_have_families() -> None:
    assert family_of(tiny_pipeline()).name == family_of(tiny_pipeline("xl")).name == "Stable Diffusion"
    found = {kind: family_of(transformer_pipeline(kind)).name for kind in KINDS}
    assert found == {
        "flux": "Flux",
        "flux-image-to-image": "Flux",
        "sd3": "diffusion transformers",
        "qwen-image": "Qwen-Image",
        "pixart": "diffusion transformers",
    }
    assert family_of(SmallPipeline()).name == "Stable Diffusion", "whatever has the parts belongs to it"


def test_a_pipeline_of_no_family_is_refused(page: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", list(FAMILIES))
    with pytest.raises(PipelineError, match="a unet or a transformer, and SketchPipeline has none; .*adding-a-pip"):
        EditSession(page["SketchPipeline"]())


def test_a_pipeline_added_by_the_page_is_edited_right(page: dict[str, Any]) -> None:
    """As the runtime computes it without any session, with the recorded latents outside the mask behind every step."""
    session, base, edit = page["session"], page["base"], page["edit"]
    assert edit.report.sparse_calls == 4 and not torch.equal(edit.pixels, base.pixels)
    alone, runtime = copy.copy(session.pipe), fisedit.Runtime()
    options = {"runtime": runtime, "content": ["strength"]}
    alone.denoiser = torch.compile(alone.denoiser, backend="fisedit", options=options)
    recorded: list[Tensor] = []

    def record(pipe: Any, step: int, time: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        recorded.append(tensors["latents"])
        return tensors

    def paste(pipe: Any, step: int, time: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": torch.where(edit.mask, tensors["latents"], recorded[step])}

    def run(prompt: str, callback: Any, **given: Any) -> Tensor:
        noise = torch.Generator().manual_seed(3)
        images: Tensor = alone(
            prompt, generator=noise, output_type="latent", callback_on_step_end=callback, **given
        ).images
        return images

    with runtime.record("base"):
        assert torch.equal(run("red", record), base.latents)
    with runtime.edit("base", mask=edit.mask):
        assert torch.equal(run("blue", paste, strength=0.5), edit.latents)


def test_only_what_a_family_names_may_change(page: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    strict = replace(family_of(page["session"].pipe), changeable=frozenset())
    monkeypatch.setattr(families, "FAMILIES", [strict])
    session = EditSession(page["SketchPipeline"]())
    session.generate("red", num_inference_steps=2)
    with pytest.raises(PipelineError, match="strength was 1.0 when the picture was generated and cannot be 0.5"):
        session.edit("blue", mask=torch.ones(SIZE), strength=0.5)
    refusing = replace(strict, refused={"strength": "strength is for sketches on paper"})
    monkeypatch.setattr(families, "FAMILIES", [refusing])
    with pytest.raises(PipelineError, match="strength is for sketches on paper"):
        EditSession(page["SketchPipeline"]()).generate("red", strength=0.5)


def test_a_scalar_that_no_family_names_is_compared(page: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", [replace(family_of(page["session"].pipe), content=())])
    session = EditSession(page["SketchPipeline"]())
    session.generate("red", num_inference_steps=2)
    with pytest.raises(fisedit.errors.ScalarMismatchError, match=r"expected 1.0 .* got 0.5; .* content=\["):
        session.edit("blue", mask=torch.ones(SIZE).triu(), strength=0.5)
    session = EditSession(page["SketchPipeline"](), content=["strength"])
    session.generate("red", num_inference_steps=2)
    assert session.edit("blue", mask=torch.ones(SIZE).triu(), strength=0.5).report.sparse_calls == 2


def test_sizes_that_are_known_before_the_picture() -> None:
    usual = tiny_pipeline()
    assert family_of(usual).cells(usual, None, None) == Domain(8, 8)
    assert family_of(usual).cells(usual, 16, 24) == Domain(8, 12)
    sd3 = transformer_pipeline("sd3")
    assert family_of(sd3).cells(sd3, None, 40) == Domain(sd3.default_sample_size, 40 // sd3.vae_scale_factor)
    small = SmallPipeline()
    assert family_of(small).cells(small, 14, 22) is None, "it does not tell how large its cells are"
    pipe, network = SimpleNamespace(vae_scale_factor=8), SimpleNamespace(config=SimpleNamespace(sample_size=[4, 6]))
    assert default_size_of(pipe, network) == (32, 48)
    assert default_size_of(pipe, None) is None


def test_a_mask_of_another_shape_is_refused_before_the_picture() -> None:
    session = EditSession(tiny_pipeline())
    session.check_mask_size(32, 48, height=16, width=24)
    session.check_mask_size(100, 100)
    with pytest.raises(MaskError, match=r"aspect ratio of the picture, 8:12 .* got one of 48x32 .* Turn it"):
        session.check_mask_size(48, 32, height=16, width=24)
    with pytest.raises(MaskError, match="Crop or pad it"):
        session.check_mask_size(48, 32)
    # Those of image-to-image pipelines come from their pictures.
    EditSession(tiny_pipeline("image-to-image")).check_mask_size(48, 32)
