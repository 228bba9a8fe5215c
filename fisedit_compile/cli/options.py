"""Options that several commands share."""

from __future__ import annotations

import inspect
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fisedit_compile.errors import FisEditError, PipelineError

if TYPE_CHECKING:
    import torch

EMBEDDED = "scenes"
"""Name of the model that comes with the package."""

EMBEDDED_GUIDANCE = 3.0
"""Guidance scale of the model that comes with the package."""

OWN_OPTIONS = {
    "prompt": "--prompt",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "negative_prompt": "--negative-prompt",
    "height": "--size",
    "width": "--size",
    "generator": "--seed",
    "output_type": "the file's name: pictures are written",
    "return_dict": "this command itself",
    "callback_on_step_end": "this command itself",
}
"""Arguments of pipelines that the command line gives, and by which option."""


class SchedulerName(StrEnum):
    """Schedulers that can be chosen; a test holds this list to the one of the edit session."""

    DDIM = "ddim"
    PNDM = "pndm"
    EULER = "euler"
    DPM = "dpm++"
    HEUN = "heun"
    LCM = "lcm"


class Precision(StrEnum):
    """Types of the weights."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class Norm(StrEnum):
    """What becomes of the statistics of group norms in an edit."""

    EXACT = "exact"
    CACHED = "cached"


class MaskMethod(StrEnum):
    """How the mask of an edit is found."""

    PROBE = "probe"
    FISEDIT = "fisedit"


class ShortType(StrEnum):
    """Types of weights and recordings, as benchmarks name them."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class MaskShape(StrEnum):
    """Shapes of masks to measure with; a test holds this list to the one of the generator."""

    SQUARE = "square"
    DISC = "disc"
    RAGGED = "ragged"


class Tier(StrEnum):
    """Where recordings are kept; a test holds this list to the one of the runtime."""

    DEVICE = "device"
    HOST = "host"


class Decoder(StrEnum):
    """How edits are decoded; a test holds this list to the one of the edit session."""

    AUTO = "auto"
    SPARSE = "sparse"
    REGION = "region"
    DENSE = "dense"


class BenchmarkDecoder(StrEnum):
    """As :class:`Decoder`, and another autoencoder."""

    AUTO = "auto"
    SPARSE = "sparse"
    REGION = "region"
    DENSE = "dense"
    TINY = "tiny"


