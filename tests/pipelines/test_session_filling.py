"""Sessions of networks that fill at their first call what they keep, and were never called before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from fisedit_compile.errors import CallMismatchError
from fisedit_compile.pipelines import EditSession
from support.small_pipeline import HEIGHT, WIDTH, Network, SmallPipeline

MASK = torch.zeros(HEIGHT, WIDTH)
MASK[4:8, 6:14] = 1


class Filling(Network):
    """Makes a table at its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: Tensor | None = None

    def forward(self, sample: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = torch.linspace(0.5, 1.5, 4).view(1, 4, 1, 1)
        return super().forward(sample, timestep, prompt) * self.kept


class Drawing(Filling):
    """Random numbers make it a graph that runs as a whole."""

    def forward(self, sample: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        return super().forward(sample + 1e-3 * torch.rand_like(sample), timestep, prompt)


def pipeline() -> SmallPipeline:
    """A pipeline whose networks have the same weights each time, and whose last step changes the latents."""
    torch.manual_seed(0)
    pipe = SmallPipeline(Filling())
    pipe.scheduler = DDIMScheduler(clip_sample=False)
    return pipe


def run(pipe: SmallPipeline, steps: int) -> list[Any]:
    session = EditSession(pipe, decoder="dense")
    base = session.generate("red", num_inference_steps=steps, generator=torch.Generator().manual_seed(3))
    return [base, session.edit("blue", mask=MASK), session.edit("grey", mask=MASK), session.edit("teal", mask=1 - MASK)]


@pytest.mark.parametrize("steps", [1, 3])
def test_pictures_are_those_of_a_network_that_was_called_before(steps: int) -> None:
    fresh = run(pipeline(), steps)
    torch.compiler.reset()
    warm = pipeline()
    warm("anything", num_inference_steps=1, generator=torch.Generator().manual_seed(0))
    expected = run(warm, steps)
    for found, wanted in zip(fresh, expected, strict=True):
        torch.testing.assert_close(found.latents, wanted.latents)
    assert not torch.equal(fresh[0].latents, fresh[1].latents)
    # Two latent cells a pixel; what lies outside the mask is the picture before.
    outside = torch.nn.functional.max_pool2d(MASK[None], 2)[0] == 0
    assert torch.equal(fresh[1].latents[..., outside], fresh[0].latents[..., outside])


def test_what_cannot_be_computed_again_is_refused_until_it_is_generated_again() -> None:
    session = EditSession(SmallPipeline(Drawing()), decoder="dense")
    base: dict[str, Any] = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(3)}
    session.generate("red", **base)
    with pytest.raises(CallMismatchError, match="filled something that it keeps") as caught:
        session.edit("blue", mask=MASK)
    assert "or call generate again" in str(caught.value)
    session.generate("red", **base)
    session.edit("blue", mask=MASK)
