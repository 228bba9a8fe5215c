"""Errors of the runtime in the words of a session's user, who has a pipeline and pictures, and no runtime."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from fisedit_compile.errors import (
    BudgetError,
    CallMismatchError,
    FisEditError,
    GradientError,
    OptionError,
    ScalarMismatchError,
    WeightsChangedError,
)
from fisedit_compile.executing.executable import PASS_A_TENSOR

_ADVICE: tuple[tuple[type[FisEditError], str], ...] = (
    (
        BudgetError,
        "give EditSession a greater budget, free older pictures with undo() or reset(), make the edit with keep=False, "
        "or store less with EditSession(pipe, storage=torch.float16)",
    ),
    (
        WeightsChangedError,
        "put the network's weights back as they were when the picture was generated, or call generate again",
    ),
    (
        ScalarMismatchError,
        "an edit gives the network the numbers of the generation, such as timesteps: put the scheduler and what else "
        "decides them back, or call generate again; an input that an edit may change is named by EditSession(pipe, "
        "content=[...])",
    ),
    (
        CallMismatchError,
        "the run was cancelled, or the pipeline or its network was changed since the picture was generated (also by an "
        "adapter, an attention processor or a callback): undo that, or call generate again",
    ),
    (GradientError, "an edit session makes pictures without gradients: detach the tensors that the pipeline was given"),
    (
        OptionError,
        "the pipeline gives its network something else than the tokens of a single picture; give height and width, or "
        "call the pipeline itself",
    ),
)
"""What a session's user can do, by the kind of error; the first that fits."""

_BASE = re.compile(r"\bbase '((?:generation|photo|edit)-\d+)'")


@contextmanager
def session_words() -> Iterator[None]:
    """Inside, errors that advise what only the user of a runtime can do leave with other advice. Those of the session
    itself have none to exchange."""
    try:
        yield
    except FisEditError as error:
        advice = next((text for kind, text in _ADVICE if isinstance(error, kind)), None)
        if error.advice and advice is not None:
            error.reword(in_session_words(error.fact), advice)
            error.__notes__ = [note for note in getattr(error, "__notes__", ()) if PASS_A_TENSOR not in note]
        raise


def in_session_words(fact: str) -> str:
    """What happened, about pictures in place of bases."""
    return _BASE.sub(r"the picture '\1'", fact)
