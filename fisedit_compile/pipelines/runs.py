"""One call of a pipeline by a session: what follows it, and the picture that it makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines.alignment import Prompts, check_words
from fisedit_compile.pipelines.arguments import CallArguments
from fisedit_compile.pipelines.binding import PipelineBinding
from fisedit_compile.pipelines.decoding.autoencoder import AutoencoderCall, EncodeMemory
from fisedit_compile.pipelines.decoding.decoding import DecodeJob, SparseDecoder
from fisedit_compile.pipelines.families import Family
from fisedit_compile.pipelines.families.prompts import PromptLengths
from fisedit_compile.pipelines.families.schedulers import describe_scheduler, steps_for_calls
from fisedit_compile.pipelines.history import Entry
from fisedit_compile.pipelines.masks.finding import AutomaticMask
from fisedit_compile.pipelines.masks.pasting import paste_picture
from fisedit_compile.pipelines.network_calls import NetworkCalls
from fisedit_compile.pipelines.network_state import NetworkState
from fisedit_compile.pipelines.noise import Generators, NoiseSource
from fisedit_compile.pipelines.picture import Picture, as_pixels
from fisedit_compile.pipelines.random_numbers import RandomNumbers
from fisedit_compile.pipelines.report import Report, SeamError, finest_first, notes_on
from fisedit_compile.pipelines.safety import Flagged, flagged_note
from fisedit_compile.pipelines.stabilising import AttentionTurns, check_kept
from fisedit_compile.pipelines.steps import EditFollower, StepFollower, Trajectory
from fisedit_compile.pipelines.timing import StageClock
from fisedit_compile.runtime import Domain, EditRun, Runtime


@dataclass(frozen=True)
class Tools:
    """What all runs of a session work with.

    Attributes:
        pipe: the user's pipeline.
        family: of the pipeline.
        arguments: of its calls.
        binding: its compiled network.
        decoder: how pictures are decoded.
        runtime: of the session.
    """

    pipe: Any
    family: Family
    arguments: CallArguments
    binding: PipelineBinding
    decoder: SparseDecoder
    runtime: Runtime


class Run:
    """One call of the pipeline.

    Args:
        tools: of the session.
        name: of the picture that is made.
        given: arguments of the call.
        clock: started; counts the seconds by stage.
        follower: of the steps.
        autoencoder: of the call.
        numbers: that are drawn at random.

    Attributes:
        pixels: what was made, ``[B, 3, height, width]``; None: latents were wanted.
        flagged: what the safety checker blackened.
    """

    def __init__(
        self,
        tools: Tools,
        name: str,
        given: dict[str, Any],
        clock: StageClock,
        follower: StepFollower,
        autoencoder: AutoencoderCall,
        numbers: RandomNumbers,
    ) -> None:
        self.name, self.given = name, given
        self.pixels: Tensor | None = None
        self.flagged: Flagged = None
        self._tools, self._clock, self._numbers = tools, clock, numbers
        self._steps, self._autoencoder = follower, autoencoder

    def call(self, generator: Generators) -> None:
        """Call the pipeline, in the runtime's context.

        Raises:
            PipelineError: the pipeline returned no single pictures, or the run was cancelled.
        """
        arguments, follower = self._tools.arguments, self._steps
        asked = arguments.asked_type(self.given)
        ours = {
            "output_type": asked,
            "callback_on_step_end": follower,
            "callback_on_step_end_tensor_inputs": follower.tensor_names,
            "generator": generator,
        }
        given = {**self.given, **{name: value for name, value in ours.items() if arguments.accepts(name)}}
        given = follower.with_own_callback(given)
        with self._tools.binding.calling(self._clock, self._autoencoder, follower, self._numbers) as pipe:
            output = pipe(**given)
        flagged, images = (getattr(output, name, None) for name in ("nsfw_content_detected", "images"))
        if asked == "latent":
            follower.take_output(self._tools.pipe, images)
        else:
            self.pixels = as_pixels(images)
        self.flagged = None if flagged is None else tuple(bool(one) for one in flagged)

    def _picture(self, mask: Tensor | None, pixel_mask: Tensor | None, report: Report) -> Picture:
        return Picture(
            name=self.name,
            prompt=self.given.get("prompt"),
            pixels=self.pixels,
            latents=self._steps.trajectory.latents[-1],
            output=self._steps.trajectory.output,
            mask=mask,
            pixel_mask=pixel_mask,
            report=report,
            flagged=None if self.flagged is None else tuple(self.flagged),
            output_type=self._tools.arguments.output_type(self.given),
        )

    def _report(
        self,
        seconds: Mapping[str, float],
        dense_seconds: float | None = None,
        density: Mapping[str, float] | None = None,
        seam: SeamError | None = None,
        notes: tuple[str, ...] = (),
    ) -> Report:
        clock, decoder, autoencoder = self._clock, self._tools.decoder, self._autoencoder
        decoding = autoencoder.outcome
        recorded = autoencoder.job.made.base if autoencoder.job.made is not None else None
        return Report(
            seconds=seconds,
            scheduler_steps=steps_for_calls(self._tools.pipe.scheduler, clock.turns()),
            dense_calls=clock.calls("dense"),
            sparse_calls=clock.calls("sparse"),
            dense_seconds=dense_seconds,
            cache_bytes=self._tools.runtime.stats.bytes_stored,
            density=density or {},
            decoder=None if decoding is None else decoding.how,
            decoder_reason="" if decoding is None else decoding.reason,
            decoder_density=None if decoding is None or decoding.mask is None else float(decoding.mask.float().mean()),
            decoder_bytes=0 if recorded is None else decoder.runtime.bytes_of(recorded),
            encodes_reused=autoencoder.encodes_reused,
            seam=seam,
            notes=(*notes, *self._steps.trajectory.compiled.notes),
        )


class Generation(Run):
    """A call that is recorded, with which a history begins.

    Args:
        tools, name, given, clock: as for :class:`Run`.
        tokens: resolutions that the tokens may have to which latents are packed; none: they are maps.
        room: for tokens of prompts, where the session pads them; None: some more than there are.
        settings: how masks of edits are found.

    Raises:
        PipelineError: what these need cannot be kept.
    """

    def __init__(
        self,
        tools: Tools,
        name: str,
        given: dict[str, Any],
        clock: StageClock,
        tokens: tuple[Domain, ...],
        room: int | None,
        settings: AutomaticMask,
    ) -> None:
        family, arguments, numbers = tools.family, tools.arguments, RandomNumbers()
        argument = None if family.packing is None else family.packing.argument
        calls = NetworkCalls(latents=family.latents, tokens=argument)
        trajectory = Trajectory(tokens, family.side, calls, PromptLengths(room))
        size = arguments.made_size(given)
        follower = StepFollower(*arguments.user_callback(given), clock, trajectory, size, numbers)
        check_words(tools.pipe, family, arguments, given, settings.stabilised)
        self.attention = follower.attention = AttentionTurns(settings)
        autoencoder = AutoencoderCall(tools.decoder, DecodeJob(name), EncodeMemory(), generation=True)
        super().__init__(tools, name, given, clock, follower, autoencoder, numbers)

    def entry(self, noise: NoiseSource) -> Entry:
        """The picture, and what edits of it need.

        Args:
            noise: of the generators at the start.
        """
        outcome = self._autoencoder.outcome
        self._clock.lap("decode")
        if outcome is not None:
            self._clock.set_up("decode", outcome.setup)
        seconds = self._clock.seconds()
        return Entry(
            picture=self._picture(None, None, self._report(seconds)),
            trajectory=self._steps.trajectory,
            arguments=self.given,
            noise=noise,
            numbers=self._numbers,
            scheduler=describe_scheduler(self._tools.pipe.scheduler),
            network=NetworkState(self._tools.binding.module),
            dense_seconds=seconds["total"] - seconds["setup"],
            decode=self._autoencoder.job.made,
            encodes=self._autoencoder.encodes,
        )


class Edit(Run):
    """A call that computes only what the mask covers, from when on it is known.

    Args:
        tools, name, given, clock: as for :class:`Run`.
        base: of the picture that is edited.
        mask: bool ``[B or 1, height, width]`` at the latents' resolution; None: to be found.
        settings: how to find it.
        keep: whether later edits may start from the picture.

    Attributes:
        alignment: of the dense steps' prompts to the recorded ones; None: they take nothing from the recording.

    Raises:
        PipelineError: the dense steps are to be stabilised, and the recorded run, or its words, do not allow it.
    """

    def __init__(
        self,
        tools: Tools,
        name: str,
        given: dict[str, Any],
        clock: StageClock,
        base: Entry,
        mask: Tensor | None,
        settings: AutomaticMask,
        keep: bool,
    ) -> None:
        numbers = RandomNumbers(base.numbers)
        follower = EditFollower(
            *tools.arguments.user_callback(given),
            clock,
            recorded=base.trajectory,
            mask=mask,
            settings=settings,
            numbers=numbers,
        )
        job = DecodeJob(name, keep, base.decode, lambda: follower.mask, base.picture.pixels)
        autoencoder = AutoencoderCall(tools.decoder, job, base.encodes, generation=False)
        super().__init__(tools, name, given, clock, follower, autoencoder, numbers)
        self._base, self._follower = base, follower
        self._run: EditRun | None = None
        self.alignment: Tensor | None = None
        if mask is None and settings.stabilised:
            recorded = base.trajectory
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
        base, decoder, outcome = self._base.picture.pixels, self._tools.decoder, self._autoencoder.outcome
        pixel_mask, seam = None, None
        if self.pixels is not None and base is not None:
            everything = outcome is None or outcome.mask is None
            pasted = paste_picture(self.pixels, base, mask, decoder.halo, everything, self.flagged)
            self.pixels, pixel_mask, seam = pasted.pixels, pasted.mask, pasted.seam
        notes = notes_on(mask, clock.calls("sparse"))
        clock.lap("decode")
        density = finest_first(self._tools.runtime.stats.density) if clock.calls("sparse") else {}
        report = self._report(clock.seconds(), self._base.dense_seconds, density, seam, notes)
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
        )

    def _keep_attention(self, mask: Tensor) -> None:
        """Note in how many turns the edit has attention maps: in dense ones those of its own, if its base has them; in
        sparse ones none, unless nothing changed."""
        own, recorded = self._follower.trajectory, self._base.trajectory
        dense = len(own.latents) if not bool(mask.any()) else self._follower.dense_turns
        own.attention_turns = min(recorded.attention_turns, dense)
