"""Recorded and mixed maps, masks and plans, for tests of index plans and operators."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from fisedit_compile.runtime.masks import reduce_mask
from fisedit_compile.runtime.plans import IndexPlan, build_plan
from fisedit_compile.runtime.spec import Domain, PlanInput, Stencil


def window(source: Domain, kernel: int = 3, stride: int = 1, padding: int = 1, dilation: int = 1) -> Stencil:
    """A square window, as of a convolution or a pooling."""
    target = [(s + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for s in (source.height, source.width)]
    values = {
        f"{name}_{axis}": value
        for name, value in (("stride", stride), ("padding", padding), ("dilation", dilation))
        for axis in "yx"
    }
    return Stencil.of("window", source, Domain(*target), kernel_height=kernel, kernel_width=kernel, **values)


@st.composite
def masks(draw: st.DrawFn, domain: Domain, batch: int) -> Tensor:
    """One mask for all samples or one for each: full, one pixel, the border, a ragged random one, none."""
    samples = []
    for _ in range(draw(st.sampled_from([1, batch]))):
        mask = torch.zeros(domain.height, domain.width, dtype=torch.bool)
        shape = draw(st.sampled_from(["full", "pixel", "border", "ragged", "empty"]))
        if shape == "full":
            mask[:] = True
        elif shape == "border":
            mask[[0, -1]] = True
            mask[:, [0, -1]] = True
        elif shape == "pixel":
            mask.view(-1)[draw(st.integers(0, domain.size - 1))] = True
        elif shape == "ragged":
            generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
            mask = torch.rand(domain.height, domain.width, generator=generator) < draw(st.floats(0.05, 0.95))
        samples.append(mask)
    return torch.stack(samples)


def mixed_maps(mask: Tensor, domain: Domain, batch: int, channels: int) -> tuple[Tensor, Tensor]:
    """A recorded map, and one that differs from it at the active positions only: NCHW, float64."""
    recorded, new = torch.randn(2, batch, channels, domain.height, domain.width, dtype=torch.float64)
    return recorded, torch.where(reduce_mask(mask, domain)[:, None], new, recorded)


def positions(map: Tensor) -> Tensor:
    """NCHW as ``[B, S, C]``, a view."""
    return map.flatten(2).transpose(1, 2)


def take(map: Tensor, index: Tensor) -> Tensor:
    """Rows ``[B, N, *C]`` of ``[B, S, *C]`` by plain indexing."""
    samples = torch.arange(map.shape[0]).view(-1, *[1] * (index.ndim - 1))
    return map[samples, index.expand(map.shape[0], *index.shape[1:])]


@dataclass
class Case:
    """A mask with its plan for one stencil, and maps of its source domain.

    Attributes:
        recorded, mixed: ``[B, S, C]`` views of NCHW maps; they differ at the active positions only.
        rows: ``[B, N, C]``, the mixed map's rows; NaN in padding rows, which nothing may read.
    """

    plan: IndexPlan
    stencil: Stencil
    recorded: Tensor
    mixed: Tensor
    rows: Tensor

    @classmethod
    def build(cls, mask: Tensor, stencil: Stencil, batch: int, channels: int) -> Case:
        torch.manual_seed(0)  # so that a failing example fails again when it is repeated
        plan = build_plan(mask, [], [stencil], "cpu")
        recorded, mixed = (positions(map) for map in mixed_maps(mask, stencil.source, batch, channels))
        index, valid = (plan.tensor(PlanInput(kind, stencil.source)) for kind in ("index", "valid"))
        rows = take(mixed, index)
        if valid is not None:
            rows = torch.where(valid.expand(batch, -1)[..., None], rows, torch.nan)
        return cls(plan, stencil, recorded, mixed, rows)

    def source(self, kind: str) -> Tensor | None:
        """``index`` or ``valid`` of the source domain."""
        return self.plan.tensor(PlanInput(kind, self.stencil.source))

    def target(self, kind: str) -> Tensor | None:
        """``index`` or ``valid`` of the target domain."""
        return self.plan.tensor(PlanInput(kind, self.stencil.target))

    def taps(self, kind: str) -> Tensor | None:
        """A plan input of the stencil."""
        return self.plan.tensor(PlanInput(kind, self.stencil))

    def dense_mixed(self) -> Tensor:
        """The mixed map as NCHW."""
        source = self.stencil.source
        return self.mixed.transpose(1, 2).unflatten(2, (source.height, source.width))

    def target_rows(self, map: Tensor) -> Tensor:
        """Rows of an NCHW map of the target domain."""
        return take(positions(map), self.target("index"))
