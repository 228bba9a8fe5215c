"""One call of a pipeline by a session: what follows it, and the picture that it makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fisedit_compile.pipelines.alignment import check_words
from fisedit_compile.pipelines.arguments import CallArguments
from fisedit_compile.pipelines.binding import PipelineBinding
from fisedit_compile.pipelines.decoding.autoencoder import AutoencoderCall, EncodeMemory
from fisedit_compile.pipelines.decoding.decoding import DecodeJob, SparseDecoder
from fisedit_compile.pipelines.families import Family
from fisedit_compile.pipelines.families.prompts import PromptLengths
from fisedit_compile.pipelines.families.schedulers import describe_scheduler, steps_for_calls
from fisedit_compile.pipelines.history import Entry
from fisedit_compile.pipelines.masks.settings import AutomaticMask
from fisedit_compile.pipelines.network_calls import NetworkCalls
from fisedit_compile.pipelines.network_state import NetworkState
from fisedit_compile.pipelines.noise import Generators, NoiseSource
from fisedit_compile.pipelines.picture import Picture, as_pixels
from fisedit_compile.pipelines.probing.probes import Floor
from fisedit_compile.pipelines.random_numbers import RandomNumbers
from fisedit_compile.pipelines.report import MaskCost, Report, SeamError
from fisedit_compile.pipelines.safety import Flagged
from fisedit_compile.pipelines.stabilising import AttentionTurns
from fisedit_compile.pipelines.steps import StepFollower, Trajectory
from fisedit_compile.pipelines.timing import StageClock
from fisedit_compile.runtime import Runtime


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
        notes: sentences for the report.
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
        self.notes: tuple[str, ...] = ()
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
            self._prepare(pipe)
            output = pipe(**given)
        flagged, images = (getattr(output, name, None) for name in ("nsfw_content_detected", "images"))
        if asked == "latent":
            follower.take_output(self._tools.pipe, images)
        else:
            self.pixels = as_pixels(images)
        self.flagged = None if flagged is None else tuple(bool(one) for one in flagged)

    def _prepare(self, pipe: Any) -> None:
        """What is done to the twin of the pipeline before it is called."""

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
        finding: MaskCost | None = None,
        seam_left: SeamError | None = None,
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
            finding=finding,
            seam=seam,
            seam_left=seam_left,
            notes=(*self.notes, *self._steps.trajectory.compiled.notes),
        )


class Generation(Run):
    """A call that is recorded, with which a history begins.

    Args:
        tools, name, given, clock: as for :class:`Run`.
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
        room: int | None,
        settings: AutomaticMask,
    ) -> None:
        family, arguments, numbers = tools.family, tools.arguments, RandomNumbers()
        argument = None if family.packing is None else family.packing.argument
        calls = NetworkCalls(latents=family.latents, tokens=argument)
        trajectory = Trajectory(arguments.tokens(given), family.side, calls, PromptLengths(room))
        size = arguments.made_size(given)
        self.given = given
        follower = self._follow(*arguments.user_callback(given), clock, trajectory, size, numbers)
        check_words(tools.pipe, family, arguments, given, settings.stabilised)
        self.attention = follower.attention = AttentionTurns(settings)
        autoencoder = AutoencoderCall(tools.decoder, DecodeJob(name), EncodeMemory(), generation=True)
        super().__init__(tools, name, given, clock, follower, autoencoder, numbers)

    def _follow(self, callback: Callable[..., Any] | None, names: Sequence[str], *others: Any) -> StepFollower:
        """What follows the steps, of the arguments of :class:`StepFollower`."""
        return StepFollower(callback, names, *others)

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
            floor=Floor(self._steps.trajectory.memory),
        )
