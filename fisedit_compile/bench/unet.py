"""Measure one U-Net: dense in several ways, and sparsely at several mask densities."""

from __future__ import annotations

import copy
import os
import platform
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fisedit_compile.bench.masks import make_mask
from fisedit_compile.bench.networks import build_unet, example_inputs
from fisedit_compile.bench.peak import measure_peak
from fisedit_compile.bench.timing import Variant, measure, timed
from fisedit_compile.errors import FisEditError, OptionError
from fisedit_compile.private.inductor import compile_frozen
from fisedit_compile.reporting.explain import explain
from fisedit_compile.runtime import Runtime
from fisedit_compile.runtime.masks import reduce_mask
from fisedit_compile.runtime.spec import Domain

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: How far a sparse call may lie from the recorded one when its inputs are the recorded ones, as a share of the
#: largest output. Random weights amplify rounding; a wrong neighbour, statistic or key is off by far more.
AGREEMENT = {"fp32": 2e-3, "bf16": 2e-1, "fp16": 5e-2}


class BenchmarkError(FisEditError):
    """A sparse call is wrong, so its time means nothing."""


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        model: a name of ``fisedit_compile.bench.networks.MODEL_NAMES`` or a folder with a U-Net's configuration.
        size: of the picture in pixels; None: the model's own.
        densities: shares of active positions, above 0 and at most 1, at the resolution of the latents.
        shape: of the masks: square, disc or ragged.
        dtype: fp32, bf16 or fp16.
        device: of the network.
        batch: of one call; 2 is one picture with guidance.
        norm, lowering: options of the backend.
        storage: dtype in which feature maps are recorded; None: as computed.
        inductor: also measure the dense network compiled by inductor; on a processor with frozen weights, too.
        calls: different recorded calls that edits go through.
        repeats: rounds over all variants.
        seed: of weights, inputs and masks.
    """

    model: str = "sd15"
    size: int | None = None
    densities: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
    shape: str = "square"
    dtype: str = "fp32"
    device: str = "cpu"
    batch: int = 2
    norm: str = "exact"
    lowering: str = "plain"
    storage: str | None = None
    inductor: bool = False
    calls: int = 4
    repeats: int = 5
    seed: int = 0

    def check(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            OptionError: a dtype is unknown, or there is nothing to measure.
        """
        for name in (self.dtype, self.storage or self.dtype):
            if name not in DTYPES:
                raise OptionError(f"unknown dtype {name!r}; expected one of {', '.join(DTYPES)}")
        if not self.densities or self.calls < 1 or self.repeats < 1 or self.batch < 1:
            raise OptionError("expected at least one density, call, repeat and sample")


@dataclass(frozen=True)
class DenseRow:
    """A dense variant: median, fastest and slowest seconds of a call, and its arithmetic as a share of the peak."""

    name: str
    seconds: float
    fastest: float
    slowest: float
    of_peak: float


@dataclass(frozen=True)
class SparseRow:
    """Sparse calls at one density.

    Attributes:
        density: share of active positions at the resolution of the latents.
        seconds, fastest, slowest: of a call.
        context: seconds of entering and leaving an edit once: checksums of the weights, index plans.
        speed_up: over the fastest dense variant.
        arithmetic: multiply-accumulates of a dense call over those of a sparse call.
        of_peak: multiply-accumulates of a sparse call, convolutions counted as direct ones, in these seconds, over what
            the machine reaches in products of large matrices.
        bytes_loaded: recorded bytes that a sparse call reads, at the computed dtypes.
        deviation: largest difference from the recorded output when nothing has changed, as a share of the largest
            output.
    """

    density: float
    seconds: float
    fastest: float
    slowest: float
    context: float
    speed_up: float
    arithmetic: float
    of_peak: float
    bytes_loaded: int
    deviation: float

    @property
    def achieved(self) -> float:
        """Share of the saved arithmetic that became speed."""
        return self.speed_up / self.arithmetic


