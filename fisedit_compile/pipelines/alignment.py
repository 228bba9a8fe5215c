"""Which words of a new prompt the recorded one had, token by token.

Words are what both prompts share, and not tokens: of "cat" and "catch" the first token may be the same. So tokens are
put together to words first, as the tokenizer marks them, and these are aligned (insertions, deletions, replacements).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines.arguments import CallArguments, same_value
from fisedit_compile.pipelines.families import Family
from fisedit_compile.pipelines.network_calls import NetworkCalls

PROMPT_INPUT = "encoder_hidden_states"
"""What networks of diffusers call the embedded prompt ``[B, tokens, C]``."""

_ENDS, _BEGINS = "</w>", ("\u2581", "\u0120")
"""How vocabularies mark the last token of a word (CLIP), or the first one (SentencePiece, byte pairs of GPT-2)."""


@dataclass(frozen=True)
class Tokens:
    """A prompt as its text encoder is given it.

    Attributes:
        words: its words in order, those that only mark beginning and end included; each the numbers of its tokens.
        places: where the tokens of each word stand.
        padding: where nothing stands.
    """

    words: tuple[tuple[int, ...], ...]
    places: tuple[tuple[int, ...], ...]
    padding: frozenset[int]


def read_tokens(tokenizer: Any, text: str, count: int) -> Tokens:
    """The tokens of a prompt, cut and padded to ``count``.

    Args:
        tokenizer: of transformers.
        text: the prompt.
        count: how many tokens the network is given.
    """
    read = tokenizer(text, padding="max_length", truncation=True, max_length=count, return_attention_mask=True)
    numbers, there = list(read["input_ids"]), list(read["attention_mask"])
    names = tokenizer.convert_ids_to_tokens(numbers)
    special = set(tokenizer.all_special_ids)
    ends = any(name.endswith(_ENDS) for name in names)
    begins = any(name.startswith(_BEGINS) for name in names)
    words: list[list[int]] = []
    complete = True
    for place, (number, name) in enumerate(zip(numbers, names, strict=True)):
        if not there[place]:
            complete = True
            continue
        alone = number in special or not (ends or begins)
        if complete or alone or (begins and name.startswith(_BEGINS)):
            words.append([])
        words[-1].append(place)
        complete = alone or (ends and name.endswith(_ENDS))
    return Tokens(
        tuple(tuple(numbers[place] for place in word) for word in words),
        tuple(map(tuple, words)),
        frozenset(place for place, used in enumerate(there) if not used),
    )


def align_tokens(recorded: Tokens, new: Tokens, count: int) -> list[int]:
    """For each of ``count`` tokens of the new prompt the place of the same one in the recorded prompt, -1 where there
    is none. Padding is the same where both prompts have it at one place."""
    alignment = [-1] * count
    for place in recorded.padding & new.padding:
        alignment[place] = place
    matcher = SequenceMatcher(None, recorded.words, new.words, autojunk=False)
    for block in matcher.get_matching_blocks():
        for word in range(block.size):
            for before, place in zip(recorded.places[block.a + word], new.places[block.b + word], strict=True):
                alignment[place] = before
    return alignment


class Prompts:
    """The prompts of a recorded run, to which those of an edit are aligned.

    Args:
        pipe: a diffusers pipeline.
        family: of the pipeline.
        arguments: of its calls.
        given: those of the recorded run.

    Raises:
        PipelineError: the pipeline's words cannot be told apart, or the prompts are not texts.
    """

    def __init__(self, pipe: Any, family: Family, arguments: CallArguments, given: Mapping[str, Any]) -> None:
        self._pipe, self._arguments, self._given = pipe, arguments, given
        self._encoders = [
            (getattr(pipe, tokenizer), argument)
            for tokenizer, argument in family.tokenizers
            if getattr(pipe, tokenizer, None) is not None and arguments.accepts(argument)
        ]
        if not self._encoders:
            raise PipelineError(
                f"the words of {type(pipe).__name__}'s prompts cannot be told from what its network is given, so that "
                "dense steps cannot be stabilised; find masks without stabilised=True"
            )
        if self._texts("prompt", given) is None:
            raise _unknown_words("prompt_embeds")

    def align(self, given: Mapping[str, Any], calls: NetworkCalls) -> Tensor | None:
        """The alignment of an edit's prompts, int64 ``[B, tokens]``, the samples as the network gets them.

        Args:
            given: the arguments of the edit.
            calls: of the recorded run.

        Returns:
            None where all words are the same.

        Raises:
            PipelineError: it cannot be told which tokens of the network's input are which words.
        """
        samples, tokens = self._form(calls)
        guided = self._arguments.guidance(given).on
        images = int(self._arguments.value(given, "num_images_per_prompt") or 1)
        prompts = self._aligned("", given, tokens)
        rows = [row for row in prompts for _ in range(images)]
        if guided:
            negative = self._aligned("negative_", given, tokens)
            rows = [row for row in negative * (len(prompts) // len(negative)) for _ in range(images)] + rows
        if len(rows) != samples:
            raise PipelineError(
                f"{type(self._pipe).__name__} calls its network with {samples} samples for {len(prompts)} prompts, and "
                f"{len(rows)} were expected, so that it is not known which of them have which words; find masks "
                "without stabilised=True"
            )
        same = list(range(tokens))
        return None if all(row == same for row in rows) else torch.tensor(rows)

    def _form(self, calls: NetworkCalls) -> tuple[int, int]:
        """Samples and tokens of the network's prompt, the same in all calls, of which each turn has one."""
        shapes = calls.shapes(PROMPT_INPUT)
        shape = shapes[0] if shapes else None
        lengths = {encoder.model_max_length for encoder, _ in self._encoders}
        if shape is None or len(shape) != 3 or set(shapes) != {shape} or not calls.one_a_turn or lengths != {shape[1]}:
            raise PipelineError(
                f"{type(self._pipe).__name__} gives its network other tokens than those of its prompts, or not the "
                "same in each step, so that it is not known which words they are; find masks "
                "without stabilised=True"
            )
        return shape[0], shape[1]

    def _aligned(self, side: str, given: Mapping[str, Any], tokens: int) -> list[list[int]]:
        """The alignment of each prompt of a side of guidance; a token is shared where all text encoders say so.

        Raises:
            PipelineError: embeddings were given that are not those of the recorded run.
        """
        embedded = f"{side}prompt_embeds"
        embeddings = [self._arguments.value(one, embedded) for one in (self._given, given)]
        if any(value is not None for value in embeddings):
            if same_value(*embeddings):
                return [list(range(tokens))]
            raise _unknown_words(embedded)
        found: list[list[int]] | None = None
        for tokenizer, argument in self._encoders:
            before, now = (self._texts(f"{side}{argument}", one) for one in (self._given, given))
            rows = self._rows(tokenizer, before, now, tokens)
            if found is None:
                found = rows
            else:
                pairs = zip(found, rows, strict=True)
                found = [[a if a == b else -1 for a, b in zip(*pair, strict=True)] for pair in pairs]
        assert found is not None
        return found

    def _rows(self, tokenizer: Any, before: list[str] | None, now: list[str] | None, tokens: int) -> list[list[int]]:
        if before is None and now is None:
            return [list(range(tokens))]
        if before is None or now is None:
            # What stands in for a negative prompt that is not given need not be a text.
            return [[-1] * tokens for _ in now or before or ()]
        count = max(len(before), len(now))
        before, now = (texts * count if len(texts) == 1 else texts for texts in (before, now))

        def read(text: str) -> Tokens:
            return read_tokens(tokenizer, self._converted(text, tokenizer), tokens)

        return [align_tokens(read(left), read(right), tokens) for left, right in zip(before, now, strict=True)]

    def _converted(self, text: str, tokenizer: Any) -> str:
        """A prompt in which words that were learnt as several tokens are written as these."""
        convert = getattr(self._pipe, "maybe_convert_prompt", None)
        return str(convert(text, tokenizer)) if callable(convert) else text

    def _texts(self, name: str, given: Mapping[str, Any]) -> list[str] | None:
        """The texts of an argument; of a second text encoder, where none is given, those of the first. None: there are
        none, and the pipeline has its own way of leaving a negative prompt out."""
        value = self._arguments.value(given, name)
        first = name.removesuffix("_2")
        if value is None:
            return None if name == first else self._texts(first, given)
        return [value] if isinstance(value, str) else [str(text) for text in value]


def _unknown_words(embedded: str) -> PipelineError:
    return PipelineError(
        f"the words of {embedded} are not known, so that dense steps cannot be stabilised; give prompts as texts, or "
        "find masks without stabilised=True"
    )


def check_words(pipe: Any, family: Family, arguments: CallArguments, given: Mapping[str, Any], wanted: bool) -> None:
    """Refuse, before anything is computed, a generation whose words no edit could be aligned to.

    Raises:
        PipelineError: see :class:`Prompts`.
    """
    if wanted:
        Prompts(pipe, family, arguments, given)
