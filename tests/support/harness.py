"""What the semantic tests share: masks to try, and a network compiled, recorded and traced by the reference.

With FISEDIT_TEST_DEVICE=cuda the compiled networks run on the GPU; the reference stays on the CPU.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from hypothesis import strategies
from torch import Tensor, nn
from torch.nn import functional

import fisedit_compile as fisedit
from support.captured import compiled_once
from support.networks import Network
from support.reference import Recording, Reference, flatten
from support.tolerances import assert_identical, assert_near

DEVICE = os.environ.get("FISEDIT_TEST_DEVICE", "cpu")
KINDS = ("full", "pixel", "border", "rectangle", "ragged", "sparse", "per-sample", "one sample")


@dataclass(frozen=True)
class MaskRecipe:
    """A mask, whatever the network's size: its kind, a seed, and whether it comes in another resolution."""

    kind: str
    seed: int = 0
    resolution: str = "same"

    def draw(self, size: tuple[int, int], batch: int = 1) -> Tensor:
        """The mask as booleans ``[H, W]``, or ``[B, H, W]`` for the kinds that differ by sample."""
        height, width = size
        if self.resolution == "finer":
            height, width = 3 * height + 1, 2 * width
        elif self.resolution == "coarser":
            height, width = (height + 1) // 2, (width + 2) // 3
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.rand((batch, height, width), generator=generator)
        mask = torch.zeros((height, width), dtype=torch.bool)
        row, column = self.seed % height, (self.seed // 3) % width
        if self.kind == "full":
            return ~mask
        if self.kind == "pixel":
            mask[row, column] = True
        elif self.kind == "border":
            mask[0], mask[:, -1] = True, True
        elif self.kind == "rectangle":
            mask[row // 2 : row // 2 + 1 + height // 3, column // 2 : column // 2 + 1 + width // 2] = True
        elif self.kind == "ragged":
            return functional.avg_pool2d(noise[:1], 3, 1, 1)[0] > 0.47
        elif self.kind == "sparse":
            return noise[0] < 0.08
        elif self.kind == "per-sample":
            return noise < torch.linspace(0.03, 0.3, batch)[:, None, None]
        elif self.kind == "one sample":
            return (noise < 0.2) & (torch.arange(batch) == 0)[:, None, None]
        return mask


def recipes() -> strategies.SearchStrategy[MaskRecipe]:
    """Masks of every kind but the empty one."""
    return strategies.builds(
        MaskRecipe,
        kind=strategies.sampled_from(KINDS),
        seed=strategies.integers(0, 999),
        resolution=strategies.sampled_from(("same", "same", "finer", "coarser")),
    )


@functools.cache
def reference_of(network: Network, dtype: torch.dtype = torch.float32) -> Reference:
    """The reference of a network; tracing is slow, so tests share it."""
    return Reference(
        network.module(dtype),
        network.inputs(0, dtype),
        network.spatial,
        channels_last=network.channels_last,
        tokens=network.tokens,
    )


@functools.cache
def dense_outputs(network: Network, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """What the uncompiled network returns."""
    with torch.no_grad():
        return flatten(network.module(dtype)(*network.inputs(seed, dtype)))


@dataclass(repr=False)
class Case:
    """A compiled network with a recorded base, and the reference's recording of the same call."""

    network: Network
    module: Callable[..., Any]
    runtime: fisedit.Runtime
    reference: Reference
    dtype: torch.dtype
    recording: Recording
    recorded: tuple[Tensor, ...] = ()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """For hypothesis, which writes the arguments of every example down and would print all tensors."""
        printer.text(f"Case({self.network.name!r})")

    def call(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """One call of the compiled network."""
        return outputs_of(self.module, inputs)

    def edit(self, inputs: Sequence[Tensor], mask: Tensor | None, base: str = "base") -> tuple[Tensor, ...]:
        """One call within an edit."""
        with self.runtime.edit(base, mask=mask):
            return self.call(inputs)

    def expected(self, inputs: Sequence[Tensor], mask: Tensor | None) -> tuple[Tensor, ...]:
        """What the reference computes for an edit of the base."""
        return self.reference.edit(self.recording, inputs, mask).outputs

    def mask(self, recipe: MaskRecipe) -> Tensor:
        """The mask of a recipe in this network's size."""
        return recipe.draw(self.network.resolution, self.network.batch)

    def assert_outside_untouched(self, outputs: Sequence[Tensor], mask: Tensor) -> None:
        """Outside the active set, outputs are the recorded ones bit by bit."""
        for number, (output, recorded, inside) in enumerate(
            zip(outputs, self.recorded, self.reference.inside(mask), strict=True)
        ):
            if inside is not None:
                outside = ~inside.expand(output.shape)
                assert_identical(output[outside], recorded[outside], f"output {number} outside the mask")

    def assert_all_near(self, outputs: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
        """Compare all outputs by the table of tolerances."""
        assert len(outputs) == len(expected)
        for number, (output, wanted) in enumerate(zip(outputs, expected, strict=True)):
            assert_near(output, wanted, f"{self.network.name}: output {number} {what}", dtype=self.dtype)

    def check_edits(self, *recipes: MaskRecipe) -> None:
        """Compare edits by masks of everything, of nothing and of the recipes with what they must be.

        For networks whose outputs are all maps, and where a mask of everything runs the sparse graph: compiled with
        ``convolution="rows"``, without group norms if they are compiled with ``norm="cached"``.
        """
        network = self.network
        base, new = network.inputs(0), network.inputs(1)
        full, empty = torch.ones(network.resolution), torch.zeros(network.resolution)
        self.assert_all_near(self.recorded, dense_outputs(network, 0), "recorded")
        self.assert_all_near(self.edit(new, full), dense_outputs(network, 1), "with a full mask")
        for output, recorded in zip(self.edit(new, empty), self.recorded, strict=True):
            assert_identical(output, recorded, "with an empty mask")
        for recipe in recipes:
            mask = self.mask(recipe)
            outputs = self.edit(new, mask)
            assert all(inside is not None for inside in self.reference.inside(mask))
            self.assert_outside_untouched(outputs, mask)
            self.assert_all_near(outputs, self.expected(new, mask), f"against the reference, {recipe}")
            self.assert_all_near(self.edit(base, mask), self.recorded, f"with unchanged inputs, {recipe}")
        assert self.runtime.stats.calls["dense"] == 0


def compiled(module: nn.Module, runtime: fisedit.Runtime, **options: Any) -> nn.Module:
    """A network compiled for a runtime."""
    settings: dict[str, Any] = {"runtime": runtime, **options}
    return cast(nn.Module, torch.compile(module.to(DEVICE), backend="fisedit", options=settings))


def outputs_of(module: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """One call on the tested device; inputs and outputs are on the CPU."""
    with torch.no_grad():
        outputs = flatten(module(*(value.to(DEVICE) if isinstance(value, Tensor) else value for value in inputs)))
    return tuple(output.cpu() for output in outputs)


def compile_network(
    network: Network,
    norm: str = "exact",
    dtype: torch.dtype = torch.float32,
    storage: torch.dtype | None = None,
    lowering: str = "plain",
    tier: str = "device",
    traced_once: bool = False,
    **options: Any,
) -> Case:
    """Compile a network with a runtime of its own and record the base from the inputs of seed 0.

    Weights are packed unless ``packing`` says otherwise, also where plain products were measured to be faster.
    With ``traced_once`` all compilations share a module, and Dynamo's graph of it, which the first one makes.
    """
    options.setdefault("packing", True)
    if network.tokens is not None:
        options["tokens"] = {"tokens": network.tokens}
    runtime = fisedit.Runtime(storage=storage, tier=tier)
    options |= {"norm": norm, "lowering": lowering}
    if traced_once:
        module: Callable[..., Any] = compiled_once(network, dtype, DEVICE, {"runtime": runtime, **options})
    else:
        module = compiled(network.module(dtype), runtime, **options)
    reference = reference_of(network, dtype).with_norm(norm)
    base = network.inputs(0, dtype)
    case = Case(network, module, runtime, reference, dtype, reference.record(base))
    with runtime.record("base"):
        case.recorded = case.call(base)
    return case