Model = Annotated[
    str,
    typer.Option(
        help="Folder of a diffusers pipeline with a U-Net or a transformer (safetensors weights), or 'scenes', the "
        "small model that comes with the package.",
        metavar="PATH",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the noise.", min=0)]
Steps = Annotated[int, typer.Option(help="Number of scheduler steps.", min=1)]
Scheduler = Annotated[
    SchedulerName | None, typer.Option(help="Scheduler; the pipeline's own when left out.", case_sensitive=False)
]
Guidance = Annotated[
    float | None, typer.Option(help="Guidance scale, on above 1; the pipeline's default when left out.", min=0.0)
]
NegativePrompt = Annotated[str | None, typer.Option(help="What the picture should not show.")]
Argument = Annotated[
    list[str] | None,
    typer.Option(
        help="Any other argument of the pipeline, such as true_cfg_scale=4; may be given several times.",
        metavar="NAME=VALUE",
    ),
]
Size = Annotated[
    str | None, typer.Option(help="Height and width in pixels, such as 512x768; the model's own when left out.")
]
Device = Annotated[str | None, typer.Option(help="Device, such as cpu or cuda:0; CUDA where there is one.")]
DataType = Annotated[Precision, typer.Option(help="Type of the weights.", case_sensitive=False)]


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Height and width from a text such as ``512x768``; None stays None.

    Raises:
        typer.BadParameter: the text is something else.
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+)\s*[xX]\s*(\d+)\s*", text)
    if match is None or not int(match[1]) or not int(match[2]):
        raise typer.BadParameter(f"expected height and width such as 512x768, got {text!r}", param_hint="--size")
    return int(match[1]), int(match[2])


def choose_device(name: str | None) -> torch.device:
    """The device of a name; None: CUDA where there is one.

    Raises:
        typer.BadParameter: there is no such device.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or ["unknown"])[0]
        raise typer.BadParameter(f"cannot use device {name!r}: {reason}", param_hint="--device") from error
    return device


def load_model(model: str, scheduler: SchedulerName | None, device: str | None, precision: Precision) -> Any:
    """Load a pipeline, ready to run.

    Raises:
        typer.BadParameter: there is no such folder or device.
        PipelineError: the folder holds no pipeline that can be loaded.
    """
    folder = Path(model)
    if model != EMBEDDED and not folder.is_dir():
        raise typer.BadParameter(f"expected a folder or '{EMBEDDED}', and {model!r} is neither", param_hint="--model")
    quiet()
    import torch

    place = choose_device(device)
    dtype = getattr(torch, precision.value)
    if model == EMBEDDED:
        from fisedit_compile.scenes import load_pipeline

        pipe = load_pipeline()
    else:
        from diffusers import DiffusionPipeline

        try:
            pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
            raise PipelineError(f"{folder} does not hold a pipeline that can be loaded: {error}") from error
    pipe.to(place, dtype)
    if scheduler is not None:
        from fisedit_compile.pipelines.families.schedulers import make_scheduler

        pipe.scheduler = make_scheduler(scheduler.value, pipe.scheduler)
    return pipe


def parse_arguments(texts: Sequence[str]) -> dict[str, Any]:
    """Arguments of a pipeline from texts such as ``true_cfg_scale=4``: values are JSON, or else words.

    Raises:
        typer.BadParameter: a text has another form, names nothing or what has an option of its own.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not name.isidentifier():
            raise typer.BadParameter(f"expected NAME=VALUE, got {text!r}", param_hint="--argument")
        if name in OWN_OPTIONS:
            raise typer.BadParameter(f"{name} is given by {OWN_OPTIONS[name]}", param_hint="--argument")
        if name in found:
            raise typer.BadParameter(f"{name} is given twice", param_hint="--argument")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def call_arguments(
    model: str,
    steps: int,
    guidance: float | None,
    negative_prompt: str | None,
    size: str | None,
    others: Sequence[str] | None,
) -> dict[str, Any]:
    """Arguments of a pipeline call from those of the command line."""
    arguments: dict[str, Any] = {"num_inference_steps": steps}
    if guidance is None and model == EMBEDDED:
        guidance = EMBEDDED_GUIDANCE
    if guidance is not None:
        arguments["guidance_scale"] = guidance
    if negative_prompt is not None:
        arguments["negative_prompt"] = negative_prompt
    pixels = parse_size(size)
    if pixels is not None:
        arguments["height"], arguments["width"] = pixels
    return arguments | parse_arguments(others or ())


def check_arguments(pipe: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse what a pipeline cannot be told, such as a negative prompt where it has none.

    Raises:
        PipelineError: naming the arguments.
    """
    unknown = sorted(set(arguments) - set(inspect.signature(type(pipe).__call__).parameters))
    if unknown:
        raise PipelineError(f"{type(pipe).__name__} has no argument {', '.join(unknown)}; leave it out")


@contextmanager
def pipeline_complaints() -> Iterator[None]:
    """What the pipeline refuses (a size it cannot make, for example) is the user's to mend, not a defect."""
    try:
        yield
    except FisEditError:
        raise
    except ValueError as error:
        raise PipelineError(f"the pipeline refused to run: {error}") from error


def quiet() -> None:
    """Keep the libraries from talking about what the user did not ask for."""
    # PyTorch's compiler, of functions of diffusers that ask for versions.
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`", UserWarning)
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    import diffusers.utils.logging
    import transformers.utils.logging

    # Bars of loading; those of running stay.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
