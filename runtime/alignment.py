"""Which tokens of a new prompt the recorded one had, and the attention maps that a recorded run keeps of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.errors import CallMismatchError, FisEditError, OptionError
from fisedit_compile.runtime.base import Base


def prepare_alignment(alignment: Any) -> Tensor:
    """An alignment as a runtime uses it.

    Args:
        alignment: whole numbers ``[tokens]`` or ``[samples, tokens]``, a tensor or what makes one: for each token of
            the new prompt the place of the same one in the recorded prompt, -1 where that had none.

    Returns:
        int64 ``[samples, tokens]`` on the CPU, a copy.

    Raises:
        OptionError: it has another form, or names a token that is not there.
    """
    given = torch.as_tensor(alignment).detach().cpu()
    if given.dim() not in (1, 2) or not given.numel() or given.is_floating_point() or given.is_complex():
        raise OptionError(
            f"an alignment must be whole numbers [tokens] or [samples, tokens], got {given.dtype} of shape "
            f"{list(given.shape)}"
        )
    prepared = given.to(torch.int64, copy=True).reshape(-1, given.shape[-1])
    tokens = prepared.shape[1]
    if given.dtype is torch.bool or int(prepared.min()) < -1 or int(prepared.max()) >= tokens:
        raise OptionError(
            f"an alignment of {tokens} tokens must hold numbers from -1 to {tokens - 1}, places in the recorded prompt "
            f"or -1, got {given.dtype} from {int(prepared.min())} to {int(prepared.max())}"
        )
    return prepared


class AttentionKeeping:
    """Whether a recorded run keeps its attention maps.

    Attributes:
        wanted: whether calls from now on keep them.
        calls: how many did.
        reasons: why graphs keep none.
    """

    def __init__(self, wanted: bool) -> None:
        self.asked = self.wanted = wanted
        self.calls = 0
        self.reasons: list[str] = []

    def refuse(self, graph: str, reasons: Iterable[str]) -> None:
        """A graph has no attention whose maps can be kept."""
        text = f"{graph}: {'; '.join(dict.fromkeys(reasons)) or 'no attention of positions to words'}"
        if text not in self.reasons:
            self.reasons.append(text)

    @property
    def failure(self) -> str | None:
        """Why nothing was kept although it was asked for; None where all is well."""
        if not self.asked or self.calls:
            return None
        reasons = ", ".join(self.reasons) or "no call was to keep them"
        return f"there is no cross-attention whose maps could be kept ({reasons})"


class Stabilising:
    """What dense calls of an edit take from the recording.

    Args:
        base: that is edited.

    Attributes:
        alignment: int64 ``[samples, tokens]``; None: they take nothing.
        calls: how many graph calls took something.
    """

    def __init__(self, base: Base) -> None:
        self.alignment: Tensor | None = None
        self.calls = 0
        self._base = base
        self._ended = False

    def align(self, alignment: Any) -> None:
        """Let dense calls from now on take the attention to shared words from the recording; None: none of it.

        Raises:
            OptionError: see ``prepare_alignment``.
            CallMismatchError: the base has no attention maps.
            FisEditError: the edit has ended.
        """
        if self._ended:
            raise FisEditError(f"the edit of base {self._base.name!r} has ended; give the alignment inside the context")
        prepared = None if alignment is None else prepare_alignment(alignment)
        if prepared is not None and not self._base.keeps_attention:
            name = self._base.name
            raise CallMismatchError(
                f"base {name!r} has no attention maps that an alignment could refer to",
                advice=f"record it with runtime.record({name!r}, attention_maps=True); an edit that is saved keeps "
                "those of its dense calls, where its base has them",
            )
        self.alignment = prepared

    def close(self) -> None:
        """Let go of the base when the context has ended."""
        self._base, self._ended = Base(self._base.name), True
