"""Edit sessions on every class of pipeline: one automatic edit, and one with a mask on top of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fisedit_compile.pipelines import EditSession, Picture
from fisedit_compile.pipelines.masking import AutomaticMask, MaskFinder

from tiny_pipelines import CLASSES, HEIGHT, WIDTH, picture_arguments, tiny_pipeline

BASE, FIRST, SECOND = "a red ball on grass", "a blue ball on grass", "a blue box on sand"
STEPS = 5
TOLERANCE = 1e-4


def noise() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def plain(pipe: Any, prompt: str, **arguments: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What the pipeline itself makes of a prompt, and the latents after each call."""
    latents = []

    def keep(pipe: Any, call: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents.append(tensors["latents"].clone())
        return tensors

    pixels = pipe(prompt, generator=noise(), output_type="pt", callback_on_step_end=keep, **arguments).images
    return pixels, latents


def outside(picture: Picture) -> torch.Tensor:
    assert picture.pixel_mask is not None and picture.pixels is not None
    return ~picture.pixel_mask.unsqueeze(1).expand_as(picture.pixels)


@pytest.mark.parametrize("kind", CLASSES)
def test_every_pipeline_class(kind: str) -> None:
    pipe = tiny_pipeline(kind)
    arguments = {"num_inference_steps": STEPS, **picture_arguments(kind)}
    wanted, recorded = plain(pipe, BASE, **arguments)
    _, trajectory = plain(pipe, FIRST, **arguments)
    parts = {name: id(part) for name, part in pipe.components.items()}
    attributes = set(vars(pipe))
    session = EditSession(pipe)

    base = session.generate(BASE, generator=noise(), **arguments)
    assert base.pixels is not None
    torch.testing.assert_close(base.pixels, wanted, atol=TOLERANCE, rtol=0)
    assert base.mask is None and base.report.sparse_calls == 0 and base.report.dense_calls == len(recorded)

    edited = session.edit(FIRST)
    assert edited.pixels is not None and edited.mask is not None
    # The mask is the one the dense trajectories lead to, from one of five steps.
    finder = MaskFinder(AutomaticMask())
    finder.add(trajectory[0], recorded[0])
    assert torch.equal(edited.mask, finder.mask()) and 0 < int(edited.mask.sum()) < edited.mask.numel()
    assert (edited.report.dense_calls, edited.report.sparse_calls) == (1, len(recorded) - 1)
    assert torch.equal(edited.pixels[outside(edited)], base.pixels[outside(edited)])
    assert not torch.allclose(edited.pixels[~outside(edited)], base.pixels[~outside(edited)], atol=TOLERANCE)

    mask = torch.zeros(HEIGHT, WIDTH)
    mask[4:10, 6:16] = 1.0
    second = session.edit(SECOND, mask=mask)
    assert second.pixels is not None and second.mask is not None
    assert int(second.mask.sum()) == 15 and second.report.dense_calls == 0
    assert second.report.sparse_calls == len(recorded)
    assert torch.equal(second.pixels[outside(second)], edited.pixels[outside(second)])
    assert not torch.equal(second.pixels, edited.pixels)
    assert torch.equal(second.latents[:, :, 0], edited.latents[:, :, 0])

    assert {name: id(part) for name, part in pipe.components.items()} == parts
    assert set(vars(pipe)) == attributes
    assert torch.equal(plain(pipe, BASE, **arguments)[0], wanted), "the pipeline must be as it was"
