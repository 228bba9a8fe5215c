"""Every row makes an edit with the model that comes along, of few steps."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fisedit_compile.bench.quality.cases import edit_cases
from fisedit_compile.bench.quality.measures import Outcome
from fisedit_compile.bench.quality.methods import box_around
from fisedit_compile.bench.quality.prompt_to_prompt import SharedAttention, align, shared_attention
from fisedit_compile.bench.quality.rows import DENSE, ROWS, Row
from fisedit_compile.bench.quality.task import Networks, Task
from fisedit_compile.pipelines import AutomaticMask
from fisedit_compile.scenes import EditKind, load_pipeline

STEPS = 3
PAINTED = ("painted", "crop-and-stitch")
"""Rows that are given the asked-for region as their mask."""
#: What each row computes densely for an edit of three steps: SDEdit rounds down; DiffEdit makes ten maps of two prompts
#: and inverts two steps of its unguided half; prompt-to-prompt denoises both prompts.
DENSE_STEPS = {
    "dense": STEPS,
    "sdedit": 2,
    "diffedit": 20 + 2 / 2 + 2,
    "prompt-to-prompt": 2 * STEPS,
    "fisedit": AutomaticMask().scaled_steps(STEPS),
    "painted": 0,
}


@pytest.fixture(scope="module")
def networks() -> Networks:
    return Networks(load_pipeline(), STEPS, 3.0)


@dataclass(frozen=True)
class Made:
    """An edit, and what rows made of it."""

    task: Task
    outcomes: dict[str, Outcome]


def make(networks: Networks, kind: EditKind, names: Sequence[str]) -> Made:
    task = Task(networks, edit_cases([kind], 1)[0])
    task.dense = DENSE.make(task).picture
    return Made(task, {row.name: row.make(task) for row in ROWS if row.name in names})


@pytest.fixture(scope="module")
def made(networks: Networks) -> tuple[Made, Made]:
    """A ball of another colour by all rows, and an edit that asks for nothing by some.

    All in one fixture: the networks are compiled once, and tests begin with nothing compiled.
    """
    return make(networks, "recolour", [row.name for row in ROWS]), make(networks, "unchanged", [*PAINTED, "diffedit"])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_makes_an_edit(row: Row, made: tuple[Made, Made]) -> None:
    task, outcome = made[0].task, made[0].outcomes[row.name]
    side = task.networks.side
    assert outcome.picture.size == task.base.size == (side, side) and outcome.seconds > 0
    changed = (np.asarray(outcome.picture) != np.asarray(task.base)).any(axis=2)
    assert changed.any()
    if row.name in DENSE_STEPS:
        assert outcome.dense_steps == DENSE_STEPS[row.name]
    if row.name in ("fisedit", *PAINTED):
        assert outcome.mask is not None and not changed[~outcome.mask].any()
        assert 0 < outcome.mask.mean() < 0.7
    if row.name in PAINTED:
        assert outcome.mask is not None and outcome.mask[task.region].all()
    if row.name == "crop-and-stitch":
        assert 0 < outcome.dense_steps < STEPS


@pytest.mark.parametrize("name", PAINTED)
def test_where_nothing_is_asked_for_painted_and_stitched_pictures_are_the_base(
    name: str, made: tuple[Made, Made]
) -> None:
    task, outcome = made[1].task, made[1].outcomes[name]
    assert outcome.mask is not None and not outcome.mask.any() and outcome.dense_steps == 0
    assert np.array_equal(np.asarray(outcome.picture), np.asarray(task.base))


def test_diffedit_finds_nothing_where_the_prompts_are_equal(made: tuple[Made, Made]) -> None:
    outcome = made[1].outcomes["diffedit"]
    assert outcome.mask is not None and not outcome.mask.any()


def test_the_dense_row_is_the_plain_pipeline(made: tuple[Made, Made]) -> None:
    task = made[0].task
    plain = load_pipeline()(task.case.edited_prompt, generator=task.noise(), **task.arguments).images[0]
    assert task.dense is not None and np.array_equal(np.asarray(plain), np.asarray(task.dense))


def test_another_model_has_another_identity(networks: Networks) -> None:
    identity, other = networks.identity(), load_pipeline()
    assert identity == Networks(other, STEPS, 3.0).identity()
    assert Networks(other, STEPS + 1, 3.0).identity() == identity | {"steps": STEPS + 1}
    other.scheduler.register_to_config(prediction_type="epsilon")
    found = Networks(other, STEPS, 3.0).identity()
    assert found == identity | {"scheduler": found["scheduler"]} != identity
    with torch.no_grad():
        other.unet.conv_in.bias[0] += 1e-6
    assert Networks(other, STEPS, 3.0).identity() == found | {"model": ANY}
    assert Networks(other, STEPS, 3.0).identity()["model"] != identity["model"]


def test_aligned_tokens() -> None:
    assert align([1, 5, 6, 2, 0, 0], [1, 5, 6, 2, 0, 0]) == ([0, 1, 2, 3, 4, 5],) * 2
    # A replaced word takes the other one's place, inserted ones have none.
    assert align([1, 5, 6, 2], [1, 7, 6, 2]) == ([0, 1, 2, 3], [0, 1, 2, 3])
    assert align([1, 5, 2, 0, 0], [1, 5, 8, 9, 2]) == ([0, 1, 2], [0, 1, 4])
    assert align([1, 5, 8, 2, 0], [1, 5, 2, 0, 0])[0][:4] == [0, 1, 3, 4]


@pytest.fixture(scope="module")
def calls(networks: Networks) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and states of the text of two prompts with guidance."""
    generator, config = torch.Generator().manual_seed(0), networks.unet.config
    latents = torch.randn(4, config.in_channels, config.sample_size, config.sample_size, generator=generator)
    words = torch.randn(4, networks.pipe.tokenizer.model_max_length, config.cross_attention_dim, generator=generator)
    return latents, words


