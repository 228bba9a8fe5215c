"""Edit sessions on pipelines whose network is a transformer; and such a pipeline as it comes, with a runtime."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import fisedit_compile as fisedit
from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines import AutomaticMask, EditSession
from fisedit_compile.pipelines.families import family_of
from fisedit_compile.pipelines.families.packing import packed_resolutions
from fisedit_compile.pipelines.masks.cells import LatentCells
from fisedit_compile.pipelines.masks.pasting import paste_latents
from fisedit_compile.runtime import Domain
from support.tolerances import assert_identical, assert_near
from support.transformer_pipelines import (
    COLUMNS,
    HEIGHT,
    KINDS,
    PROMPT,
    ROWS,
    WIDTH,
    picture_arguments,
    prompt_arguments,
    transformer_pipeline,
)

STEPS = 4
TOKENS = Domain(ROWS, COLUMNS)


def noise() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def box() -> Tensor:
    """A mask in pixels; it covers rows 3 to 7 and columns 2 to 4 of the tokens, and none of them exactly."""
    mask = torch.zeros((HEIGHT, WIDTH))
    mask[14:30, 9:17] = 1
    return mask


def covered(scale: int) -> Tensor:
    """What the box covers, at so many cells for each token: ``[rows, columns]``."""
    mask = torch.zeros((ROWS * scale, COLUMNS * scale), dtype=torch.bool)
    mask[3 * scale : 8 * scale, 2 * scale : 5 * scale] = True
    return mask


@pytest.mark.parametrize("kind", KINDS)
def test_every_pipeline_class(kind: str) -> None:
    pipe = transformer_pipeline(kind)
    arguments: dict[str, Any] = {"num_inference_steps": STEPS, **picture_arguments(kind)}
    first, second = (prompt_arguments(kind, seed) for seed in (1, 2))
    if kind == "qwen-image":
        # The pipeline does not pad prompts.
        second = prompt_arguments(kind, 2, tokens=PROMPT + 3)
    if kind == "flux":
        # An input of the network, not a second call of it: an edit may take it across 1.
        second["guidance_scale"] = 0.5
    wanted, other = (
        pipe(**arguments, **prompt, generator=noise(), output_type="pt").images for prompt in (first, second)
    )
    transformer = pipe.transformer
    decoder = "dense" if kind in ("qwen-image", "pixart") else "sparse"
    session = EditSession(pipe, decoder=decoder)
    base = session.generate(None, generator=noise(), **arguments, **first)
    assert base.pixels is not None
    assert_near(base.pixels, wanted, "the recorded run")

    changes = {name: value for name, value in second.items() if not name.startswith("negative")}
    edited = session.edit(mask=box(), **changes)
    assert edited.pixels is not None and edited.mask is not None and edited.pixel_mask is not None
    # Masks of packed latents keep tokens whole; others cut patches themselves, and their masks follow latent cells.
    cells = covered(2)
    if kind in ("sd3", "pixart"):
        cells = torch.zeros_like(cells)
        cells[7:15, 4:9] = True
    assert torch.equal(edited.mask[0], cells)
    pixels = cells.repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(edited.pixel_mask[0], pixels)
    assert_identical(edited.pixels[:, :, ~pixels], base.pixels[:, :, ~pixels], "outside the mask")
    assert ((edited.pixels != base.pixels)[:, :, pixels].float().mean() > 0.9).all(), "inside the mask"
    assert (edited.report.dense_calls, edited.report.sparse_calls) == (0, base.report.dense_calls)
    calls = 2 if kind == "qwen-image" else 1
    assert base.report.dense_calls == calls * base.report.scheduler_steps
    assert edited.report.decoder == decoder

    same = session.edit(mask=box(), keep=False)
    assert_near(same.latents, edited.latents, "the same prompt again")

    fisedit = AutomaticMask(method="fisedit")
    others = {name: 1 - value if name == "prompt_embeds" else value for name, value in changes.items()}
    found = session.edit(automatic_mask=fisedit, **others)
    assert found.mask is not None and found.pixels is not None and found.report.dense_calls == calls
    assert found.mask.shape == (1, 2 * ROWS, 2 * COLUMNS)
    outside = ~found.pixel_mask.unsqueeze(1).expand_as(found.pixels)
    assert_identical(found.pixels[outside], edited.pixels[outside], "outside the mask that was found")

    everything = session.undo() and session.undo()
    assert everything is base
    whole = session.edit(mask=torch.ones(2, 2), keep=False, **changes)
    assert whole.pixels is not None
    assert_near(whole.pixels, other, "a mask of everything is the pipeline's own run")
    assert pipe.transformer is transformer


def test_a_pipeline_is_edited_as_it_comes() -> None:
    pipe = transformer_pipeline("flux")

    def latents(prompt: int) -> Tensor:
        given = prompt_arguments("flux", prompt)
        size = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS}
        return pipe(**given, **size, generator=noise(), output_type="latent").images

    expected = latents(1), latents(2)
    runtime = fisedit.Runtime()
    options = {"runtime": runtime, "tokens": {"hidden_states": (ROWS, COLUMNS)}}
    pipe.transformer.compile(backend="fisedit", options=options)
    with runtime.record("base"):
        base = latents(1)
    assert_near(base, expected[0], "the recorded run")
    with runtime.edit("base", mask=box()):
        edited = latents(2)
    changed = (edited != base).any(dim=2).reshape(ROWS, COLUMNS)
    assert torch.equal(changed, covered(1)), "all of the mask changes, and nothing else"
    with runtime.edit("base", mask=torch.ones(1, 1)):
        assert_near(latents(2), expected[1], "a mask of everything is the dense run")
    with runtime.edit("base", mask=torch.zeros(1, 1)):
        assert_identical(latents(2), base, "an empty mask returns the recording")
    assert runtime.stats.calls == {"record": STEPS, "edit": 2 * STEPS, "dense": STEPS}


def test_another_size_is_another_resolution_of_tokens() -> None:
    pipe = transformer_pipeline("flux")
    session = EditSession(pipe, decoder="dense")
    given = prompt_arguments("flux", 1)
    for height, width in ((HEIGHT, WIDTH), (24, 32)):
        base = session.generate(None, generator=noise(), num_inference_steps=2, height=height, width=width, **given)
        edited = session.edit(mask=torch.eye(4), prompt_embeds=given["prompt_embeds"] + 1)
        assert list(edited.report.density) == [f"{height // 4}x{width // 4}"] and edited.report.sparse_calls == 2
        assert base.pixels is not None and edited.pixels is not None and edited.pixels.shape[-2:] == (height, width)


@pytest.mark.parametrize("columns", [COLUMNS, 3 * COLUMNS])
def test_pictures_in_the_context_of_others_are_refused(columns: int) -> None:
    """Also where the tokens of all pictures are as many as those of a picture of twice the height and width."""
    pipe = transformer_pipeline("flux-kontext")
    arguments = {**picture_arguments("flux-kontext"), "max_area": HEIGHT * WIDTH, "_auto_resize": False}
    session = EditSession(pipe)
    with pytest.raises(PipelineError, match=f"gives its network {ROWS * (COLUMNS + columns)} tokens, .* without these"):
        session.generate(
            image=Image.new("RGB", (4 * columns, HEIGHT)),
            generator=noise(),
            num_inference_steps=2,
            **arguments,
            **prompt_arguments("flux-kontext", 1),
        )
    assert session.history == () and session.runtime.bases == ()


def test_latents_that_are_neither_maps_nor_tokens_are_refused() -> None:
    with pytest.raises(PipelineError, match=r"have shape \(1, 60, 16\), .* needs \[B, 140, C\] for 14x10"):
        LatentCells.of(torch.zeros(1, 60, 16), [TOKENS], 2)
    with pytest.raises(PipelineError, match=r"have shape \(1, 4, 3, 8, 8\), .* needs \[B, C, height, width\]"):
        LatentCells.of(torch.zeros(1, 4, 3, 8, 8))


def test_tokens_are_laid_out_in_rows() -> None:
    cells = LatentCells.of(torch.zeros(2, 140, 3), [Domain(7, 5), TOKENS], 2)
    assert cells == LatentCells(Domain(2 * ROWS, 2 * COLUMNS), TOKENS)
    numbers = torch.arange(140.0).expand(2, 3, -1).transpose(1, 2)
    assert torch.equal(cells.maps(numbers)[1, 2], torch.arange(140.0).reshape(ROWS, COLUMNS))
    mask = cells.mask(box(), numbers)
    assert torch.equal(mask[0], covered(2))
    kept = paste_latents(cells, numbers + 1000, numbers, mask)
    assert torch.equal((kept != numbers)[0, :, 0].reshape(ROWS, COLUMNS), covered(1))


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("leading", [(2, 3), (2, 3, 1)])
def test_maps_of_tokens_and_of_cells_are_kept_alike(scale: int, leading: tuple[int, ...]) -> None:
    packed = torch.zeros(2, 140, 3)
    cells = LatentCells.of(packed, [TOKENS], 2)
    unpacked = torch.zeros(*leading, ROWS * scale, COLUMNS * scale)
    assert cells.holds(packed) and cells.holds(unpacked)
    kept = paste_latents(cells, unpacked + 1, unpacked, cells.mask(box(), packed))
    assert torch.equal(kept.bool(), covered(scale).expand_as(kept))
    masks = torch.stack([covered(2), ~covered(2)])
    kept = paste_latents(cells, unpacked + 1, unpacked, masks)
    assert torch.equal(kept[0].bool(), covered(scale).expand_as(kept[0]))
    assert torch.equal(kept[1].bool(), ~covered(scale).expand_as(kept[1]))


def test_what_a_mask_cannot_be_laid_over() -> None:
    packed, maps = LatentCells.of(torch.zeros(2, 140, 3), [TOKENS], 2), LatentCells(Domain(6, 4))
    for cells, shape in ((packed, (2, 120, 3)), (packed, (2, 3, 7, 5)), (maps, (2, 24, 3)), (maps, (6, 4))):
        assert not cells.holds(torch.zeros(shape))


def test_pipelines_that_do_not_tell_their_tokens() -> None:
    class Silent:
        def _pack_latents(self) -> None:
            """As pipelines that pack have."""

    with pytest.raises(PipelineError, match="Silent packs its latents to tokens and has no vae_scale_factor"):
        packed_resolutions(Silent(), 64, 64)
    maps = transformer_pipeline("sd3")
    assert family_of(maps).tokens(maps, None, None) == ()
    pipe = transformer_pipeline("flux")
    columns = pipe.default_sample_size
    # Tokens of 2x2 cells, or of one where the scale is that of tokens already.
    assert packed_resolutions(pipe, HEIGHT, None) == (Domain(ROWS, columns // 2), Domain(2 * ROWS, columns))
    # A control picture that is a tensor may decide the size, but not where the number of tokens does not tell.
    assert packed_resolutions(pipe, HEIGHT, WIDTH, [(HEIGHT, WIDTH)]) == packed_resolutions(pipe, HEIGHT, WIDTH)
    assert TOKENS in packed_resolutions(pipe, 3 * HEIGHT, 5 * WIDTH, [(HEIGHT, WIDTH)])
    with pytest.raises(
        PipelineError, match=f"one of {HEIGHT}x{WIDTH} and {WIDTH}x{HEIGHT} pixels .* control picture of"
    ):
        packed_resolutions(pipe, HEIGHT, WIDTH, [(WIDTH, HEIGHT)])
