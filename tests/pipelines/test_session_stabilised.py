"""Sessions whose dense steps take the attention to shared words from the recorded run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fisedit_compile as fisedit
from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines import AutomaticMask
from fisedit_compile.pipelines.families.schedulers import make_scheduler
from fisedit_compile.pipelines.stabilising import AttentionTurns, check_kept
from support.tiny_pipelines import picture_arguments, tiny_pipeline
from support.tolerances import assert_near
from support.transformer_pipelines import transformer_pipeline

KEEPS_DYNAMO = True
STEPS, DENSE = 5, 2
STABILISED = AutomaticMask("fisedit", steps=DENSE, out_of=STEPS, stabilised=True)
EVERYTHING = replace(STABILISED, threshold=0.0, opening=0, growth=12)
PLAIN = AutomaticMask("fisedit", steps=DENSE, out_of=STEPS)
RED, BLUE = "a red ball on grass", "a blue ball on grass"
#: Of the unconditional half, and of the red and the blue ball.
ALIGNMENT = [list(range(8)), [0, 1, -1, 3, 4, 5, 6, 7]]


class PromptToPrompt:
    """An attention processor in eager PyTorch that keeps attention maps, or takes columns of those that were kept."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        self.taking = False

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        words = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(words), attn.to_v(words)
        query, key, value = (attn.head_to_batch_dim(part) for part in (query, key, value))
        maps = attn.get_attention_scores(query, key)
        if encoder_hidden_states is not None:
            maps = self._exchanged(maps) if self.taking else maps
            if not self.taking:
                self.kept.append(maps)
        return attn.to_out[0](attn.batch_to_head_dim(maps @ value))

    def _exchanged(self, maps: Tensor) -> Tensor:
        before, result = self.kept.pop(0), maps.clone()
        heads = len(maps) // len(ALIGNMENT)
        for sample, tokens in enumerate(ALIGNMENT):
            for token, place in enumerate(tokens):
                if place >= 0:
                    rows = slice(sample * heads, (sample + 1) * heads)
                    result[rows, :, token] = before[rows, :, place]
        return result


@contextmanager
def processed(unet: Any, processor: Any) -> Iterator[None]:
    before = unet.attn_processors
    unet.set_attn_processor(processor)
    yield
    unet.set_attn_processor(before)


def arguments(kind: str = "text-to-image") -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return {**picture_arguments(kind), "num_inference_steps": STEPS, "generator": generator, "output_type": "latent"}


def trajectory(session: fisedit.EditSession) -> list[Tensor]:
    return session._history.last.trajectory.latents


@pytest.fixture(scope="module")
def session() -> Iterator[fisedit.EditSession]:
    torch.compiler.reset()
    yield fisedit.EditSession(tiny_pipeline(), automatic_mask=STABILISED)
    torch.compiler.reset()


@pytest.mark.parametrize("kind", ["text-to-image", "xl"])
def test_dense_steps_are_those_of_prompt_to_prompt(session: fisedit.EditSession, kind: str) -> None:
    if kind == "xl":
        session = fisedit.EditSession(tiny_pipeline(kind), automatic_mask=STABILISED)
    pipe, processor = session.pipe, PromptToPrompt()
    latents: dict[str, list[Tensor]] = {RED: [], BLUE: []}
    with processed(pipe.unet, processor):
        for prompt, kept in latents.items():
            processor.taking = prompt == BLUE

            def follow(_: Any, turn: int, __: Any, tensors: dict[str, Tensor], kept: list[Tensor] = kept) -> Any:
                kept.append(tensors["latents"].clone())
                return {}

            pipe(prompt, callback_on_step_end=follow, **arguments(kind))
    assert not processor.kept
    session.generate(RED, **arguments(kind))
    assert_near(trajectory(session)[-1], latents[RED][-1], "recorded")
    edit = session.edit(BLUE, automatic_mask=EVERYTHING)
    # Nothing was pasted: the mask is everything. The maps that were kept end with the steps that find it.
    assert bool(edit.mask.all()) and edit.report.dense_calls == STEPS
    for turn in range(DENSE):
        assert_near(trajectory(session)[turn], latents[BLUE][turn], f"turn {turn}")
    assert edit.report.stabilised_calls == edit.report.to_dict()["stabilised_calls"] == DENSE
    assert ("of them stabilised", str(DENSE)) in edit.report.rows()
    if kind == "text-to-image":
        plain = session.edit(RED, automatic_mask=PLAIN)
        assert plain.report.stabilised_calls == 0 and "of them stabilised" not in str(plain.report)


def test_maps_are_kept_of_dense_turns_only(session: fisedit.EditSession) -> None:
    session.generate(RED, **arguments())
    (recording,) = session.runtime._store.bases[session.history[0].name].recordings.values()
    assert [call.keeps_attention for call in recording.calls] == [True] * DENSE + [False] * (STEPS - DENSE)
    with pytest.raises(PipelineError, match="the first 3 calls of the picture .*in the first 2 calls only"):
        session.edit(BLUE, automatic_mask=AutomaticMask("fisedit", steps=3, out_of=STEPS, stabilised=True))
    assert len(session.history) == 1


