"""Stabilised dense steps of a session: what a recorded run keeps for them, and whether an edit may have them."""

from __future__ import annotations

from typing import Any, Protocol

from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines.families.schedulers import calls_for_steps, steps_for_calls
from fisedit_compile.pipelines.masks.settings import AutomaticMask

_INSTEAD = "find masks without stabilised=True"


class AttentionRecorder(Protocol):
    """The part of a runtime's recording that keeps attention maps."""

    @property
    def attention_failure(self) -> str | None:
        """Why nothing was kept; None where all is well."""

    def keep_attention_maps(self, keep: bool) -> None:
        """Whether further calls keep their maps."""


def dense_turns(settings: AutomaticMask, scheduler: Any, turns: int) -> int:
    """In how many of the turns of a pipeline's loop an edit runs densely to find its mask."""
    return calls_for_steps(scheduler, settings.scaled_steps(steps_for_calls(scheduler, turns)), turns)


class AttentionTurns:
    """The turns of a recorded run in which attention maps are kept: those in which edits will run densely.

    Args:
        settings: of the session.

    Attributes:
        wanted: whether maps are kept at all.
        kept: in how many turns they were.
    """

    def __init__(self, settings: AutomaticMask) -> None:
        self.wanted = settings.stabilised
        self.kept = 0
        self._settings = settings
        self._recorder: AttentionRecorder | None = None

    def follow(self, recorder: AttentionRecorder) -> None:
        """Tell which recording it is."""
        self._recorder = recorder if self.wanted else None

    def end_turn(self, pipe: Any, done: int, turns: int) -> None:
        """A turn of the pipeline's loop is done.

        Args:
            pipe: the pipeline.
            done: turns so far.
            turns: of the whole run.

        Raises:
            PipelineError: its network has no cross-attention whose maps could be kept.
        """
        if self._recorder is None:
            return
        if self._recorder.attention_failure is not None:
            raise PipelineError(
                f"the dense steps of edits of {type(pipe).__name__} cannot be stabilised: "
                f"{self._recorder.attention_failure}; {_INSTEAD}"
            )
        self.kept = done
        if done >= dense_turns(self._settings, pipe.scheduler, turns):
            self._recorder.keep_attention_maps(False)
            self._recorder = None


def check_kept(settings: AutomaticMask, scheduler: Any, turns: int, kept: int) -> None:
    """Refuse an edit whose dense steps cannot be stabilised, before anything is computed.

    Args:
        settings: how its mask is found.
        scheduler: of the pipeline.
        turns: of the pipeline's loop.
        kept: in how many of them the attention maps of the edited picture were kept.

    Raises:
        PipelineError: in fewer than the edit needs.
    """
    needed = dense_turns(settings, scheduler, turns)
    if kept < needed:
        what = f"were kept in the first {kept} calls only" if kept else "were not kept"
        raise PipelineError(
            f"AutomaticMask(stabilised=True) needs the attention maps of the first {needed} calls of the picture that "
            f"is edited, and these {what}: make the session with EditSession(pipe, automatic_mask=...) of this setting "
            f"and generate again (a picture that was edited with a given mask keeps none), or {_INSTEAD}"
        )
