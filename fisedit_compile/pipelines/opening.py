"""A photo as the beginning of a history: recorded on the latents that the photo has at the noise of each call.

The pipeline runs as for a generation, so that guidance, packing and schedules are its own; behind each turn of its loop
the latents are replaced by the photo's with the noise of the next turn, and behind the last one by the photo's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines.families.encoding import Encoded
from fisedit_compile.pipelines.history import Entry, OpenedPhoto
from fisedit_compile.pipelines.levels import NoiseLevels, check_levels, like
from fisedit_compile.pipelines.masks.placing import Placing, fitted_size
from fisedit_compile.pipelines.masks.settings import AutomaticMask
from fisedit_compile.pipelines.noise import Generators, NoiseSource
from fisedit_compile.pipelines.photos import Photo, check_photo_size
from fisedit_compile.pipelines.runs import Generation, Tools
from fisedit_compile.pipelines.steps import StepFollower
from fisedit_compile.pipelines.timing import StageClock

ENCODING = ("strength", "mask_image", "image", "control_image")
"""Arguments of pipelines that encode pictures themselves."""

MOST_SQUEEZED = 1.25
"""By what factor the aspect ratio of a size that is asked for may differ from the photo's."""

DEFAULT_AREA = 1024**2
"""Pixels at most at which a photo is seen by a pipeline that does not tell what it usually makes."""

SAME = {torch.float32: 1e-3, torch.float64: 1e-3}
HALF = 3e-2
"""Greatest difference of latents that are the same, as a share of the greatest value; of types with fewer digits."""


@dataclass(frozen=True)
class PhotoStart:
    """A photo as a run begins with it.

    Attributes:
        photo: as it was given.
        placing: of the photo on what the model makes.
        encoded: its latents.
        noise: of the same shape, in float32.
    """

    photo: Photo
    placing: Placing
    encoded: Encoded
    noise: Tensor


class PhotoFollower(StepFollower):
    """The ``callback_on_step_end`` of a run on a photo.

    Args:
        start: the photo.
        latents: what the pipeline is given; filled when the scheduler knows its timesteps.
        others: arguments of :class:`StepFollower`.
    """

    def __init__(self, start: PhotoStart, latents: Tensor, *others: Any) -> None:
        super().__init__(*others)
        self._start, self._given = start, latents
        self._levels: NoiseLevels | None = None

    def follow_scheduler(self, scheduler: Any) -> None:
        """Learn the noise levels when the pipeline sets its timesteps."""

        def fill(levels: NoiseLevels) -> None:
            self._levels = levels
            self._given.copy_(self._before(levels, 0) / levels.initial_scale)

        NoiseLevels.follow(scheduler, fill)

    def _before(self, levels: NoiseLevels, call: int) -> Tensor:
        clean = self._start.encoded.latents
        return clean if call == levels.calls else levels.before(call, clean, self._start.noise)

    def after_call(self, pipe: Any, call: int, latents: Tensor) -> Tensor:
        """The photo's latents with the noise of the next turn.

        Raises:
            PipelineError: the pipeline did not begin with the latents that it was given, or has other timesteps.
        """
        levels = self._levels
        if levels is None or not torch.equal(levels.timesteps.cpu(), pipe.scheduler.timesteps.cpu()):
            raise PipelineError(
                f"{type(pipe).__name__} sets its timesteps in a way that a session cannot follow, so a photo cannot be "
                "opened with it; use the text-to-image pipeline of the same model"
            )
        if latents.shape != self._start.encoded.latents.shape:
            raise PipelineError(
                f"the photo's latents have shape {tuple(self._start.encoded.latents.shape)}, those of "
                f"{type(pipe).__name__} {tuple(latents.shape)}; describe the pipeline's family with an encode of its "
                "own (docs/adding-a-pipeline.md)"
            )
        if call == 0:
            self._check_begun(pipe, levels)
        return like(latents, self._before(levels, call + 1))

    def _check_begun(self, pipe: Any, levels: NoiseLevels) -> None:
        came = self.trajectory.calls.start
        expected = levels.network_input(self._before(levels, 0))
        if came is None or not _same(came[: len(expected)], expected):
            raise PipelineError(
                f"{type(pipe).__name__} does not begin with the latents that it is given, as text-to-image pipelines "
                "do, so a photo cannot be opened with it; use the text-to-image pipeline of the same model"
            )


class Opening(Generation):
    """A call on a photo, with which a history begins.

    Args:
        tools, name, given, clock, room, settings: as for :class:`Generation`.
        start: the photo.
    """

    def __init__(
        self,
        tools: Tools,
        name: str,
        given: Mapping[str, Any],
        clock: StageClock,
        room: int | None,
        settings: AutomaticMask,
        start: PhotoStart,
    ) -> None:
        dtype = next(tools.binding.module.parameters()).dtype
        self._photo = start
        latents = torch.zeros_like(start.encoded.latents, dtype=dtype)
        given = {**given, "latents": latents, "height": start.placing.model[0], "width": start.placing.model[1]}
        super().__init__(tools, name, given, clock, room, settings)
        resized = "{}x{} pixels".format(*start.placing.model)
        seen = (f"the model saw the photo at {resized} (height x width)",) if start.placing.resized else ()
        self.notes = (*start.photo.notes, *seen)

    def _follow(self, callback: Callable[..., Any] | None, names: Sequence[str], *others: Any) -> StepFollower:
        return PhotoFollower(self._photo, self.given["latents"], callback, names, *others)

    def entry(self, noise: NoiseSource) -> Entry:
        """The photo, and what edits of it need.

        Raises:
            PipelineError: the safety checker flagged it, or the pipeline decoded something else than its latents.
        """
        if any(self.flagged or ()):
            raise PipelineError(
                "the pipeline's safety checker flagged the photo, so edits of it would be black; open another one"
            )
        raw, decoded = self._photo.encoded.raw, self._autoencoder.decoded
        if self.pixels is None or decoded is None or raw is None or not _same(decoded, raw):
            raise PipelineError(
                f"{type(self._tools.pipe).__name__} gives its autoencoder other latents than the autoencoder made of "
                "the photo: they are normalised in a way that is not known; describe the pipeline's family with an "
                "encode of its own (docs/adding-a-pipeline.md)"
            )
        made = self.pixels
        self.pixels = self._photo.photo.pixels.to(made.device)
        opened = OpenedPhoto(self._photo.placing, made, self._photo.noise)
        return replace(super().entry(noise), photo=opened)