@dataclass
class Result:
    """All of one benchmark. Seconds are medians of ``settings.calls * settings.repeats`` calls; ``peak`` is in floating
    point operations a second, two for a multiply-accumulate."""

    settings: Settings
    machine: dict[str, str]
    dense: list[DenseRow] = field(default_factory=list)
    sparse: list[SparseRow] = field(default_factory=list)
    first_call: float = 0.0
    first_record: float = 0.0
    record: float = 0.0
    bytes_recorded: int = 0
    macs: int = 0
    sparse_mac_fraction: float = 0.0
    peak: float = 0.0

    @property
    def best_dense(self) -> DenseRow:
        """The fastest dense variant."""
        return min(self.dense, key=lambda row: row.seconds)

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers."""
        plain = asdict(self)
        for row, values in zip(self.sparse, plain["sparse"], strict=True):
            values["achieved"] = row.achieved
        return plain


def describe_machine(device: torch.device) -> dict[str, str]:
    """What the numbers depend on besides the settings."""
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else processor
    found = {"processor": processor, "threads": str(torch.get_num_threads()), "torch": torch.__version__}
    if device.type == "cuda":
        found["accelerator"] = torch.cuda.get_device_name(device)
    return found


@dataclass(frozen=True)
class Call:
    """Arguments of one call, as recorded and as edited."""

    recorded: tuple[tuple[Any, ...], dict[str, Any]]
    edited: tuple[tuple[Any, ...], dict[str, Any]]


def _make_calls(settings: Settings) -> list[Call]:
    """Calls as of one picture and its edit: each has its own timestep and latents; all recorded calls have one prompt,
    and all edited calls another."""
    prompts = [_example(settings, 0)[1], _example(settings, 1)[1]]
    calls = []
    for number in range(settings.calls):
        versions = []
        for version in range(2):
            (latents, timestep), _ = _example(settings, 2 * number + version)
            versions.append(((latents, timestep - 10 * number), prompts[version]))
        calls.append(Call(*versions))
    return calls


def _example(settings: Settings, number: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named inputs of a call, drawn from the seed and a number."""
    dtype, seed = DTYPES[settings.dtype], settings.seed + 1 + number
    return example_inputs(settings.model, settings.size, settings.batch, dtype, settings.device, seed=seed)


