"""The edit session: generate a picture once, then pay only for what each edit changes."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.errors import PipelineError
from fisedit_compile.options import parse_options
from fisedit_compile.pipelines.arguments import CallArguments, keep_value
from fisedit_compile.pipelines.binding import PipelineBinding
from fisedit_compile.pipelines.decoding.autoencoder import AutoencoderCall, EncodeMemory
from fisedit_compile.pipelines.decoding.decoding import DecodeJob, SparseDecoder
from fisedit_compile.pipelines.families.latents import packed_resolutions
from fisedit_compile.pipelines.families.prompts import PromptLengths, check_prompt_tokens
from fisedit_compile.pipelines.families.schedulers import describe_scheduler, scheduler_difference, steps_for_calls
from fisedit_compile.pipelines.history import Entry, taking_turns
from fisedit_compile.pipelines.masks.masking import AutomaticMask, grow_mask, paste_outside, to_pixels
from fisedit_compile.pipelines.network_state import NetworkState
from fisedit_compile.pipelines.noise import Generators, NoiseSource
from fisedit_compile.pipelines.picture import Picture, as_pixels
from fisedit_compile.pipelines.random_numbers import RandomNumbers
from fisedit_compile.pipelines.report import Report, SeamError, finest_first, notes_on
from fisedit_compile.pipelines.safety import check_unflagged, flagged_note, unflagged, with_flagged
from fisedit_compile.pipelines.steps import EditFollower, StepFollower, Trajectory
from fisedit_compile.pipelines.timing import StageClock
from fisedit_compile.pipelines.wording import session_words
from fisedit_compile.runtime import Runtime
from fisedit_compile.runtime.masks import WHITE_THRESHOLD, MaskLike


class EditSession:
    """Generates a picture with a diffusers pipeline and edits it, computing only what changes.

    The pipeline is not modified: a session calls a twin of it, which shares its networks, and has the compiled one and
    a state and scheduler of its own.  Other threads may use the pipeline meanwhile; calls of one session take turns.
    Works with pipelines that have a U-Net or a transformer and ``callback_on_step_end`` (text-to-image,
    image-to-image and inpainting; Stable Diffusion 1.x, 2.x, XL and 3, Flux) and with any scheduler that steps each
    latent on its own (DDIM, PNDM, Euler, DPM-Solver++ multistep, Heun, flow matching by Euler).

    Args:
        pipe: the pipeline.
        storage: type in which recorded feature maps are stored, such as ``torch.float16``; None: as computed.
        budget: most bytes the recorded runs may take together: a number or a text such as ``"8GB"``; None: no limit.
        tier: where recordings are kept: ``"device"``, or ``"host"`` where a GPU has no room for them.
        norm: ``"exact"`` or ``"cached"`` group norm statistics, see the backend's options.
        lowering: ``"plain"`` or ``"inductor"``, see the backend's options.
        automatic_mask: how masks are found when none is given.
        decoder: how edits are decoded. ``"sparse"``: from the recorded decode; ``"region"``: densely in boxes around
            the mask; ``"dense"``; ``"auto"``: whatever is cheapest. Decodes are recorded while the budget has room for
            them, and dropped when the network's recordings need it; what cannot be done falls back to ``dense``.
        decoder_halo: by how many latent cells around the mask more is decoded, in every direction.
        prompt_tokens: room for tokens of prompts, in pipelines that do not pad these themselves (Qwen-Image); None: 32
            to 95 more than the generation's prompts have, within the pipeline's own limit.

    Raises:
        PipelineError: the pipeline has no network, autoencoder, scheduler or ``callback_on_step_end``.
        OptionError: a storage, budget, tier, norm, lowering or decoder that does not exist, a negative halo, or prompt
            tokens for a pipeline that pads its prompts.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        storage: torch.dtype | None = None,
        budget: int | str | None = None,
        tier: str = "device",
        norm: str = "exact",
        lowering: str = "plain",
        automatic_mask: AutomaticMask | None = None,
        decoder: str = "auto",
        decoder_halo: int = 1,
        prompt_tokens: int | None = None,
    ) -> None:
        self.pipe = pipe
        self.runtime = Runtime(storage=storage, budget=budget, tier=tier)
        self.automatic_mask = automatic_mask or AutomaticMask()
        options = {"norm": norm, "lowering": lowering}
        # Wrong options are told now, not in the middle of the first network call.
        parse_options(None, options)
        self._decoder = SparseDecoder(self.runtime.expendable(), options, decoder, decoder_halo)
        self._binding = PipelineBinding(pipe, self.runtime, options)
        self._arguments = CallArguments(pipe)
        check_prompt_tokens(pipe, prompt_tokens)
        self._prompt_tokens = prompt_tokens
        self._entries: list[Entry] = []
        self._named = 0
        self.turn = threading.RLock()

    @property
    def history(self) -> tuple[Picture, ...]:
        """The generated picture and every edit since, oldest first; the last one is what the next edit starts from."""
        return tuple(entry.picture for entry in self._entries)

    @session_words()
    @taking_turns
    def generate(
        self,
        prompt: str | list[str] | None = None,
        *,
        num_inference_steps: int | None = None,
        generator: Generators | None = None,
        **arguments: Any,
    ) -> Picture:
        """Generate a picture and record what edits of it need.  It starts a new history.

        Args:
            prompt: as for the pipeline.
            num_inference_steps: as for the pipeline; None: the pipeline's default.
            generator: source of the noise; None: PyTorch's global generator, as for the pipeline.
            **arguments: further arguments of the pipeline.  A ``callback_on_step_end`` of your own is called first
                after every network call, in edits as well, and what it returns is obeyed.  The pipeline that it is
                given is that of the run.

        Returns:
            The picture; it is what the pipeline itself returns for these arguments, within float tolerance.

        Raises:
            PipelineError: an argument that the pipeline does not know or a session cannot honour; noise that could
                not be repeated; or the run was cancelled.
            BudgetError: the recorded run would exceed the budget.  The previous picture counts until this one is done;
                call :meth:`reset` before to make room.
        """
        given = {"prompt": prompt, **arguments}
        if num_inference_steps is not None:
            given["num_inference_steps"] = num_inference_steps
        given = {name: keep_value(value) for name, value in given.items() if name != "prompt" or value is not None}
        self._arguments.check(given)
        noise, numbers = NoiseSource.of(generator), RandomNumbers()
        clock = StageClock(self._binding.device)
        prompts = PromptLengths(self._prompt_tokens)
        size = self._arguments.value(given, "height"), self._arguments.value(given, "width")
        resolutions = packed_resolutions(self.pipe, *size, self._arguments.control_sizes(given))
        trajectory = Trajectory(resolutions, prompts=prompts)
        made_size = self._arguments.made_size(given)
        follower = StepFollower(*self._arguments.user_callback(given), clock, trajectory, made_size, numbers)
        with ExitStack() as undo:
            name = self._new_name("generation")
            undo.callback(self._drop, name)
            autoencoder = AutoencoderCall(self._decoder, DecodeJob(name), EncodeMemory(), generation=True)
            with self.runtime.record(name):
                pixels, flagged = self._call(clock, follower, given, generator, autoencoder, numbers)
            clock.lap("decode")
            if autoencoder.outcome is not None:
                clock.set_up("decode", autoencoder.outcome.setup)
            seconds = clock.seconds()
            dense_seconds = seconds["total"] - seconds["setup"]
            picture = Picture(
                name=name,
                prompt=given.get("prompt"),
                pixels=pixels,
                latents=follower.trajectory.latents[-1],
                output=follower.trajectory.output,
                mask=None,
                pixel_mask=None,
                report=self._report(clock, seconds, None, {}, None, trajectory.compiled.notes, autoencoder),
                flagged=flagged,
                output_type=self._arguments.output_type(given),
            )
            scheduler = describe_scheduler(self.pipe.scheduler)
            entry = Entry(
                picture,
                follower.trajectory,
                given,
                noise,
                numbers,
                scheduler,
                NetworkState(self._binding.module),
                dense_seconds,
                autoencoder.job.made,
                autoencoder.encodes,
            )
            undo.pop_all()
        self.reset()
        self._entries.append(entry)
        return picture

    @session_words()
    @taking_turns
    def edit(
        self,
        prompt: str | list[str] | None = None,
        *,
        mask: MaskLike | None = None,
        white_threshold: float = WHITE_THRESHOLD,
        automatic_mask: AutomaticMask | None = None,
        keep: bool = True,
        **changes: Any,
    ) -> Picture:
        """Edit the last picture of the history: same noise, new prompt, and only the masked region is computed.

        Without a mask the first steps run densely to find it (see :class:`AutomaticMask`); with one all steps are
        sparse.  Outside the mask, latents are those of the edited picture from then on, and pixels are bit-identical.

        Args:
            prompt: the new prompt; None keeps the old one (for an edit that only changes other arguments).
            mask: white where the picture may change: a picture (PIL, or the path of one), numpy or torch, ``[H, W]`` or
                ``[B, H, W]``, any resolution of the picture's aspect ratio; docs/pipelines.md has all forms.
            white_threshold: the share of the mask's scale that white reaches; above 0, up to 1.
            automatic_mask: how to find the mask this time; None: as the session was told.
            keep: add the edit to the history, so that it can itself be edited.  An edit that is not kept is faster and
                takes no memory.
            **changes: pipeline arguments to change: negative prompt, guidance scale (on the same side of 1),
                embeddings, callbacks, output type.

        Returns:
            The edited picture.  One that the pipeline's safety checker blackened is not kept, and the report says so.

        Raises:
            PipelineError: nothing was generated yet, the safety checker blackened the last picture, a change would
                break the correspondence with the recorded run, or the run was cancelled.
            MaskError: the mask cannot be used, or was given together with ``automatic_mask``; or only a threshold was.
            OptionError: ``white_threshold`` is not above 0 and up to 1.
            WeightsChangedError: the network's weights are not those of the recorded run.
            BudgetError: keeping the edit would exceed the budget; drop older pictures or use ``keep=False``.
        """
        if not self._entries:
            raise PipelineError("there is no picture to edit yet; call generate first")
        entry = self._entries[-1]
        check_unflagged(entry.picture)
        self._check_pipeline(entry)
        if prompt is not None:
            changes = {**changes, "prompt": prompt}
        changes = {name: keep_value(value) for name, value in changes.items()}
        given = self._arguments.merge(entry.arguments, changes)
        clock = StageClock(self._binding.device)
        latent_mask = entry.trajectory.cells.given_mask(
            mask, entry.trajectory.latents[-1], white_threshold, automatic_mask
        )
        numbers = RandomNumbers(entry.numbers)
        follower = EditFollower(
            *self._arguments.user_callback(given),
            clock,
            recorded=entry.trajectory,
            mask=latent_mask,
            settings=automatic_mask or self.automatic_mask,
            numbers=numbers,
        )
        with ExitStack() as undo:
            name = self._new_name("edit")
            job = DecodeJob(name, keep, entry.decode, lambda: follower.mask, entry.picture.pixels)
            autoencoder = AutoencoderCall(self._decoder, job, entry.encodes, generation=False)
            undo.callback(self._drop, name)
            early_mask = latent_mask if follower.sparse_from_start else None
            with self.runtime.edit(entry.picture.name, mask=early_mask, save_as=name if keep else None) as run:
                follower.run = run
                pixels, flagged = self._call(clock, follower, given, entry.noise.generators(), autoencoder, numbers)
            picture = self._finish(name, entry, given, follower, clock, pixels, flagged, autoencoder)
            keep = keep and not any(flagged or ())
            if keep:
                undo.pop_all()
        if keep:
            made = replace(entry, picture=picture, trajectory=follower.trajectory, arguments=given, decode=job.made)
            self._entries.append(made)
        return picture

    @taking_turns
    def undo(self) -> Picture:
        """Drop the last edit and its recorded run; the picture before it is returned and is the current one again.

        Raises:
            PipelineError: there is no edit to undo.
        """
        if len(self._entries) < 2:
            raise PipelineError("there is no edit to undo; the history holds no edit that was kept")
        self._drop(self._entries.pop().picture.name)
        return self._entries[-1].picture

    @taking_turns
    def reset(self) -> None:
        """Forget the whole history and free its recorded runs."""
        while self._entries:
            self._drop(self._entries.pop().picture.name)

    def _drop(self, name: str) -> None:
        """Free the recorded runs of a picture, as far as there are any."""
        for runtime in (self.runtime, self._decoder.runtime):
            if name in runtime.bases:
                runtime.drop(name)

    def _new_name(self, kind: str) -> str:
        self._named += 1
        return f"{kind}-{self._named}"

    def _check_pipeline(self, entry: Entry) -> None:
        """Refuse a pipeline whose parts were exchanged since the recorded run."""
        entry.network.check(self._binding.module)
        difference = scheduler_difference(entry.scheduler, describe_scheduler(self.pipe.scheduler))
        if difference is not None:
            raise PipelineError(f"{difference}; put the scheduler back, or call generate with the new one first")

    def _call(
        self,
        clock: StageClock,
        follower: StepFollower,
        given: Mapping[str, Any],
        generator: Generators,
        autoencoder: AutoencoderCall,
        numbers: RandomNumbers,
    ) -> tuple[Tensor | None, tuple[bool, ...] | None]:
        """Call the pipeline; the pixels ``[B, 3, height, width]`` (None: latents wanted), and what was flagged."""
        asked = self._arguments.asked_type(given)
        ours = {
            "output_type": asked,
            "callback_on_step_end": follower,
            "callback_on_step_end_tensor_inputs": follower.tensor_names,
            "generator": generator,
        }
        arguments = {**given, **{name: value for name, value in ours.items() if self._arguments.accepts(name)}}
        arguments = follower.with_own_callback(arguments)
        with self._binding.calling(clock, autoencoder, follower, numbers) as pipe:
            output = pipe(**arguments)
        flagged, images = (getattr(output, name, None) for name in ("nsfw_content_detected", "images"))
        if asked == "latent":
            follower.take_output(self.pipe, images)
        pixels = None if asked == "latent" else as_pixels(images)
        return pixels, None if flagged is None else tuple(bool(one) for one in flagged)

    def _finish(
        self,
        name: str,
        entry: Entry,
        given: Mapping[str, Any],
        follower: EditFollower,
        clock: StageClock,
        pixels: Tensor | None,
        flagged: tuple[bool, ...] | None,
        autoencoder: AutoencoderCall,
    ) -> Picture:
        """Paste the pixels outside the mask and make the report of an edit."""
        mask = follower.mask
        if mask is None:
            raise PipelineError("the edit ended before its mask was found; did a callback interrupt it?")
        pixel_mask, seam = None, None
        notes = (*notes_on(mask, clock.calls("sparse")), *follower.trajectory.compiled.notes)
        base = entry.picture.pixels
        if pixels is not None and base is not None:
            pixel_mask = to_pixels(mask, *pixels.shape[-2:])
            halo = self._decoder.halo
            near = to_pixels(grow_mask(mask, max(1, halo)), *pixels.shape[-2:])
            pasted, errors = paste_outside(*unflagged((pixels, base, pixel_mask, near), flagged))
            pixels = with_flagged(pasted, pixels, flagged)
            decoded = autoencoder.outcome
            # Without a halo nothing was decoded outside the mask, so there is nothing to compare.
            compared = len(pasted) and (halo or decoded is None or decoded.mask is None)
            seam = SeamError(*errors) if compared else None
        if any(flagged or ()):
            notes = (*notes, flagged_note(flagged or ()))
        clock.lap("decode")
        density = finest_first(self.runtime.stats.density) if clock.calls("sparse") else {}
        return Picture(
            name=name,
            prompt=given.get("prompt"),
            pixels=pixels,
            latents=follower.trajectory.latents[-1],
            output=follower.trajectory.output,
            mask=mask,
            pixel_mask=pixel_mask,
            report=self._report(clock, clock.seconds(), entry.dense_seconds, density, seam, notes, autoencoder),
            flagged=flagged,
            output_type=self._arguments.output_type(given),
        )

    def _report(
        self,
        clock: StageClock,
        seconds: dict[str, float],
        dense_seconds: float | None,
        density: dict[str, float],
        seam: SeamError | None,
        notes: tuple[str, ...],
        autoencoder: AutoencoderCall,
    ) -> Report:
        calls = clock.calls("dense"), clock.calls("sparse")
        decoding = autoencoder.outcome
        recorded = autoencoder.job.made.base if autoencoder.job.made is not None else None
        return Report(
            seconds=seconds,
            scheduler_steps=steps_for_calls(self.pipe.scheduler, clock.turns()),
            dense_calls=calls[0],
            sparse_calls=calls[1],
            dense_seconds=dense_seconds,
            cache_bytes=self.runtime.stats.bytes_stored,
            density=density,
            decoder=None if decoding is None else decoding.how,
            decoder_reason="" if decoding is None else decoding.reason,
            decoder_density=None if decoding is None or decoding.mask is None else float(decoding.mask.float().mean()),
            decoder_bytes=0 if recorded is None else self._decoder.runtime.bytes_of(recorded),
            encodes_reused=autoencoder.encodes_reused,
            seam=seam,
            notes=notes,
        )
