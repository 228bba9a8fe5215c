"""Prompt-to-prompt: the edit attends as the base does.

Source: "Prompt-to-Prompt Image Editing with Cross Attention Control" (arXiv 2208.01626), section 3.2.  Both prompts are
denoised together, from the same noise.  In the first steps the edit's cross-attention maps of words are the base's:
those of shared words, and of a word that takes another one's place.  For fewer steps self-attention maps are, too.
Only the conditional half of the guidance is changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor

CROSS_SHARE, SELF_SHARE = 0.8, 0.4
"""Shares of the steps in which cross-attention and self-attention maps are the base's, the paper's values."""

BASE, EDIT = 2, 3
"""Where the conditional samples of the base and of the edit stand in a batch of two prompts with guidance."""


def align(old: Sequence[int], new: Sequence[int]) -> tuple[list[int], list[int]]:
    """Which tokens of a new prompt are which of the old one: positions in the old one, and in the new one.

    Shared tokens belong together, and as many tokens that replace as many others, one by one.
    """
    pairs: list[tuple[int, int]] = []
    for kind, old_from, old_to, new_from, new_to in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal" or (kind == "replace" and old_to - old_from == new_to - new_from):
            pairs.extend(zip(range(old_from, old_to), range(new_from, new_to), strict=True))
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


class SharedAttention:
    """An attention processor for a batch of two prompts with guidance, in which the edit takes maps from the base.

    Args:
        aligned: what :func:`align` found.
        steps: of the run.

    Attributes:
        step: the number of the step, from 0, which whoever runs the pipeline counts.
    """

    def __init__(self, aligned: tuple[list[int], list[int]], steps: int) -> None:
        self.step = 0
        self._old, self._new = aligned
        self._cross_steps, self._self_steps = CROSS_SHARE * steps, SELF_SHARE * steps

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attend, as ``diffusers.models.attention_processor.AttnProcessor`` does for tokens."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            attn.head_to_batch_dim(project(states))
            for project, states in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        maps = attn.get_attention_scores(query, key, attention_mask).unflatten(0, (len(hidden_states), -1))
        self._share(maps, cross=encoder_hidden_states is not None)
        attended = attn.batch_to_head_dim(torch.bmm(maps.flatten(0, 1), value))
        return attn.to_out[1](attn.to_out[0](attended))

    def _share(self, maps: Tensor, cross: bool) -> None:
        """Replace the edit's maps in ``[samples, heads, positions, keys]``."""
        if cross and self.step < self._cross_steps:
            maps[EDIT, :, :, self._new] = maps[BASE, :, :, self._old]
        elif not cross and self.step < self._self_steps:
            maps[EDIT] = maps[BASE]


@contextmanager
def shared_attention(unet: Any, processor: SharedAttention) -> Iterator[None]:
    """Give all attention of a U-Net a processor, and its own ones back in the end."""
    before = dict(unet.attn_processors)
    unet.set_attn_processor(processor)
    try:
        yield
    finally:
        unet.set_attn_processor(before)
