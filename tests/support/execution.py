"""Run a built program as the runtime does, in a few lines: record a call, edit it, save an edit as a new base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fisedit_compile.options import Options
from fisedit_compile.passes import GraphInput, Program, SparseProgram, build_program
from fisedit_compile.runtime.masks import reduce_mask
from fisedit_compile.runtime.plans import IndexPlan, build_plan
from fisedit_compile.runtime.spec import Domain, PlanInput
from support.graphs import GraphBuilder
from support.tolerances import assert_identical, assert_near


@dataclass
class Base:
    """A recorded call: its outputs and the tensor of each cache site."""

    outputs: tuple[Tensor, ...]
    sites: dict[str, Tensor]


def compile_graph(builder: GraphBuilder, *outputs: fx.Node, options: Options | None = None) -> Program:
    """Finish the builder's graph, without its annotations, and compile it."""
    for node in builder.graph.nodes:
        node.meta.pop("spatial", None)
    return build_program(builder.module(*outputs), builder.infos, options or Options())


def dense_inputs(program: Program, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What dense graphs read besides the inputs."""
    if not isinstance(program, SparseProgram) or not program.dense_inputs:
        return []
    assert program.prologue is not None
    hoisted = program.prologue(*inputs)
    return [hoisted[number] for number in program.dense_inputs]


@torch.no_grad()
def record(program: Program, inputs: Sequence[Tensor]) -> Base:
    """Run the record graph; what it stores is copied, as it may alias inputs or outputs."""
    results = program.record(*inputs, *dense_inputs(program, inputs))
    names = [site.name for site in program.sites]
    stored = results[program.output_count :]
    for site, value in zip(program.sites, stored, strict=True):
        assert (tuple(value.shape), value.dtype) == (site.shape, site.dtype), site.name
    return Base(
        tuple(value.clone() for value in results[: program.output_count]),
        dict(zip(names, (value.clone() for value in stored), strict=True)),
    )


class Edit:
    """One edit of a recorded call."""

    def __init__(self, program: Program, base: Base, inputs: Sequence[Tensor], mask: Tensor) -> None:
        assert isinstance(program, SparseProgram)
        self.program, self.base, self.inputs = program, base, inputs
        fine = reduce_mask(mask, program.mask_domain)
        self.plan: IndexPlan = build_plan(fine, program.domains, program.stencils, "cpu")

    @torch.no_grad()
    def _read(self, source: GraphInput) -> Tensor | None:
        if source.kind == "argument":
            return self.inputs[source.reference]  # type: ignore[index]
        if source.kind == "hoisted":
            assert self.program.prologue is not None
            return self.program.prologue(*self.inputs)[source.reference]
        if source.kind == "invariant":
            assert self.program.invariants is not None
            return self.program.invariants(*map(self._read, self.program.invariant_inputs))[source.reference]
        if source.kind == "plan":
            assert isinstance(source.reference, PlanInput)
            return self.plan.tensor(source.reference)
        assert source.kind == "recorded"
        return self.base.sites[source.reference]  # type: ignore[index]

    @torch.no_grad()
    def run(self) -> tuple[Tensor, ...]:
        """The outputs of the edit; checks that the base is left as it was."""
        before = {name: value.clone() for name, value in self.base.sites.items()}
        results = self.program.edit(*map(self._read, self.program.edit_inputs))
        for name, value in self.base.sites.items():
            assert_identical(value, before[name], f"site {name} after an edit")
        return results

    @torch.no_grad()
    def save(self) -> Base:
        """The edit as a base of its own."""
        results = self.program.edit_save(*map(self._read, self.program.edit_inputs))
        count = self.program.output_count
        sites = {name: value.clone() for name, value in self.base.sites.items()}
        for site, fresh in zip(self.program.sites, results[count:], strict=True):
            if fresh is None:
                continue
            if site.kind == "value":
                sites[site.name] = fresh.clone()
                continue
            assert site.domain is not None
            rows = sites[site.name].permute(site.order).flatten(1, site.space_rank).clone()
            index = self.plan.tensor(PlanInput("index", site.domain))
            valid = self.plan.tensor(PlanInput("valid", site.domain))
            rows = torch.ops.fisedit.scatter_rows(rows, fresh, index, valid)
            space = [site.domain.height, site.domain.width][2 - site.space_rank :] if site.space_rank == 2 else [-1]
            inverse = [site.order.index(dim) for dim in range(len(site.order))]
            sites[site.name] = rows.unflatten(1, space).permute(inverse).contiguous()
        return Base(tuple(value.clone() for value in results[:count]), sites)


def random_inputs(builder: GraphBuilder, seed: int, fixed: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Random values for the graph inputs; parameters are taken from ``fixed`` when it is given."""
    generator = torch.Generator().manual_seed(seed)
    values: list[Tensor] = []
    placeholders = [node for node in builder.graph.nodes if node.op == "placeholder"]
    for position, (node, info) in enumerate(zip(placeholders, builder.infos, strict=True)):
        like = node.meta["val"]
        if info.kind == "parameter" and fixed is not None:
            values.append(fixed[position])
        elif like.dtype.is_floating_point:
            values.append(torch.randn(like.shape, generator=generator).to(like.dtype))
        else:
            values.append(torch.randint(0, 2, like.shape, generator=generator).to(like.dtype))
    return values


def some_mask(domain: Domain, batch: int = 1, seed: int = 0) -> Tensor:
    """A ragged mask with at least one active and one inactive position in each sample."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, domain.size, generator=generator) < 0.3
    mask[:, 1], mask[:, -2] = True, False
    return mask.view(batch, domain.height, domain.width)


def mix(new: Tensor, recorded: Tensor, mask: Tensor, height_dim: int = 2, flat: bool = False) -> Tensor:
    """``new`` where the mask ``[1 or B, h, w]`` is active, else ``recorded``; batch in dimension 0."""
    mask = mask.flatten(1) if flat else mask
    shape = [mask.shape[0]] + [1] * (height_dim - 1) + list(mask.shape[1:])
    shape += [1] * (new.dim() - len(shape))
    return torch.where(mask.view(shape), new, recorded)


def check_masked(
    builder: GraphBuilder,
    output: fx.Node,
    dense: Callable[..., Tensor],
    height_dim: int = 2,
    flat: bool = False,
    batch: int = 1,
    target: Domain | None = None,
    dtype: torch.dtype | None = None,
    sparse: bool = True,
    options: Options | None = None,
) -> Program:
    """Compile a graph whose first input is a picture and compare an edit with what one masked operator means.

    Args:
        dense: the same computation on the graph's inputs; run on the picture mixed by the mask.
        height_dim, flat: where the output has its positions.
        batch: how many different masks.
        target: size of the output, when it is not that of the picture. Where its positions lie is what the program
            says; the tests of networks that move positions compare that with the reference.
        sparse: whether nothing may stay dense.
    """
    program = compile_graph(builder, output, options=options)
    assert isinstance(program, SparseProgram)
    if sparse:
        assert program.report.dense_nodes == [], program.report.dense_nodes
    first = random_inputs(builder, 1)
    second = random_inputs(builder, 2, fixed=first)
    base = record(program, first)
    assert_near(base.outputs[0], dense(*first), "record", dtype)
    domain = next(site.domain for site in program.sites if site.name == "output:0")
    assert domain is not None and domain.whole == (target or program.mask_domain)
    for seed in range(2):
        mask = some_mask(program.mask_domain, batch, seed)
        mixed = mix(second[0], first[0], mask)
        coarse = reduce_mask(mask, domain)
        expected = mix(dense(mixed, *second[1:]), dense(*first), coarse, height_dim, flat)
        (result,) = Edit(program, base, second, mask).run()
        assert_near(result, expected, "edit", dtype)
        outside = mix(torch.zeros_like(result), result, coarse, height_dim, flat)
        assert_identical(
            outside, mix(torch.zeros_like(result), base.outputs[0], coarse, height_dim, flat), "outside the mask"
        )
    return program
