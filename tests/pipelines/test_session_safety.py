"""Safety checkers: what they blacken is returned, and nothing is made from it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines import EditSession
from support.tiny_pipelines import HEIGHT, WIDTH, picture_arguments, tiny_pipeline

KEEPS_DYNAMO = True
BASE, FIRST = "a red ball on grass", "a blue ball on grass"


class Checker:
    """Flags and blackens the samples that it is told to."""

    flags = (False,)

    def __call__(self, images: Tensor, clip_input: Tensor) -> tuple[Tensor, list[bool]]:
        images = images.clone()
        images[torch.tensor(self.flags)] = 0
        return images, list(self.flags)


class Features:
    def __call__(self, images: Any, return_tensors: str) -> Any:
        return self

    def to(self, device: Any) -> Any:
        return SimpleNamespace(pixel_values=torch.zeros(1))


@pytest.fixture(scope="module")
def pipe() -> Iterator[Any]:
    torch.compiler.reset()
    made = tiny_pipeline()
    vars(made).update(safety_checker=Checker(), feature_extractor=Features())
    yield made
    torch.compiler.reset()


def arguments(prompt: Any) -> dict[str, Any]:
    given = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(4)}
    return {"prompt": prompt, **given, **picture_arguments("text-to-image")}


def box() -> Tensor:
    mask = torch.zeros(HEIGHT, WIDTH)
    mask[4:10, 6:16] = 1
    return mask


def test_a_flagged_edit_is_black_and_not_kept(pipe: Any) -> None:
    session = EditSession(pipe)
    pipe.safety_checker.flags = (False,)
    base = session.generate(**arguments(BASE))
    expected = session.edit(FIRST, mask=box(), keep=False)
    pipe.safety_checker.flags = (True,)
    edit = session.edit(FIRST, mask=box())
    assert edit.pixels.count_nonzero() == 0 and edit.flagged == (True,) and edit.report.seam is None
    assert edit.report.notes == ("the safety checker flagged the picture and made it black, so the edit was not kept",)
    assert session.history == (base,) and session.runtime.bases == (base.name,)
    assert session._decoder.runtime.bases == (base.name,), "nor is its decode"
    pipe.safety_checker.flags = (False,)
    assert torch.equal(session.edit(FIRST, mask=box()).pixels, expected.pixels)


def test_a_flagged_base_refuses_edits(pipe: Any) -> None:
    session = EditSession(pipe)
    pipe.safety_checker.flags = (True,)
    base = session.generate(**arguments(BASE))
    assert base.flagged == (True,) and session.history == (base,)
    pipe.safety_checker.flags = (False,)
    with pytest.raises(
        PipelineError, match="the safety checker flagged the picture and made it black, which cannot be"
    ):
        session.edit(FIRST, mask=box())
    pipe.safety_checker.flags = (False, True, True)
    session.generate(**arguments([BASE] * 3))
    with pytest.raises(PipelineError, match="flagged picture 2 and 3 of 3"):
        session.edit([FIRST] * 3, mask=box())


@pytest.mark.parametrize("several_masks", [False, True])
def test_the_others_of_a_batch_are_pasted(pipe: Any, several_masks: bool) -> None:
    session = EditSession(pipe)
    mask = torch.stack([box(), box().flip(1), box()]) if several_masks else box()
    pipe.safety_checker.flags = (False,) * 3
    base = session.generate(**arguments([BASE] * 3))
    expected = session.edit([FIRST] * 3, mask=mask, keep=False)
    pipe.safety_checker.flags = (False, True, False)
    edit = session.edit([FIRST] * 3, mask=mask)
    assert edit.pixels[1].count_nonzero() == 0 and session.history == (base,)
    assert "picture 2 of 3" in edit.report.notes[0] and edit.report.seam is not None
    for sample in (0, 2):
        assert torch.equal(edit.pixels[sample], expected.pixels[sample])
        outside = ~edit.pixel_mask[sample % len(edit.pixel_mask)].expand(3, HEIGHT, WIDTH)
        assert torch.equal(edit.pixels[sample][outside], base.pixels[sample][outside])