def _same(came: Tensor, expected: Tensor) -> bool:
    """Whether latents are the same but for rounding."""
    if came.shape != expected.shape:
        return False
    tolerance = max(SAME.get(one.dtype, HALF) for one in (came, expected))
    apart = (came.float() - expected.float().to(came.device)).abs().max()
    return float(apart) <= tolerance * float(expected.abs().max())


def start_of(tools: Tools, photo: Photo, given: Mapping[str, Any], generator: Generators) -> PhotoStart:
    """Place, encode and equip a photo with noise.

    Args:
        tools: of the session.
        photo: opaque.
        given: arguments of the call, checked; ``height`` and ``width`` may say at which size the model sees the photo.
        generator: of the noise; None: PyTorch's global one.

    Raises:
        PipelineError: the photo has no size of a photo, or none that fits what is asked for.
    """
    check_photo_size(photo)
    placing = Placing(photo.size, _model_size(tools, photo.size, given))
    device = tools.binding.device
    with torch.no_grad():
        encoded = tools.family.encode(tools.pipe, placing.to_model(photo.pixels).to(device))
    latents = Encoded(encoded.latents.float(), encoded.raw)
    noise = randn_tensor(latents.latents.shape, generator=generator, device=device, dtype=torch.float32)
    return PhotoStart(photo, placing, latents, noise)


def check_opens(tools: Tools, given: Mapping[str, Any]) -> None:
    """Refuse pipelines and arguments that do not go with a photo.

    Raises:
        PipelineError: saying what to use instead.
    """
    name, accepts = type(tools.pipe).__name__, tools.arguments.accepts
    own = [argument for argument in ENCODING if accepts(argument)]
    controlled = any(getattr(tools.pipe, part, None) is not None for part in ("controlnet", "adapter"))
    if own and not (controlled and own == ["image"]):
        raise PipelineError(
            f"{name} takes pictures and encodes them itself ({', '.join(own)}), so no photo can be opened with it; use "
            "the text-to-image pipeline of the same model, such as StableDiffusionPipeline(**pipe.components)"
        )
    if not accepts("latents"):
        raise PipelineError(f"{name} takes no latents, so no photo can be opened with it; use one that does")
    if not accepts("height") or not accepts("width"):
        raise PipelineError(f"{name} takes no height and width, so no photo can be opened with it; use one that does")
    check_levels(tools.pipe.scheduler)
    if given.get("latents") is not None:
        raise PipelineError("latents cannot be given with a photo, whose latents they would be; leave them out")
    if given.get("denoising_end") is not None:
        raise PipelineError("denoising_end cannot be given with a photo, which is recorded to its end; leave it out")
    if tools.arguments.output_type(given) == "latent":
        raise PipelineError('output_type="latent" cannot be given with a photo: pixels outside of masks are its own')
    prompt, embeddings = given.get("prompt"), given.get("prompt_embeds")
    counts = [len(prompt) if isinstance(prompt, list) else 1, given.get("num_images_per_prompt", 1)]
    if counts != [1, 1] or (embeddings is not None and len(embeddings) != 1):
        raise PipelineError("a photo is one picture; give one prompt and num_images_per_prompt=1")


def _model_size(tools: Tools, picture: tuple[int, int], given: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width at which the model sees a photo, in pixels."""
    grid = tools.family.grid(tools.pipe)
    if grid is None:
        raise PipelineError(
            f"{type(tools.pipe).__name__} has no vae_scale_factor, which says how many pixels a latent cell has; set it"
        )
    needed, wanted = grid
    asked = given.get("height"), given.get("width")
    if asked[0] is None and asked[1] is None:
        usual = tools.family.default_size(tools.pipe, tools.family.network_of(tools.pipe))
        area = min(DEFAULT_AREA, math.prod(picture)) if usual is None else math.prod(usual)
        return fitted_size(picture, area, wanted)
    if asked[0] is None or asked[1] is None:
        raise PipelineError("give both height and width, at which the model sees the photo, or neither")
    height, width = int(asked[0]), int(asked[1])
    shown = f"height {height} and width {width}"
    if height % needed or width % needed or min(height, width) < needed:
        raise PipelineError(f"the model makes pictures whose sides are multiples of {needed} pixels, got {shown}")
    squeezed = height * picture[1] / (width * picture[0])
    if not 1 / MOST_SQUEEZED <= squeezed <= MOST_SQUEEZED:
        raise PipelineError(
            f"the photo has {picture[0]}x{picture[1]} pixels (height x width), which {shown} would squeeze to another "
            "shape; give a size of its aspect ratio, or leave both out"
        )
    return height, width
