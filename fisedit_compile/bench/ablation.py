"""Measure a U-Net with the compiler's passes switched on one group after the other, beside FISEdit's own ablation."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.bench.masks import make_mask
from fisedit_compile.bench.networks import build_unet, example_inputs
from fisedit_compile.bench.timing import Variant, measure
from fisedit_compile.bench.unet import AGREEMENT, DTYPES, BenchmarkError, describe_machine
from fisedit_compile.errors import OptionError
from fisedit_compile.executing.prologues import prologues
from fisedit_compile.options import parse_options
from fisedit_compile.reporting.explain import explain_with
from fisedit_compile.runtime import Runtime
from fisedit_compile.runtime.masks import reduce_mask
from fisedit_compile.runtime.spec import Domain

PUBLISHED: tuple[tuple[str, float], ...] = (
    ("baseline", 1.83),
    ("kernels only", 2.73),
    ("+ conv, fixed tile", 3.17),
    ("+ adaptive tile", 3.61),
    ("+ approx. attention", 8.13),
)
"""FISEdit's ablation (arXiv 2305.17423): iterations a second at 768x768 on its authors' GPU. Only ratios can be
compared, as its kernels and its machine are others than ours."""


@dataclass(frozen=True)
class Stage:
    """Passes that are switched on.

    Attributes:
        name: what they add to the stage before.
        disabled: passes that are off.
        convolution: the backend's option of that name.
        published: which row of ``PUBLISHED`` adds the same; None when none does.
    """

    name: str
    disabled: tuple[str, ...]
    convolution: str
    published: int | None


_ROWS = ("sparsify_norm", "sparsify_linear", "sparsify_layout", "sparsify_pointwise", "resample")
STAGES: tuple[Stage, ...] = (
    Stage("convolutions on rows", (*_ROWS, "sparsify_attention"), "rows", None),
    Stage("+ norms, linear, etc.", ("sparsify_attention",), "rows", 2),
    Stage("+ adaptive way", ("sparsify_attention",), "auto", 3),
    Stage("+ attention (all)", (), "auto", 4),
)


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        model: a name of ``fisedit_compile.bench.networks.MODEL_NAMES`` or a folder with a U-Net's configuration.
        size: of the picture in pixels; None: the model's own.
        density: share of active positions, above 0 and at most 1, at the resolution of the latents.
        shape: of the mask.
        dtype: fp32, bf16 or fp16.
        device: of the network.
        batch: of one call; 2 is one picture with guidance.
        inductor: compile the second dense row with PyTorch's compiler, which takes minutes for large networks;
            otherwise it is the backend's dense graph.
        calls: different recorded calls.
        repeats: rounds over all variants.
        seed: of weights, inputs and mask.
    """

    model: str = "sd15"
    size: int | None = None
    density: float = 0.1
    shape: str = "square"
    dtype: str = "fp32"
    device: str = "cpu"
    batch: int = 2
    inductor: bool = False
    calls: int = 2
    repeats: int = 3
    seed: int = 0

    def check(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            OptionError: the dtype is unknown, or there is nothing to measure.
        """
        if self.dtype not in DTYPES:
            raise OptionError(f"unknown dtype {self.dtype!r}; expected one of {', '.join(DTYPES)}")
        if self.calls < 1 or self.repeats < 1 or self.batch < 1:
            raise OptionError("expected at least one call, repeat and sample")


@dataclass(frozen=True)
class Row:
    """One variant.

    Attributes:
        name: what it is.
        seconds: median of a call.
        ratio: the dense network's seconds over these; each variant takes turns with the dense network.
        on_rows: share of the multiply-accumulates that runs on active rows, 0 to 1.
        published: which row of ``PUBLISHED`` it stands beside; None: none.
    """

    name: str
    seconds: float
    ratio: float
    on_rows: float
    published: int | None = None


@dataclass
class Result:
    """All rows of one ablation."""

    settings: Settings
    machine: dict[str, str]
    rows: list[Row] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers."""
        return asdict(self)


def _output(network: Callable[..., Any], call: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    args, kwargs = call
    result = network(*args, **kwargs)
    return result[0] if isinstance(result, tuple) else result.sample


def run_ablation(settings: Settings, progress: Callable[[str], object] = lambda step: None) -> Result:
    """Measure a U-Net with random weights; every variant is checked before it is timed.

    Args:
        settings: what to measure.
        progress: told what happens next.

    Raises:
        OptionError: a setting is not possible.
        BenchmarkError: sparse calls of a variant are wrong.
    """
    settings.check()
    device = torch.device(settings.device)
    progress("making the network")
    model = build_unet(settings.model, DTYPES[settings.dtype], settings.device, settings.seed)
    recorded, edited = _calls(settings, 0), _calls(settings, 1)
    height, width = recorded[0][0][0].shape[-2:]
    mask = make_mask(settings.shape, settings.density, height, width, settings.seed)
    result = Result(settings, describe_machine(device))
    dense, dense_seconds = _variant("dense", model, edited), []

    def measure_beside_dense(variant: Variant, share: float, published: int | None) -> None:
        timings = measure([dense, variant], settings.calls, settings.repeats, device, progress)
        beside, seconds = timings[dense.name].median, timings[variant.name].median
        dense_seconds.append(beside)
        result.rows.append(Row(variant.name, seconds, beside / seconds, share, published))

    with torch.no_grad():
        dense.call(0)
        if settings.inductor:
            compiled = _variant("dense, inductor", torch.compile(copy.copy(model)), edited)
            progress("warming up PyTorch's compiler")
            compiled.call(0)
            measure_beside_dense(compiled, 0.0, 1)
        for stage in STAGES:
            progress(f"recording: {stage.name}")
            runtime = Runtime()
            options: dict[str, Any] = {
                "runtime": runtime,
                "disable_passes": stage.disabled,
                "convolution": stage.convolution,
            }
            network = torch.compile(copy.copy(model), backend="fisedit", options=options)
            _record_and_check(settings, runtime, network, recorded, edited, mask)
            if not result.rows:
                measure_beside_dense(_variant("dense, compiled", network, edited), 0.0, 1)
            args, kwargs = recorded[0]
            share = explain_with(parse_options(None, options)[1], model, *args, **kwargs).sparse_mac_fraction
            measure_beside_dense(_variant(stage.name, network, edited, runtime, mask), share, stage.published)
            # Every stage packs weights of its own; together they would take more memory than the network several times.
            prologues.clear()
    seconds = statistics.median(dense_seconds)
    result.rows.insert(0, Row(dense.name, seconds, 1.0, 0.0, 0))
    return result


def _calls(settings: Settings, version: int) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Different calls; two versions have the same timesteps, and other latents and texts."""
    calls = []
    for number in range(settings.calls):
        (latents, timestep), named = example_inputs(
            settings.model,
            settings.size,
            settings.batch,
            DTYPES[settings.dtype],
            settings.device,
            seed=settings.seed + 1 + 2 * number + version,
        )
        calls.append(((latents, timestep - 10 * number), named))
    return calls


def _record_and_check(
    settings: Settings, runtime: Runtime, network: Any, recorded: list[Any], edited: list[Any], mask: Tensor
) -> None:
    """Record all calls; unchanged calls must agree with them, changed ones must differ inside the mask only."""
    with runtime.record("base"):
        outputs = [_output(network, call).clone() for call in recorded]
    with runtime.edit("base", mask=mask):
        for call, output in zip(recorded, outputs, strict=True):
            deviation = float((_output(network, call) - output).abs().max() / output.abs().max())
            if not deviation <= AGREEMENT[settings.dtype]:
                raise BenchmarkError(f"a call whose inputs did not change is off by {deviation:.2g}")
    with runtime.edit("base", mask=mask):
        for call, output in zip(edited, outputs, strict=True):
            changed = (_output(network, call) != output).any(dim=1)
            active = reduce_mask(mask[None], Domain(*output.shape[-2:])).to(changed.device)
            if bool((changed & ~active).any()) or not bool((changed & active).any()):
                raise BenchmarkError("a call changed positions outside the mask, or nothing inside")


def _variant(
    name: str, network: Any, edited: list[Any], runtime: Runtime | None = None, mask: Tensor | None = None
) -> Variant:
    """The edited calls of a network; sparsely with a runtime and a mask, and densely without."""

    def context() -> AbstractContextManager[object]:
        return nullcontext() if runtime is None else runtime.edit("base", mask=mask)

    return Variant(name, lambda number: _output(network, edited[number]), context)
