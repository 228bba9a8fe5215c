"""Measure whole edits, from the prompt to the picture: the dense pipeline against edit sessions, stage by stage.

Fewer steps are run than an edit has; what the calls of the U-Net took is scaled to all steps, every other stage is
taken as it was measured. Runs of the dense pipeline and of the session take turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from fisedit_compile.bench.masks import make_mask
from fisedit_compile.bench.pipelines import build_pipeline
from fisedit_compile.bench.timing import synchronise
from fisedit_compile.bench.unet import DTYPES, BenchmarkError, describe_machine
from fisedit_compile.errors import OptionError
from fisedit_compile.pipelines import EditSession, Picture
from fisedit_compile.pipelines.decoding.decoding import DECODERS
from fisedit_compile.pipelines.families.schedulers import SCHEDULER_NAMES
from fisedit_compile.pipelines.probing.search import FEW_STEPS, FoundMask

BASE_PROMPT = "a lake in the mountains"
EDIT_PROMPT = "a lake in the mountains with a sailing boat on it"
TINY = "tiny"
"""The decoder that is another autoencoder."""

STAGES = ("text", "prepare", "set-up", "mask", "dense steps", "sparse steps", "decode")
DENSE, USER, AUTOMATIC = "dense pipeline", "fisedit, user mask", "fisedit, automatic mask"


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        model: a name of ``fisedit_compile.bench.networks.MODEL_NAMES``.
        size: of the picture in pixels; None: the model's own.
        density: share of active cells of the mask, above 0 and at most 1, at the resolution of the latents.
        shape: of the mask: square, disc or ragged.
        steps: of a whole edit.
        timed_steps: how many are run.
        scheduler: see :func:`~fisedit_compile.bench.pipelines.build_pipeline`.
        dtype: fp32, bf16 or fp16.
        device: of the networks.
        norm: option of the backend.
        storage: dtype in which feature maps are recorded; None: as computed.
        tier: where they are kept, device or host.
        decoder: how edits are decoded, see ``EditSession``; or ``tiny``: by ``diffusers.AutoencoderTiny``, in the
            cheapest way.
        repeats: runs of each kind.
        seed: of weights, noise and mask.
    """

    model: str = "sd15"
    size: int | None = None
    density: float = 0.1
    shape: str = "square"
    steps: int = 50
    timed_steps: int = 5
    scheduler: str = "ddim"
    dtype: str = "fp32"
    device: str = "cpu"
    norm: str = "exact"
    storage: str | None = None
    tier: str = "device"
    decoder: str = "auto"
    repeats: int = 3
    seed: int = 0

    def check(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            OptionError: a dtype, scheduler or decoder is unknown, or the steps or repeats are impossible.
        """
        for dtype in (self.dtype, self.storage or self.dtype):
            if dtype not in DTYPES:
                raise OptionError(f"unknown dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
        known = {"scheduler": (self.scheduler, SCHEDULER_NAMES), "decoder": (self.decoder, (*DECODERS, TINY))}
        for name, (given, names) in known.items():
            if given not in names:
                raise OptionError(f"unknown {name} {given!r}; expected one of {', '.join(names)}")
        if not 2 <= self.timed_steps <= self.steps or self.repeats < 1:
            raise OptionError("expected at least two timed steps, no more of them than steps, and one repeat")


@dataclass
class Result:
    """Seconds by variant and stage, scaled to ``settings.steps``; medians of ``settings.repeats`` runs.

    Attributes:
        settings, machine: what was measured, and on what.
        seconds: by variant, then by stage and ``total``.
        dense_steps: that the probes of the automatic variant cost.
        active: share of the mask's active cells.
        decoder, decoder_reason: how edits were decoded, and why.
        generation: seconds of the recorded run as it was, without its set-up.
        generation_setup: seconds of tracing and compiling, once for each network and size.
        cache_bytes: recorded, for ``settings.timed_steps`` steps and one decode.
        decoder_bytes: of them, of the decode.
        seam: greatest difference in the cells around the mask before pasting, 0 to 1.
    """

    settings: Settings
    machine: dict[str, str]
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    dense_steps: float = 0.0
    active: float = 0.0
    decoder: str = ""
    decoder_reason: str = ""
    generation: float = 0.0
    generation_setup: float = 0.0
    cache_bytes: int = 0
    decoder_bytes: int = 0
    seam: float | None = None

    def speed_up(self, variant: str, stage: str = "total") -> float | None:
        """Seconds of the dense pipeline over those of a variant; None where either has none."""
        dense, own = self.seconds[DENSE].get(stage, 0.0), self.seconds[variant].get(stage, 0.0)
        return dense / own if dense and own else None

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionaries and numbers; the speed-ups of whole edits among them."""
        return asdict(self) | {"speed_up": {name: self.speed_up(name) for name in self.seconds}}


class _DenseRun:
    """Seconds by stage of one run of the plain pipeline."""

    def __init__(self, pipe: Any, device: torch.device) -> None:
        self._pipe, self._device = pipe, device
        self._marks: list[float] = []
        self._text = self._decode_began = 0.0

    def _now(self) -> float:
        synchronise(self._device)
        return time.perf_counter()

    def _step(self, pipe: Any, call: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self._marks.append(self._now())
        return tensors

    def seconds(self, prompt: str, arguments: Mapping[str, Any]) -> dict[str, float]:
        """Run once. The first step has no beginning that can be seen, so it counts as the median of the others."""
        began = self._now()
        guided = self._pipe.unet.config.time_cond_proj_dim is None
        encode = {"device": self._device, "num_images_per_prompt": 1, "do_classifier_free_guidance": guided}
        self._pipe.encode_prompt(prompt, **encode)
        text = self._now() - began
        began = self._now()
        self._pipe(prompt, callback_on_step_end=self._step, output_type="pt", **arguments)
        ended = self._now()
        step = statistics.median(after - before for before, after in zip(self._marks, self._marks[1:], strict=False))
        return {
            "text": text,
            "prepare": max(0.0, self._marks[0] - began - text - step),
            "dense steps": step * len(self._marks),
            "decode": ended - self._marks[-1],
        }


def run_edit(settings: Settings, progress: Callable[[str], object] = lambda step: None) -> Result:
    """Measure whole edits with random weights.

    The automatic variant is composed: random weights lead to no mask worth finding, so a mask is found, by probes of
    the recorded steps, and the edit then takes the given one. Runs of many steps are probed twice; where few of them
    are timed, one search is run and counted twice.

    Args:
        settings: what to measure.
        progress: told what happens next.

    Raises:
        OptionError: a setting is not possible.
        BenchmarkError: an edit changed a pixel outside its mask, or none inside.
    """
    settings.check()
    device = torch.device(settings.device)
    progress("making the pipeline")
    tiny = settings.decoder == TINY
    dtype = DTYPES[settings.dtype]
    pipe = build_pipeline(settings.model, dtype, device, settings.seed, settings.scheduler, tiny)
    session = EditSession(
        pipe,
        storage=DTYPES[settings.storage] if settings.storage else None,
        tier=settings.tier,
        norm=settings.norm,
        decoder="auto" if tiny else settings.decoder,
    )
    arguments: dict[str, Any] = {"num_inference_steps": settings.timed_steps}
    if settings.size is not None:
        arguments |= {"height": settings.size, "width": settings.size}
    result = Result(settings, describe_machine(device))
    progress("generating and recording")
    base = session.generate(BASE_PROMPT, generator=_noise(settings), output_type="pt", **arguments)
    result.generation = base.report.seconds["total"] - base.report.seconds["setup"]
    result.generation_setup = base.report.seconds["setup"]
    height, width = base.latents.shape[-2:]
    mask = make_mask(settings.shape, settings.density, height, width, settings.seed)
    result.active = float(mask.float().mean())
    progress("checking an edit")
    edited = session.edit(EDIT_PROMPT, mask=mask, keep=False)
    _check(base, edited)
    # The first search of a history measures the floor as well, which later ones do not.
    session.find_mask(EDIT_PROMPT)
    runs: dict[str, list[dict[str, float]]] = {DENSE: [], USER: []}
    searches = []
    for repeat in range(settings.repeats):
        # A text that the session has not encoded yet, but for the negative one.
        prompt = f"{EDIT_PROMPT}, number {repeat}"
        for name in (DENSE, USER) if repeat % 2 == 0 else (USER, DENSE):
            progress(f"{name}, run {repeat + 1} of {settings.repeats}")
            if name == DENSE:
                runs[name].append(_DenseRun(pipe, device).seconds(prompt, {**arguments, "generator": _noise(settings)}))
            else:
                edited = session.edit(prompt, mask=mask, keep=False)
                runs[name].append(_stages(edited))
                searches.append(session.find_mask(prompt))
    report = edited.report
    result.decoder, result.decoder_reason = report.decoder or "", report.decoder_reason
    result.cache_bytes, result.decoder_bytes = report.cache_bytes, base.report.decoder_bytes
    result.seam = None if report.seam is None else report.seam.greatest
    _compose(result, {name: _medians(several) for name, several in runs.items()}, *_search_of(settings, searches))
    return result


def _noise(settings: Settings) -> torch.Generator:
    return torch.Generator().manual_seed(settings.seed)


def _check(base: Picture, edited: Picture) -> None:
    if base.pixels is None or edited.pixels is None or edited.pixel_mask is None:
        raise BenchmarkError("the pipeline made no picture")
    changed = (base.pixels != edited.pixels).any(dim=1)
    if bool((changed & ~edited.pixel_mask).any()):
        raise BenchmarkError("the edit changed pixels outside its mask")
    if not bool(changed.any()):
        raise BenchmarkError("the edit changed nothing inside its mask")


def _stages(edited: Picture) -> dict[str, float]:
    """The stages of an edit's report under the names of :data:`STAGES`."""
    seconds = edited.report.seconds
    return {
        "text": seconds["text"],
        "prepare": seconds["prepare"],
        "set-up": seconds["setup"],
        "dense steps": seconds["dense"],
        "sparse steps": seconds["sparse"],
        "decode": seconds["decode"],
    }


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {stage: statistics.median(run[stage] for run in runs) for stage in runs[0]}


def _search_of(settings: Settings, searches: list[FoundMask]) -> tuple[float, float]:
    """Seconds and dense steps of finding the mask of a whole edit, as often as it is probed then."""
    times = 2 if settings.timed_steps < FEW_STEPS <= settings.steps else 1
    seconds = statistics.median(found.seconds - found.text_seconds for found in searches)
    return times * seconds, times * searches[0].cost.dense_steps


def _compose(result: Result, measured: Mapping[str, Mapping[str, float]], finding: float, dense_steps: float) -> None:
    """Scale the steps, and put the automatic variant together.

    Args:
        result: to fill.
        measured: seconds by variant and stage, of the timed steps.
        finding: seconds of finding the mask of a whole edit.
        dense_steps: that it costs.
    """
    settings = result.settings
    scale = settings.steps / settings.timed_steps
    names = ("dense steps", "sparse steps")
    for name, stages in measured.items():
        result.seconds[name] = {stage: value * (scale if stage in names else 1.0) for stage, value in stages.items()}
    result.dense_steps = dense_steps
    result.seconds[AUTOMATIC] = {**result.seconds[USER], "mask": finding}
    for stages in result.seconds.values():
        stages["total"] = sum(stages.values())
