"""An edit: a call of the pipeline that computes only what its mask covers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines.alignment import Prompts
from fisedit_compile.pipelines.decoding.autoencoder import AutoencoderCall
from fisedit_compile.pipelines.decoding.decoding import DecodeJob
from fisedit_compile.pipelines.history import Entry
from fisedit_compile.pipelines.masks.cells import to_pixels
from fisedit_compile.pipelines.masks.pasting import Pasted, paste_picture, paste_pixels
from fisedit_compile.pipelines.masks.settings import AutomaticMask
from fisedit_compile.pipelines.random_numbers import RandomNumbers
from fisedit_compile.pipelines.report import MaskCost, finest_first, notes_on
from fisedit_compile.pipelines.runs import Run, Tools
from fisedit_compile.pipelines.safety import flagged_note
from fisedit_compile.pipelines.stabilising import check_kept
from fisedit_compile.pipelines.steps import EditFollower
from fisedit_compile.pipelines.strokes import StrokeFollower, Strokes
from fisedit_compile.pipelines.timing import StageClock
from fisedit_compile.runtime import EditRun

PHOTO_SEAM = 2
"""Pixels, at the size at which the model sees a photo, over which edits are mixed with it; docs/photos.md has what
other widths give."""


@dataclass(frozen=True)
class EditTask:
    """What an edit is asked for besides the pipeline's arguments.

    Attributes:
        mask: bool ``[B or 1, height, width]`` at the latents' resolution; None: to be found, or that of the strokes.
        settings: how to find it in the first steps.
        keep: whether later edits may start from the picture.
        finding: what a mask that was found before has cost.
        region: bool ``[B or 1, height, width]``, the pixels of the picture that may differ; None: those of the mask's
            cells.
        seam: over how many pixels the edit is mixed with the picture before, inside; None: see :func:`default_seam`.
        strokes: that the edit starts from inside the mask; None: from the noise.
    """

    mask: Tensor | None
    settings: AutomaticMask
    keep: bool = True
    finding: MaskCost | None = None
    region: Tensor | None = None
    seam: int | None = None
    strokes: Strokes | None = None


class Edit(Run):
    """A call that computes only what the mask covers, from when on it is known.

    Args:
        tools, name, given, clock: as for :class:`Run`.
        base: of the picture that is edited.
        task: what is asked for.

    Attributes:
        alignment: of the dense steps' prompts to the recorded ones; None: they take nothing from the recording.

    Raises:
        PipelineError: the dense steps are to be stabilised, and the recorded run, or its words, do not allow it.
    """

    def __init__(
        self, tools: Tools, name: str, given: dict[str, Any], clock: StageClock, base: Entry, task: EditTask
    ) -> None:
        numbers = RandomNumbers(base.numbers)
        callback, names = tools.arguments.user_callback(given)
        recorded, settings = base.trajectory, task.settings
        follower: EditFollower
        if task.strokes is not None:
            follower = StrokeFollower(callback, names, clock, recorded, task.strokes, settings, numbers)
        else:
            pixels = recorded.cells.pixels_per_position(tools.pipe, base.decoded)
            follower = EditFollower(callback, names, clock, recorded, task.mask, settings, numbers, pixels)
        job = DecodeJob(name, task.keep, base.decode, lambda: follower.mask, base.decoded)
        autoencoder = AutoencoderCall(tools.decoder, job, base.encodes, generation=False)
        super().__init__(tools, name, given, clock, follower, autoencoder, numbers)
        self._base, self._follower, self._task = base, follower, task
        self._run: EditRun | None = None
        self.alignment: Tensor | None = None
        if task.mask is None and task.strokes is None and settings.stabilised:
            check_kept(settings, tools.pipe.scheduler, len(recorded.latents), recorded.attention_turns)
            prompts = Prompts(tools.pipe, tools.family, tools.arguments, base.arguments)
            self.alignment = prompts.align(given, recorded.calls)

    @property
    def early_mask(self) -> Tensor | None:
        """The mask, where it is known before the first call and leaves something out."""
        return self._follower.mask if self._follower.sparse_from_start else None

    def follow(self, run: EditRun) -> None:
        """Tell which of the runtime's edits is to be given a mask that is found."""
        self._follower.run = self._run = run

    def entry(self) -> Entry:
        """The picture, with what lies outside the mask from the one before, and what edits of it need.

        Raises:
            PipelineError: the mask was not found.
        """
        mask, clock = self._follower.mask, self._clock
        if mask is None:
            raise PipelineError("the edit ended before its mask was found; did a callback interrupt it?")
        photo, pixel_mask, seam, seam_left = self._base.photo, None, None, None
        if self.pixels is not None:
            if photo is not None:
                cells = to_pixels(mask, *photo.placing.model)
                photo = replace(photo, decoded=paste_pixels(self.pixels, photo.decoded, cells)[0])
            pasted = self._paste(self.pixels, mask)
            self.pixels, pixel_mask, seam, seam_left = pasted.pixels, pasted.mask, pasted.seam, pasted.seam_left
        finding = self._task.finding or self._follower.finding
        self.notes = notes_on(mask, clock.calls("sparse"), finding)
        clock.lap("decode")
        density = finest_first(self._tools.runtime.stats.density) if clock.calls("sparse") else {}
        report = self._report(clock.seconds(), self._base.dense_seconds, density, seam, finding, seam_left)
        report = replace(report, stabilised_calls=0 if self._run is None else self._run.stabilised_calls)
        if self.flagged is not None and any(self.flagged):
            report = replace(report, notes=(*report.notes, flagged_note(self.flagged)))
        self._keep_attention(mask)
        return replace(
            self._base,
            picture=self._picture(mask, pixel_mask, report),
            trajectory=self._follower.trajectory,
            arguments=self.given,
            decode=self._autoencoder.job.made,
            photo=photo,
        )

    def _keep_attention(self, mask: Tensor) -> None:
        """Note in how many turns the edit has attention maps: in dense ones those of its own, if its base has them; in
        sparse ones none, unless nothing changed."""
        own, recorded = self._follower.trajectory, self._base.trajectory
        dense = len(own.latents) if not bool(mask.any()) else self._follower.dense_turns
        own.attention_turns = min(recorded.attention_turns, dense)

    def _paste(self, pixels: Tensor, mask: Tensor) -> Pasted:
        """The edit within the picture before, at that one's size."""
        base, outcome = self._base, self._autoencoder.outcome
        if base.picture.pixels is None:
            raise PipelineError("the picture before has no pixels to be pasted; call generate again")
        return paste_picture(
            pixels,
            base.picture.pixels,
            mask,
            self._tools.decoder.halo,
            # What was not decoded anew outside of a photo's mask was decoded when it was opened, and no part of it.
            decoded_outside=outcome is None or outcome.mask is None or base.photo is not None,
            flagged=self.flagged,
            placing=base.placing,
            region=self._task.region,
            seam=default_seam(base) if self._task.seam is None else self._task.seam,
        )


def default_seam(base: Entry) -> int:
    """Over how many pixels edits of a picture are mixed with it: none where the model made it, which then decodes to
    what it is; of a photo as many as :data:`PHOTO_SEAM` at the model's size."""
    placing = base.placing
    return 0 if placing is None else max(1, round(PHOTO_SEAM * placing.picture[0] / placing.model[0]))
