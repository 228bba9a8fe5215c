"""Room for prompts of other lengths, in pipelines that do not pad them.

The network calls of a recorded run and an edit must have the same shapes. Most pipelines pad all prompts to one length;
where they do not (Qwen-Image), a session does, with masks that leave the padding out of all attention.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fisedit_compile.errors import OptionError, PipelineError

ROUNDED, SPARE = 64, 32
"""Padded prompts have a multiple of so many tokens, and at least so many more than the recorded one."""


def masked_prompt_limit(encode: Callable[..., Any] | None) -> int | None:
    """The most tokens that a pipeline's ``encode_prompt`` makes; None: its prompts have one length, or no masks."""
    parameters = {} if encode is None else inspect.signature(encode).parameters
    if "prompt_embeds_mask" not in parameters or "max_sequence_length" not in parameters:
        return None
    limit = parameters["max_sequence_length"].default
    if limit in (None, inspect.Parameter.empty):
        # Some pipelines keep their limit elsewhere, and some have none.
        limit = getattr(getattr(encode, "__self__", None), "default_max_sequence_length", None)
    return sys.maxsize if limit is None else int(limit)


def check_prompt_tokens(pipe: Any, tokens: int | None, limit: int | None) -> None:
    """Check the option ``prompt_tokens`` of a session.

    Args:
        pipe: the pipeline, for the message.
        tokens: what the user gave.
        limit: the most tokens of a prompt; None: the pipeline pads its prompts.

    Raises:
        OptionError: it is no positive number, or the pipeline's prompts cannot be padded.
    """
    if tokens is None:
        return
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise OptionError(f"prompt_tokens must be a positive number of tokens or None, got {tokens!r}")
    if limit is None:
        raise OptionError(
            f"prompt_tokens is for pipelines whose prompts have different lengths and masks, such as "
            f"QwenImagePipeline; {type(pipe).__name__} needs none, leave it out"
        )


class PromptLengths:
    """How many tokens the prompts of a run are padded to, by the order in which they are encoded.

    Args:
        room: as many for each; None: some more than the prompt has, where the pipeline itself leaves out masks that
            would hide nothing. (Others may not look at masks at all.)
        recorded: those of the picture that is edited, which has to have room; None for a generation.
    """

    def __init__(self, room: int | None = None, recorded: PromptLengths | None = None) -> None:
        self._room, self._recorded = room, recorded
        self._lengths: list[int | None] = []

    def padding(self, encode: Callable[..., Any], limit: int | None) -> Callable[..., Any]:
        """A pipeline's ``encode_prompt``, of which the results are padded.

        Args:
            encode: returns embeddings ``[B, tokens, C]`` and their mask ``[B, tokens]``, or None in its place.
            limit: the most tokens that it makes; None: the pipeline pads its prompts.
        """
        if limit is None:
            return encode

        @wraps(encode)
        def padded(*positional: Any, **named: Any) -> Any:
            embeddings, mask = encode(*positional, **named)
            most = inspect.signature(encode).bind(*positional, **named).arguments.get("max_sequence_length")
            length = self._next(embeddings.shape[1], mask, limit if most is None else int(most))
            return (embeddings, mask) if length is None else _pad(embeddings, mask, length)

        return padded

    def _next(self, tokens: int, mask: Tensor | None, most: int) -> int | None:
        number = len(self._lengths)
        if self._recorded is not None and number < len(self._recorded._lengths):
            length = self._recorded._lengths[number]
        elif self._room is not None:
            length = self._room
        else:
            # A limit need not count all tokens of a prompt (those of a template): it is never shorter than it came.
            spacious = max(tokens, min(most, -(-(tokens + SPARE) // ROUNDED) * ROUNDED))
            length = None if mask is not None else spacious
        self._lengths.append(length)
        if length is not None and tokens > length:
            given = "when the picture was generated" if self._recorded is not None else "by prompt_tokens"
            raise PipelineError(
                f"a prompt has {tokens} tokens, and {given} there was room for {length}; take a shorter prompt, or "
                f"generate with EditSession(pipe, prompt_tokens={-(-tokens // ROUNDED) * ROUNDED})"
            )
        return length


def _pad(embeddings: Tensor, mask: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
    """Embeddings ``[B, length, C]`` and their mask ``[B, length]``, of those and the mask of fewer tokens."""
    if mask is None:
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
    missing = length - embeddings.shape[1]
    return functional.pad(embeddings, (0, 0, 0, missing)), functional.pad(mask, (0, missing))
