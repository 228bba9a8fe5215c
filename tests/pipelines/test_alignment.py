"""Which words of a new prompt the recorded one had."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines.alignment import PROMPT_INPUT, Prompts, Tokens, align_tokens, read_tokens
from fisedit_compile.pipelines.arguments import CallArguments
from fisedit_compile.pipelines.families import family_of
from fisedit_compile.pipelines.network_calls import NetworkCalls
from support.tiny_pipelines import TOKENS, WORDS, tiny_pipeline, tiny_tokenizer

SAME = list(range(TOKENS))
words = st.lists(st.sampled_from(WORDS[4:]), max_size=7).map(" ".join)


def aligned(before: str, now: str) -> list[int]:
    tokenizer = tiny_tokenizer()
    return align_tokens(*(read_tokens(tokenizer, text, TOKENS) for text in (before, now)), TOKENS)


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        # <start> a red ball on grass <end> <pad>
        ("a red ball on grass", "a red ball on grass", SAME),
        ("a red ball on grass", "a blue ball on grass", [0, 1, -1, 3, 4, 5, 6, 7]),
        ("a ball on grass", "a red ball on grass", [0, 1, -1, 2, 3, 4, 5, 7]),
        # The last word's place is padding now, which the recorded prompt did not have there.
        ("a red ball on grass", "a ball on grass", [0, 1, 3, 4, 5, 6, -1, 7]),
        ("a red ball", "at night", [0, -1, -1, 4, -1, 5, 6, 7]),
        ("", "a", [0, -1, 1, 3, 4, 5, 6, 7]),
        # Cut off behind the eighth token.
        ("a red ball on grass at night", "a red ball on grass at a", SAME),
    ],
)
def test_words_are_put_in_taken_out_and_exchanged(before: str, now: str, expected: list[int]) -> None:
    assert aligned(before, now) == expected


@given(words, words)
def test_aligned_tokens_are_the_same_and_in_order(before: str, now: str) -> None:
    tokenizer = tiny_tokenizer()
    ids = [
        tokenizer(text, padding="max_length", truncation=True, max_length=TOKENS)["input_ids"] for text in (before, now)
    ]
    alignment = aligned(before, now)
    assert all(ids[0][place] == ids[1][token] for token, place in enumerate(alignment) if place >= 0)
    places = [place for place in alignment if place >= 0]
    assert places == sorted(set(places)) and alignment[0] == 0
    assert (alignment == SAME) == (ids[0] == ids[1])


class Pieces:
    """A tokenizer of which words have several tokens, marked as vocabularies do; a word at a place each."""

    all_special_ids = (0, 1)

    def __init__(self, names: dict[str, list[str]]) -> None:
        self._names = names
        self._numbers = {name: number + 2 for number, name in enumerate(sum(names.values(), []))}

    def __call__(self, text: str, max_length: int, **_: Any) -> dict[str, list[int]]:
        numbers = [0, *(self._numbers[piece] for word in text.split() for piece in self._names[word]), 1]
        there = [1] * len(numbers) + [0] * (max_length - len(numbers))
        # The padding of CLIP is the token that marks the end.
        return {"input_ids": numbers + [1] * (max_length - len(numbers)), "attention_mask": there}

    def convert_ids_to_tokens(self, numbers: list[int]) -> list[str]:
        names = {number: name for name, number in self._numbers.items()}
        return [names.get(number, "<special>") for number in numbers]


@pytest.mark.parametrize(
    "names",
    [
        {"cat": ["cat</w>"], "catch": ["cat", "ch</w>"], "catcher": ["cat", "ch", "er</w>"], "a": ["a</w>"]},
        {"cat": ["▁cat"], "catch": ["▁cat", "ch"], "catcher": ["▁cat", "ch", "er"], "a": ["▁a"]},
        {"cat": ["Ġcat"], "catch": ["Ġcat", "ch"], "catcher": ["Ġcat", "ch", "er"], "a": ["Ġa"]},
    ],
)
def test_a_word_is_shared_as_a_whole_or_not_at_all(names: dict[str, list[str]]) -> None:
    tokenizer = Pieces(names)
    before, now = (read_tokens(tokenizer, text, 8) for text in ("a catch a", "a catcher a"))
    assert [len(word) for word in now.words] == [1, 1, 3, 1, 1] and now.padding == {7}
    assert align_tokens(before, now, 8) == [0, 1, -1, -1, -1, 4, 5, 7]
    before, now = (read_tokens(tokenizer, text, 8) for text in ("cat catch", "a cat catch"))
    assert align_tokens(before, now, 8) == [0, -1, 1, 2, 3, 4, 6, 7]


def test_padding_in_front_is_padding() -> None:
    before = Tokens(((5,), (6,)), ((2,), (3,)), frozenset({0, 1}))
    now = Tokens(((6,),), ((3,),), frozenset({0, 1, 2}))
    assert align_tokens(before, now, 4) == [0, 1, -1, 3]


def calls(*shapes: tuple[int, ...], turns: int | None = None) -> NetworkCalls:
    """Network calls with prompts of these shapes, one a turn unless there are fewer turns."""
    made = NetworkCalls()
    for number, shape in enumerate(shapes):
        made.add({PROMPT_INPUT: torch.zeros(shape)})
        if turns is None or number < turns - 1:
            made.end_turn()
    if turns is not None:
        made.end_turn()
    return made


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def xl() -> Any:
    return tiny_pipeline("xl")


def prompts(pipe: Any, **given: Any) -> Prompts:
    family = family_of(pipe)
    return Prompts(pipe, family, CallArguments(pipe, family), given)


def rows(found: torch.Tensor | None) -> list[list[int]]:
    assert found is not None and found.dtype is torch.int64
    return found.tolist()


BLUE = [0, 1, -1, 3, 4, 5, 6, 7]
RED_BALL, BLUE_BALL = "a red ball on grass", "a blue ball on grass"


def test_guided_batches_have_negative_prompts_first(pipe: Any) -> None:
    recorded = prompts(pipe, prompt=RED_BALL)
    both = calls((2, TOKENS, 16))
    assert rows(recorded.align({"prompt": BLUE_BALL}, both)) == [SAME, BLUE]
    single = calls((1, TOKENS, 16), (1, TOKENS, 16))
    assert rows(recorded.align({"prompt": BLUE_BALL, "guidance_scale": 1.0}, single)) == [BLUE]
    negative = prompts(pipe, prompt=RED_BALL, negative_prompt=RED_BALL)
    changed = {"prompt": RED_BALL, "negative_prompt": BLUE_BALL}
    assert rows(negative.align(changed, both)) == [BLUE, SAME]
    # What stands in for a negative prompt that is not given is not known.
    assert rows(recorded.align({"prompt": RED_BALL, "negative_prompt": "sand"}, both)) == [[-1] * TOKENS, SAME]


def test_batches_of_prompts_and_pictures(pipe: Any) -> None:
    recorded = prompts(pipe, prompt=[RED_BALL, BLUE_BALL])
    given = {"prompt": [RED_BALL, RED_BALL], "num_images_per_prompt": 2}
    expected = [SAME] * 4 + [SAME, SAME, BLUE, BLUE]
    assert rows(recorded.align(given, calls((8, TOKENS, 16)))) == expected


def test_the_same_words_need_no_alignment(pipe: Any) -> None:
    recorded = prompts(pipe, prompt=RED_BALL)
    assert recorded.align({"prompt": RED_BALL, "guidance_scale": 3.0}, calls((2, TOKENS, 16))) is None


def test_two_text_encoders_must_agree(xl: Any) -> None:
    recorded = prompts(xl, prompt=RED_BALL, prompt_2=BLUE_BALL)
    both = calls((2, TOKENS, 32))
    assert rows(recorded.align({"prompt": BLUE_BALL, "prompt_2": BLUE_BALL}, both)) == [SAME, BLUE]
    shorter = {"prompt": RED_BALL, "prompt_2": "a ball on grass"}
    assert rows(recorded.align(shorter, both))[1] == [0, 1, -1, -1, -1, -1, -1, 7]
    # Without a prompt of its own, the second encoder is given the first one's.
    assert rows(prompts(xl, prompt=RED_BALL).align({"prompt": BLUE_BALL}, both)) == [SAME, BLUE]


def test_words_that_were_learnt_as_several_tokens_are_written_out(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(text: str, tokenizer: Any) -> str:
        return text.replace("<mine>", "red box")

    monkeypatch.setattr(type(pipe), "maybe_convert_prompt", lambda self, text, tokenizer: convert(text, tokenizer))
    recorded = prompts(pipe, prompt="a red box")
    assert recorded.align({"prompt": "a <mine>"}, calls((2, TOKENS, 16))) is None


def test_embeddings_have_no_words(pipe: Any) -> None:
    embeds = torch.zeros(1, TOKENS, 16)
    with pytest.raises(PipelineError, match="words of prompt_embeds are not known.*stabilised=True"):
        prompts(pipe, prompt_embeds=embeds)
    recorded = prompts(pipe, prompt=RED_BALL, negative_prompt_embeds=embeds)
    both = calls((2, TOKENS, 16))
    kept = {"prompt": BLUE_BALL, "negative_prompt_embeds": embeds.clone()}
    assert rows(recorded.align(kept, both)) == [SAME, BLUE]
    for changed in ({"prompt_embeds": embeds}, {**kept, "negative_prompt_embeds": embeds + 1}, {"prompt": BLUE_BALL}):
        with pytest.raises(PipelineError, match="words of (negative_)?prompt_embeds are not known"):
            recorded.align(changed, both)


@pytest.mark.parametrize(
    "made",
    [
        calls((2, 9, 16)),  # of another tokenizer
        calls((2, TOKENS, 16), (2, 9, 16)),
        calls((2, TOKENS, 16), (1, TOKENS, 16)),
        calls((2, TOKENS, 16), (2, TOKENS, 16), turns=1),  # guidance by a second call
        calls((2, TOKENS)),
        calls(),
    ],
)
def test_other_tokens_than_those_of_the_prompts_are_refused(pipe: Any, made: NetworkCalls) -> None:
    with pytest.raises(PipelineError, match="not known which words they are"):
        prompts(pipe, prompt=RED_BALL).align({"prompt": BLUE_BALL}, made)


@pytest.mark.parametrize("samples", [1, 3])
def test_other_samples_than_prompts_are_refused(pipe: Any, samples: int) -> None:
    with pytest.raises(PipelineError, match=f"with {samples} samples for 1 prompts, and 2 were expected"):
        prompts(pipe, prompt=RED_BALL).align({"prompt": BLUE_BALL}, calls((samples, TOKENS, 16)))