def call(networks: Networks, calls: tuple[torch.Tensor, torch.Tensor], processor: SharedAttention) -> torch.Tensor:
    with torch.no_grad(), shared_attention(networks.unet, processor):
        return networks.unet(calls[0], 500, encoder_hidden_states=calls[1]).sample


def test_attention_that_shares_nothing_is_that_of_diffusers(networks: Networks, calls: tuple) -> None:
    with torch.no_grad():
        plain = networks.unet(calls[0], 500, encoder_hidden_states=calls[1]).sample
    own = call(networks, calls, SharedAttention(([], []), steps=0))
    torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-4)


def test_only_the_edit_is_changed_and_only_in_the_first_steps(networks: Networks, calls: tuple) -> None:
    before = dict(networks.unet.attn_processors)
    plain = call(networks, calls, SharedAttention(([], []), steps=0))
    processor = SharedAttention(([1, 2], [1, 2]), steps=10)
    shared = call(networks, calls, processor)
    assert torch.equal(shared[:3], plain[:3]) and not torch.allclose(shared[3], plain[3])
    processor.step = 4  # self-attention is the edit's own again
    crossed = call(networks, calls, processor)
    assert not torch.allclose(crossed[3], plain[3]) and not torch.allclose(crossed[3], shared[3])
    processor.step = 8
    assert torch.equal(call(networks, calls, processor), plain)
    assert networks.unet.attn_processors == before


def test_with_all_words_shared_and_equal_latents_the_edit_is_the_base(networks: Networks, calls: tuple) -> None:
    """Maps are the base's then, and values differ by the words alone, which are the same."""
    latents, words = (copy.deepcopy(one) for one in calls)
    latents[3], words[3] = latents[2], words[2]
    everything = list(range(words.shape[1]))
    found = call(networks, (latents, words), SharedAttention((everything, everything), steps=10))
    torch.testing.assert_close(found[3], found[2], rtol=1e-4, atol=1e-5)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_boxes_hold_the_mask_and_its_context(data: st.DataObject) -> None:
    unit = data.draw(st.sampled_from([4, 16]))
    height, width = (unit * data.draw(st.integers(1, 6)) for _ in range(2))
    mask = np.zeros((height, width), dtype=bool)
    rows, columns = st.integers(0, height - 1), st.integers(0, width - 1)
    for row, column in data.draw(st.lists(st.tuples(rows, columns), min_size=1, max_size=3)):
        mask[row, column] = True
    context = data.draw(st.integers(0, 20))
    left, top, right, bottom = box_around(mask, context, unit)
    assert not any(bound % unit for bound in (left, top, right, bottom))
    for row, column in np.argwhere(mask):
        assert top <= max(0, row - context) and min(height, row + 1 + context) <= bottom <= height
        assert left <= max(0, column - context) and min(width, column + 1 + context) <= right <= width
