"""The edit session: generate a picture once, then pay only for what each edit changes."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from fisedit_compile.errors import MaskError, OptionError, PipelineError
from fisedit_compile.pipelines.arguments import CallArguments, keep_value
from fisedit_compile.pipelines.backend_options import BackendOptions
from fisedit_compile.pipelines.binding import PipelineBinding
from fisedit_compile.pipelines.decoding.decoding import SparseDecoder
from fisedit_compile.pipelines.editing import Edit, EditTask
from fisedit_compile.pipelines.families import family_of
from fisedit_compile.pipelines.families.prompts import check_prompt_tokens
from fisedit_compile.pipelines.families.schedulers import describe_scheduler, scheduler_difference
from fisedit_compile.pipelines.history import Entry, History, Turn, taking_turns
from fisedit_compile.pipelines.masks.blending import check_seam
from fisedit_compile.pipelines.masks.cells import check_aspect
from fisedit_compile.pipelines.masks.settings import AutomaticMask
from fisedit_compile.pipelines.noise import Generators, NoiseSource, check_generators
from fisedit_compile.pipelines.opening import Opening, check_opens, start_of
from fisedit_compile.pipelines.painting import strokes_of
from fisedit_compile.pipelines.photos import PhotoLike, read_photo
from fisedit_compile.pipelines.picture import Picture
from fisedit_compile.pipelines.probing.search import FoundMask, MaskSearch
from fisedit_compile.pipelines.runs import Generation, Tools
from fisedit_compile.pipelines.safety import check_unflagged
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
        packing: option of the backend, for the network and the decoder.
        convolution: the same.
        cuda_graphs: the same.
        disable_passes: the same.
        tokens: as the backend's option, for inputs of the network besides the latents, which the session knows.
        content: as the backend's option, for inputs besides those that the session knows (Flux' guidance).
        automatic_mask: how masks are found when none is given.
        decoder: how edits are decoded. ``"sparse"``: from the recorded decode; ``"region"``: densely in boxes around
            the mask; ``"dense"``; ``"auto"``: whatever is cheapest. Decodes are recorded while the budget has room for
            them, and dropped when the network's recordings need it; what cannot be done falls back to ``dense``.
        decoder_halo: by how many latent cells around the mask more is decoded, in every direction.
        prompt_tokens: room for tokens of prompts, in pipelines that do not pad these themselves (Qwen-Image); None: 32
            to 95 more than the generation's prompts have, within the pipeline's own limit.

    Raises:
        PipelineError: the pipeline has no network, autoencoder, scheduler or ``callback_on_step_end``.
        OptionError: an option that does not exist, or one with an invalid value.
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
        packing: bool | int | str = "auto",
        convolution: str = "auto",
        cuda_graphs: bool = True,
        tokens: Mapping[str, Any] | None = None,
        content: Sequence[str] = (),
        disable_passes: Sequence[str] | str = (),
        automatic_mask: AutomaticMask | None = None,
        decoder: str = "auto",
        decoder_halo: int = 1,
        prompt_tokens: int | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise _unknown_options(unknown)
        self.pipe = pipe
        self.runtime = Runtime(storage=storage, budget=budget, tier=tier)
        self.automatic_mask = automatic_mask or AutomaticMask()
        options = BackendOptions.of(
            norm=norm,
            lowering=lowering,
            packing=packing,
            convolution=convolution,
            cuda_graphs=cuda_graphs,
            tokens={} if tokens is None else tokens,
            content=content,
            disable_passes=disable_passes,
        )
        self._decoder = SparseDecoder(self.runtime.expendable(), options.of_decoder(), decoder, decoder_halo)
        family = family_of(pipe)
        options.check(family)
        binding = PipelineBinding(pipe, family, self.runtime, options)
        self._arguments = CallArguments(pipe, family)
        self._tools = Tools(pipe, family, self._arguments, binding, self._decoder, self.runtime)
        check_prompt_tokens(pipe, prompt_tokens, family.prompt_limit_of(pipe))
        self._prompt_tokens = prompt_tokens
        self._history = History(self.runtime, self._decoder.runtime)
        self.turn = Turn()

    @property
    def history(self) -> tuple[Picture, ...]:
        """The generated picture and every edit since, oldest first; the last one is what the next edit starts from."""
        return self._history.pictures

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
        given = self._arguments.of_generation(prompt, num_inference_steps, arguments)
        noise = NoiseSource.of(generator)
        clock = StageClock(self._tools.binding.device)
        name = self._history.new_name("generation")
        run = Generation(self._tools, name, given, clock, self._prompt_tokens, self.automatic_mask)
        return self._begin(run, generator, noise)

    @session_words()
    @taking_turns
    def open(
        self,
        photo: PhotoLike,
        prompt: str = "",
        *,
        num_inference_steps: int | None = None,
        generator: Generators | None = None,
        **arguments: Any,
    ) -> Picture:
        """Open a photo and record what edits of it need: as much as a generation of so many steps costs.  It starts a
        new history.  Text-to-image pipelines that take ``latents`` open photos.

        Args:
            photo: a picture (PIL, or the path of one), numpy ``[height, width, 3]`` or torch ``[3, height, width]``, of
                bytes or of floats from 0 to 1.  docs/photos.md has what is refused.
            prompt: what the photo shows; "" says nothing.
            num_inference_steps: as for the pipeline; None: the pipeline's default.
            generator: source of the noise; None: PyTorch's global generator.
            **arguments: further arguments of the pipeline, as for :meth:`generate`.  ``height`` and ``width`` are the
                size at which the model sees the photo; without them it is about what the pipeline usually makes.
                Latents that a callback of your own returns are not used: they are the photo's.

        Returns:
            The photo itself, at its own size.  Edits return it with what changed pasted into it; masks refer to it.

        Raises:
            PipelineError: the photo cannot be used, the pipeline or its scheduler cannot open photos, an argument that
                the pipeline does not know or a session cannot honour, or the run was cancelled.
            BudgetError: as for :meth:`generate`.
        """
        check_opens(self._tools, {"prompt": prompt, **arguments})
        opened = read_photo(photo).over_white()
        words = None if not prompt and arguments.get("prompt_embeds") is not None else prompt
        given = self._arguments.of_generation(words, num_inference_steps, arguments)
        check_generators(generator)
        clock = StageClock(self._tools.binding.device)
        start = start_of(self._tools, opened, given, generator)
        name, settings = self._history.new_name("photo"), self.automatic_mask
        run = Opening(self._tools, name, given, clock, self._prompt_tokens, settings, start)
        # The photo's noise was drawn: edits repeat what the generators draw from here on.
        return self._begin(run, generator, NoiseSource.of(generator))

    def _begin(self, run: Generation, generator: Generators | None, noise: NoiseSource) -> Picture:
        """Record a run with which a new history begins; the old one stays when it fails."""
        with ExitStack() as undo:
            undo.callback(self._history.drop, run.name)
            with self.runtime.record(run.name, attention_maps=run.attention.wanted) as recorder:
                run.attention.follow(recorder)
                run.call(generator)
            entry = run.entry(noise)
            undo.pop_all()
        self._history.begin(entry)
        return entry.picture

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
        seam: int | None = None,
        strokes: PhotoLike | None = None,
        strength: float | None = None,
        **changes: Any,
    ) -> Picture:
        """Edit the last picture of the history: same noise, new prompt, and only the masked region is computed.

        Without a mask it is found, by a few calls of the network or in the first steps (see :class:`AutomaticMask`).
        Outside the mask, latents are those of the edited picture, and pixels are bit-identical.

        Args:
            prompt: the new prompt; None keeps the old one (for an edit that only changes other arguments).
            mask: white where the picture may change: a picture (PIL, or the path of one), numpy or torch, ``[H, W]`` or
                ``[B, H, W]``, any resolution of the picture's aspect ratio; docs/pipelines.md has all forms.
            white_threshold: the share of the mask's scale that white reaches; above 0, up to 1.
            automatic_mask: how to find the mask this time; None: as the session was told.
            keep: add the edit to the history, so that it can itself be edited.  An edit that is not kept is faster and
                takes no memory.
            seam: over how many pixels of the picture the edit is mixed with the one before, inside the mask's edge; 0:
                not at all; None: not at all, and in photos over as many as docs/photos.md says.
            strokes: the picture with strokes painted over it, or the strokes on a transparent layer of its size: the
                edit starts from them inside the mask, which by default is where the two differ.
            strength: with strokes, above 0 and below 1: the share of the steps that run after them; None: half.
                Without strokes it is the pipeline's own argument, as in the generation.
            **changes: pipeline arguments to change: negative prompt, guidance scale (on the same side of 1),
                embeddings, callbacks, output type.

        Returns:
            The edited picture.  One that the pipeline's safety checker blackened is not kept, and the report says so.

        Raises:
            PipelineError: nothing was generated yet, the safety checker blackened the last picture, a change would
                break the correspondence with the recorded run, or the run was cancelled.
            MaskError: the mask cannot be used, or was given together with ``automatic_mask``; or only a threshold was;
                or the strokes are no picture of the last one's size that differs from it.
            OptionError: ``white_threshold``, ``seam`` or ``strength`` is out of its range.
            WeightsChangedError: the network's weights are not those of the recorded run.
            BudgetError: keeping the edit would exceed the budget; drop older pictures or use ``keep=False``.
        """
        check_seam(seam)
        changes = changes if strength is None or strokes is not None else {**changes, "strength": strength}
        base, given = self._edited(prompt, changes)
        clock = StageClock(self._tools.binding.device)
        cells, latents = base.trajectory.cells, base.trajectory.latents[-1]
        placing, region = base.placing, None
        size = None if placing is None else placing.picture
        if strokes is not None and automatic_mask is not None:
            raise MaskError("strokes tell where to edit, so automatic_mask finds nothing; leave it out")
        latent_mask = cells.given_mask(mask, latents, white_threshold, automatic_mask, size)
        if placing is not None and mask is not None and latent_mask is not None:
            region = placing.given_region(mask, white_threshold, latent_mask)
        painted = None if strokes is None else strokes_of(self._tools, base, strokes, strength, latent_mask)
        settings, finding = automatic_mask or self.automatic_mask, None
        if latent_mask is None and painted is None and settings.method == "probe":
            found = MaskSearch(self._tools, given, base, settings).find()
            latent_mask, finding = found.mask, found.cost
            clock.lap("mask")
            clock.move("mask", "text", found.text_seconds)
        task = EditTask(latent_mask, settings, keep, finding, region, seam, painted)
        run = Edit(self._tools, self._history.new_name("edit"), given, clock, base, task)
        with ExitStack() as undo:
            undo.callback(self._history.drop, run.name)
            name, early, saved = base.picture.name, run.early_mask, run.name if keep else None
            with self.runtime.edit(name, mask=early, save_as=saved, alignment=run.alignment) as receiver:
                run.follow(receiver)
                run.call(base.noise.generators())
            entry = run.entry()
            keep = keep and not any(entry.picture.flagged or ())
            if keep:
                undo.pop_all()
        if keep:
            self._history.add(entry)
        return entry.picture

    @session_words()
    @taking_turns
    def find_mask(
        self,
        prompt: str | list[str] | None = None,
        *,
        automatic_mask: AutomaticMask | None = None,
        **changes: Any,
    ) -> FoundMask:
        """Find where an edit would change the last picture of the history, without editing it.

        Args:
            prompt: as for :meth:`edit`.
            automatic_mask: how to find the mask; None: as the session was told.
            **changes: as for :meth:`edit`.

        Returns:
            The mask, which :meth:`edit` takes, the scores it was made of, and what it cost.

        Raises:
            PipelineError, MaskError, WeightsChangedError: as :meth:`edit` raises.
            OptionError: the settings ask for FISEdit's method, which finds masks during an edit.
        """
        settings = automatic_mask or self.automatic_mask
        if settings.method != "probe":
            raise OptionError(
                "find_mask needs AutomaticMask(method='probe'): with method='fisedit' a mask is found by the first "
                "steps of an edit, so there is none without editing"
            )
        base, given = self._edited(prompt, changes)
        return MaskSearch(self._tools, given, base, settings).find()

    def check_mask_size(self, rows: int, columns: int, /, **arguments: Any) -> None:
        """Refuse a mask of another shape than the picture will have, before that is generated.

        Args:
            rows: of the mask, in its pixels.
            columns: the same.
            **arguments: those that the picture will be generated with. Where they and the pipeline do not tell its
                size, nothing is checked until :meth:`edit`.

        Raises:
            MaskError: as :meth:`edit` raises for this mask.
        """
        cells = self._arguments.cells(arguments)
        if cells is not None:
            check_aspect((rows, columns), (cells.height, cells.width))

    @taking_turns
    def undo(self) -> Picture:
        """Drop the last edit and its recorded run; the picture before it is returned and is the current one again.

        Raises:
            PipelineError: there is no edit to undo.
        """
        self._history.undo()
        return self._history.last.picture

    @taking_turns
    def reset(self) -> None:
        """Forget the whole history and free its recorded runs."""
        self._history.reset()

    def _edited(self, prompt: str | list[str] | None, changes: dict[str, Any]) -> tuple[Entry, dict[str, Any]]:
        """The last entry of the history, and the arguments of an edit of it.

        Raises:
            PipelineError: there is none to edit, or a change would break the correspondence with its recorded run.
        """
        base = self._editable()
        changes = changes if prompt is None else {**changes, "prompt": prompt}
        kept = {name: keep_value(value) for name, value in changes.items()}
        return base, self._arguments.merge(base.arguments, kept)

    def _editable(self) -> Entry:
        """The last entry of the history.

        Raises:
            PipelineError: there is none, its picture was blackened, or parts of the pipeline were exchanged since.
        """
        entry = self._history.last
        check_unflagged(entry.picture)
        entry.network.check(self._tools.binding.module)
        difference = scheduler_difference(entry.scheduler, describe_scheduler(self.pipe.scheduler))
        if difference is not None:
            raise PipelineError(f"{difference}; put the scheduler back, or call generate with the new one first")
        return entry


def _unknown_options(names: Iterable[str]) -> OptionError:
    """The error for options that a session does not have."""
    known = [
        name
        for name, parameter in inspect.signature(EditSession).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    own = "; a session has a runtime of its own (session.runtime)" if "runtime" in names else ""
    return OptionError(f"EditSession has no option {', '.join(names)}; it takes {', '.join(known)}{own}")
