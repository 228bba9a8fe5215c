"""Prompts of different lengths in one session: what is padded, to how many tokens, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fisedit_compile.errors import OptionError, PipelineError
from fisedit_compile.pipelines import EditSession
from fisedit_compile.pipelines.families.prompts import PromptLengths, masked_prompt_limit
from support.tiny_pipelines import tiny_pipeline
from support.transformer_pipelines import transformer_pipeline

Encoded = tuple[Tensor, Tensor | None]


def encode(
    tokens: int, masked: bool = False, *, prompt_embeds_mask: Any = None, max_sequence_length: int = 96
) -> Encoded:
    """As the pipelines' method: embeddings of ones, and a mask where it hides something."""
    mask = torch.ones(2, tokens, dtype=torch.long)
    mask[1, -1] = 0
    return torch.ones(2, tokens, 5), mask if masked else None


@pytest.mark.parametrize(("tokens", "most", "length"), [(1, 96, 64), (32, 96, 64), (33, 96, 96), (33, 512, 128)])
def test_room_is_left_for_longer_prompts(tokens: int, most: int, length: int) -> None:
    embeddings, mask = PromptLengths().padding(encode, masked_prompt_limit(encode))(tokens, max_sequence_length=most)
    assert embeddings.shape == (2, length, 5) and mask.shape == (2, length)
    counted = torch.arange(length) < tokens
    assert torch.equal(mask.bool(), counted.expand(2, -1))
    assert torch.equal(embeddings[..., 0].bool(), counted.expand(2, -1)), "padding is zero"


def test_edits_have_the_lengths_of_their_generation() -> None:
    generation = PromptLengths()
    encoded = generation.padding(encode, masked_prompt_limit(encode))
    assert encoded(9)[0].shape[1] == 64 and encoded(40)[0].shape[1] == 96
    edit = PromptLengths(recorded=generation)
    encoded = edit.padding(encode, masked_prompt_limit(encode))
    assert encoded(64)[1].all(), "a mask is given where the recorded run had one"
    assert encoded(2)[0].shape[1] == 96
    again = PromptLengths(recorded=edit).padding(encode, masked_prompt_limit(encode))
    with pytest.raises(PipelineError, match=r"has 65 tokens, .* was generated .* 64; .* prompt_tokens=128"):
        again(65)


def test_masks_that_a_pipeline_makes_itself_are_padded_when_asked_for() -> None:
    embeddings, mask = PromptLengths().padding(encode, masked_prompt_limit(encode))(9, masked=True)
    assert embeddings.shape[1] == mask.shape[1] == 9
    embeddings, mask = PromptLengths(20).padding(encode, masked_prompt_limit(encode))(9, masked=True)
    assert embeddings.shape[1] == 20
    assert mask.sum(1).tolist() == [9, 8]
    with pytest.raises(PipelineError, match="has 21 tokens, and by prompt_tokens there was room for 20"):
        PromptLengths(20).padding(encode, masked_prompt_limit(encode))(21)


@pytest.mark.parametrize(("own", "length"), [(None, 128), (80, 80)])
def test_a_limit_that_the_pipeline_keeps_elsewhere_or_has_not(own: int | None, length: int) -> None:
    class Pipe:
        default_max_sequence_length = own

        def encode_prompt(
            self, tokens: int, prompt_embeds_mask: Any = None, max_sequence_length: int | None = None
        ) -> Encoded:
            return encode(tokens)

    padded = PromptLengths().padding(Pipe().encode_prompt, masked_prompt_limit(Pipe().encode_prompt))
    assert padded(40)[0].shape[1] == min(128, length) if own else 96
    assert padded(70, max_sequence_length=None)[0].shape[1] == length
    assert padded(70, max_sequence_length=75)[0].shape[1] == 75


def test_a_limit_shorter_than_what_came_is_no_option_of_the_user() -> None:
    assert PromptLengths().padding(encode, masked_prompt_limit(encode))(40, max_sequence_length=34)[0].shape[1] == 40


def test_other_pipelines_are_left_alone() -> None:
    def fixed(prompt: str) -> Encoded:
        return encode(7)

    assert PromptLengths().padding(fixed, masked_prompt_limit(fixed)) is fixed


@pytest.mark.parametrize("tokens", [0, -3, 2.5, True])
def test_no_number_of_tokens(tokens: Any) -> None:
    with pytest.raises(OptionError, match=f"prompt_tokens must be a positive number of tokens or None, got {tokens}"):
        EditSession(transformer_pipeline("qwen-image"), prompt_tokens=tokens)


def test_pipelines_that_pad_their_prompts_need_no_option() -> None:
    with pytest.raises(OptionError, match="StableDiffusionPipeline needs none, leave it out"):
        EditSession(tiny_pipeline(), prompt_tokens=99)