def _channels_last(model: nn.Module) -> nn.Module:
    """A copy with weights in channels-last order; all other parameters are shared."""
    shared: dict[int, object] = {id(value): value for value in model.parameters() if value.dim() != 4}
    return copy.deepcopy(model, shared).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _output(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result.sample


class Bench:
    """The network, its recording and the calls, ready to be measured.

    Attributes:
        model: the network, dense.
        compiled: the same network, compiled by this package.
        calls: arguments, as recorded and as edited.
        recorded: outputs of the recorded calls, once ``record`` has run.
        result: numbers that do not come from comparing variants.
    """

    def __init__(self, settings: Settings, progress: Callable[[str], object], model: nn.Module | None = None) -> None:
        """``model``: shared with another benchmark of the same settings; None: a new one."""
        settings.check()
        self.settings, self.progress = settings, progress
        self.device = torch.device(settings.device)
        if model is None:
            progress("making the network")
            model = build_unet(settings.model, DTYPES[settings.dtype], settings.device, settings.seed)
        self.model = model
        self.calls = _make_calls(settings)
        self.runtime = Runtime(storage=DTYPES[settings.storage] if settings.storage else None)
        options: dict[str, Any] = {
            "runtime": self.runtime,
            "norm": settings.norm,
            "lowering": settings.lowering,
        }
        # A copy, so that a shared network is compiled for each benchmark.
        # With sizes as they are, also where another size was measured before.
        self.compiled = torch.compile(copy.copy(self.model), backend="fisedit", options=options, dynamic=False)
        self.result = Result(settings, describe_machine(self.device))
        self.recorded: list[Tensor] = []

    def run(self, network: Callable[..., Any], number: int, edited: bool = True) -> Tensor:
        """Output of the call of that number, with its edited or its recorded inputs."""
        args, kwargs = self.calls[number].edited if edited else self.calls[number].recorded
        return _output(network(*args, **kwargs))

    def record(self) -> None:
        """Compile, record all calls, note the seconds of each step."""
        self.progress("first call after torch.compile")
        self.result.first_call = timed(lambda: self.run(self.compiled, 0, edited=False), self.device)
        self.progress("recording")
        seconds = []
        with self.runtime.record("base", calls=None):
            for number in range(self.settings.calls):

                def call(number: int = number) -> None:
                    self.recorded.append(self.run(self.compiled, number, edited=False).clone())

                seconds.append(timed(call, self.device))
        self.result.first_record = seconds[0]
        self.result.record = statistics.median(seconds[1:] or seconds)
        self.result.bytes_recorded = self.runtime.stats.bytes_stored

    def check(self, mask: Tensor) -> float:
        """Do the calls sparsely, first with the recorded inputs and then with the edited ones.

        Returns:
            The largest difference of an unchanged call from the recorded output, as a share of its largest value.

        Raises:
            BenchmarkError: that is too much, or a position outside the mask changed, or nothing inside did.
        """
        deviations: list[Tensor] = []
        with self.runtime.edit("base", mask=mask):
            for number, recorded in enumerate(self.recorded):
                unchanged = self.run(self.compiled, number, edited=False)
                deviations.append((unchanged - recorded).abs().max() / recorded.abs().max())
        # The maximum of tensors keeps a NaN; that of numbers does not.
        deviation, limit = float(torch.stack(deviations).max()), AGREEMENT[self.settings.dtype]
        if not deviation <= limit:
            raise BenchmarkError(f"calls whose inputs did not change are off by {deviation:.2g}, expected {limit:.2g}")
        with self.runtime.edit("base", mask=mask):
            for number, recorded in enumerate(self.recorded):
                changed = (self.run(self.compiled, number) != recorded).any(dim=1)
                active = reduce_mask(mask[None], Domain(*recorded.shape[-2:])).to(changed.device)
                if bool((changed & ~active).any()):
                    raise BenchmarkError(f"call {number} changed positions outside the mask")
                if not bool((changed & active).any()):
                    raise BenchmarkError(f"call {number} changed nothing inside the mask")
        return deviation

    def dense_variants(self) -> list[Variant]:
        """The dense network in the ways that the settings name."""
        last = _channels_last(self.model)
        last_calls = [self._as_channels_last(call) for call in self.calls]

        def run_last(number: int) -> Tensor:
            args, kwargs = last_calls[number].edited
            return _output(last(*args, **kwargs))

        variants = [
            Variant("eager", lambda number: self.run(self.model, number)),
            Variant("channels last", run_last),
        ]
        if self.settings.inductor:
            # Modules of their own: otherwise both would share their compiled code.
            inductor = torch.compile(copy.copy(self.model))
            variants.append(Variant("inductor", lambda number: self.run(inductor, number)))
        if self.settings.inductor and self.device.type == "cpu":
            # What freezing gains, weights in the order of oneDNN, is of processors.
            frozen = compile_frozen(copy.copy(self.model))
            variants.append(Variant("frozen inductor", lambda number: self.run(frozen, number)))
        return variants

    @staticmethod
    def _as_channels_last(call: Call) -> Call:
        (latents, *rest), named = call.edited
        return replace(call, edited=((latents.contiguous(memory_format=torch.channels_last), *rest), named))

    def sparse_variant(self, density: float, mask: Tensor) -> Variant:
        """The compiled network inside an edit with this mask."""

        def context() -> AbstractContextManager[object]:
            return self.runtime.edit("base", mask=mask)

        return Variant(f"fisedit {density:g}", lambda number: self.run(self.compiled, number), context)


def run_unet(settings: Settings, progress: Callable[[str], object] = lambda step: None) -> Result:
    """Measure a U-Net with random weights.

    Every density is checked before it is timed: outside the mask the recorded output must come back bit by bit, and
    calls whose inputs did not change must agree with it.

    Args:
        settings: what to measure.
        progress: told what happens next.

    Raises:
        OptionError: a setting is not possible.
        BenchmarkError: sparse calls are wrong.
    """
    bench = Bench(settings, progress)
    result = bench.result
    with torch.no_grad():
        bench.record()
        latents = bench.calls[0].recorded[0][0]
        height, width = latents.shape[-2:]
        masks = [make_mask(settings.shape, density, height, width, settings.seed) for density in settings.densities]
        deviations = []
        for density, mask in zip(settings.densities, masks, strict=True):
            progress(f"checking density {density:g}")
            deviations.append(bench.check(mask))
        dense = bench.dense_variants()
        for variant in dense:
            progress(f"warming up {variant.name}")
            variant.call(0)
        sparse = [bench.sparse_variant(*pair) for pair in zip(settings.densities, masks, strict=True)]
        timings = measure([*dense, *sparse], settings.calls, settings.repeats, bench.device, progress)
        args, kwargs = bench.calls[0].recorded
        report = explain(bench.model, *args, **kwargs)
    result.macs, result.sparse_mac_fraction = report.total_macs, report.sparse_mac_fraction
    result.peak = measure_peak(bench.device, DTYPES[settings.dtype])
    for variant in dense:
        timing = timings[variant.name]
        of_peak = 2 * report.total_macs / timing.median / result.peak
        result.dense.append(DenseRow(variant.name, timing.median, *timing.spread, of_peak))
    for variant, density, mask, deviation in zip(sparse, settings.densities, masks, deviations, strict=True):
        timing, cost = timings[variant.name], report.cost(mask)
        result.sparse.append(
            SparseRow(
                density=density,
                seconds=timing.median,
                fastest=timing.spread[0],
                slowest=timing.spread[1],
                context=timing.context,
                speed_up=result.best_dense.seconds / timing.median,
                arithmetic=report.total_macs / max(cost.macs, 1.0),
                of_peak=2 * cost.macs / timing.median / result.peak,
                bytes_loaded=cost.bytes_loaded,
                deviation=deviation,
            )
        )
    return result