def test_stabilisation_changes_the_dense_steps(session: fisedit.EditSession) -> None:
    session.generate(RED, **arguments())
    session.edit(BLUE)
    stabilised = trajectory(session)[0]
    session.undo()
    session.edit(BLUE, automatic_mask=PLAIN)
    plain = trajectory(session)[0]
    session.undo()
    moved = float((plain - trajectory(session)[0]).abs().max())
    assert float((plain - stabilised).abs().max()) > 0.01 * moved > 0


def test_edits_of_edits(session: fisedit.EditSession) -> None:
    session.generate(RED, **arguments())
    assert session.edit(BLUE).report.stabilised_calls == DENSE
    assert session.edit("a blue box on grass").report.stabilised_calls == DENSE
    mask = torch.zeros(8, 12)
    mask[2:4, 3:6] = 1
    # Nothing changed: the attention is that of the picture before.
    session.edit("a box", mask=torch.zeros(8, 12))
    assert session.edit("a red box on grass").report.stabilised_calls == DENSE
    session.edit("a box", mask=mask)
    with pytest.raises(PipelineError, match="these were not kept.*edited with a given mask"):
        session.edit(BLUE)
    assert session.edit(BLUE, automatic_mask=PLAIN).report.dense_calls == DENSE


def test_the_same_words_change_nothing(session: fisedit.EditSession) -> None:
    base = session.generate(RED, **arguments())
    edit = session.edit(RED)
    assert edit.report.stabilised_calls == 0 and not bool(edit.mask.any())
    assert torch.equal(edit.output, base.output)


class Recorder:
    """What a session tells the runtime's recording."""

    attention_failure: str | None = None

    def __init__(self) -> None:
        self.told: list[bool] = []

    def keep_attention_maps(self, keep: bool) -> None:
        self.told.append(keep)


@pytest.mark.parametrize(("scheduler", "turns"), [("ddim", 2), ("pndm", 3), ("heun", 4)])
def test_turns_are_counted_as_the_scheduler_counts_them(scheduler: str, turns: int) -> None:
    pipe, recorder = tiny_pipeline(), Recorder()
    pipe.scheduler = make_scheduler(scheduler, pipe.scheduler)
    pipe.scheduler.set_timesteps(STEPS)
    total = len(pipe.scheduler.timesteps)
    attention = AttentionTurns(STABILISED)
    attention.follow(recorder)
    for done in range(1, total + 1):
        attention.end_turn(pipe, done, total)
        assert recorder.told == ([False] if done >= turns else [])
    assert attention.kept == turns
    check_kept(STABILISED, pipe.scheduler, total, turns)
    with pytest.raises(PipelineError, match=f"the first {turns} calls"):
        check_kept(STABILISED, pipe.scheduler, total, turns - 1)


def test_a_network_that_keeps_nothing_is_refused_after_its_first_step() -> None:
    pipe, recorder = tiny_pipeline(), Recorder()
    recorder.attention_failure = "there is no cross-attention"
    attention = AttentionTurns(STABILISED)
    attention.follow(recorder)
    with pytest.raises(PipelineError, match="Pipeline cannot be stabilised: there is no cross-attention"):
        attention.end_turn(pipe, 1, STEPS)
    other = AttentionTurns(PLAIN)
    other.follow(recorder)
    other.end_turn(pipe, 1, STEPS)
    assert other.kept == 0 and not recorder.told


def test_a_base_without_maps_is_refused_before_anything_is_computed(session: fisedit.EditSession) -> None:
    session.automatic_mask = PLAIN
    session.generate(RED, **arguments())
    session.automatic_mask = STABILISED
    calls = session.runtime.stats.calls
    with pytest.raises(PipelineError, match="these were not kept: make the session with EditSession"):
        session.edit(BLUE, automatic_mask=STABILISED)
    assert session.runtime.stats.calls == calls and len(session.history) == 1


def test_words_that_are_not_known_are_refused_before_anything_is_computed(session: fisedit.EditSession) -> None:
    with pytest.raises(PipelineError, match="words of prompt_embeds are not known"):
        session.generate(prompt_embeds=torch.zeros(1, 8, 16), **arguments())
    session.generate(RED, **arguments())
    calls = session.runtime.stats.calls
    with pytest.raises(PipelineError, match="words of prompt_embeds are not known"):
        session.edit(prompt_embeds=torch.zeros(1, 8, 16))
    assert session.runtime.stats.calls == calls
    mask = torch.ones(8, 12)
    mask[:4] = 0
    session.edit(prompt_embeds=torch.zeros(1, 8, 16), mask=mask)


def test_pipelines_without_cross_attention_are_refused() -> None:
    session = fisedit.EditSession(transformer_pipeline("sd3"), automatic_mask=STABILISED)
    with pytest.raises(PipelineError, match="words of StableDiffusion3Pipeline's prompts cannot be told"):
        session.generate(RED)
