"""Pictures that a pipeline's safety checker blackened: they are returned as they are, and nothing is made from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines.picture import Picture

Flagged = Sequence[bool] | None
"""For each picture of a batch, whether the safety checker blackened it; None: there was no checker."""


def check_unflagged(picture: Picture) -> None:
    """Refuse to edit a picture that was blackened: the black would be pasted around what is edited.

    Raises:
        PipelineError: the safety checker flagged it, or one of its batch.
    """
    if any(picture.flagged or ()):
        raise PipelineError(
            f"the safety checker flagged {_which(picture.flagged or ())} and made it black, which cannot be edited; "
            "generate again, with another prompt or other noise"
        )


def flagged_note(flagged: Sequence[bool]) -> str:
    """What the report of an edit says of flagged pictures."""
    return f"the safety checker flagged {_which(flagged)} and made it black, so the edit was not kept"


def unflagged(parts: Sequence[Tensor], flagged: Flagged) -> list[Tensor]:
    """The samples of tensors ``[B or 1, ...]`` that were not flagged; those of one sample are for all."""
    if not any(flagged or ()):
        return list(parts)
    chosen = ~torch.tensor(flagged)
    return [part if len(part) == 1 < len(chosen) else part[chosen.to(part.device)] for part in parts]


def with_flagged(unflagged: Tensor, pixels: Tensor, flagged: Flagged) -> Tensor:
    """All samples again: those that were not flagged, and the others of ``pixels``."""
    if not any(flagged or ()):
        return unflagged
    result = pixels.clone()
    result[~torch.tensor(flagged).to(pixels.device)] = unflagged
    return result


def _which(flagged: Sequence[bool]) -> str:
    if len(flagged) == 1:
        return "the picture"
    numbers = [str(number + 1) for number, flag in enumerate(flagged) if flag]
    return f"picture {' and '.join(numbers)} of {len(flagged)}"
