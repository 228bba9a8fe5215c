"""Whole programs on small networks: what an edit and a saved edit must equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fisedit_compile.options import Options
from fisedit_compile.passes import Program, build_program
from fisedit_compile.tracing.trace import capture
from support.execution import Base, Edit, compile_graph, mix, random_inputs, record, some_mask
from support.graphs import GraphBuilder, aten
from support.small_unet import Network, small_unet
from support.tolerances import assert_identical, assert_near


def convolutions() -> tuple[GraphBuilder, fx.Node]:
    """Strided, transposed, grouped and dilated convolutions, pooling, padding and bilinear resizing."""
    network = Network()
    x = network.input(2, 6, 9, 7)
    padded = network.call(aten.pad.default, network.convolution(x, 8), [1, 1, 1, 1], "reflect")
    pooled = network.call(aten.avg_pool2d.default, network.call(aten.relu.default, padded), [3, 3], [2, 2])
    grouped = network.call(aten.conv2d.default, pooled, network.parameter(8, 2, 3, 3), None, [1, 1], [2, 2], [2, 2], 4)
    up = network.call(aten.conv_transpose2d.input, grouped, network.parameter(8, 5, 4, 4), None, [2, 2], [1, 1])
    resized = network.call(aten.upsample_bilinear2d.vec, up, [9, 7], False, None)
    return network, network.call(aten.add.Tensor, network.convolution(resized, 6), x)


def densely() -> tuple[GraphBuilder, fx.Node]:
    """Operators that no rule knows, between others, at both resolutions; a squeeze-and-excitation gate."""
    network = Network()
    x = network.input(2, 6, 9, 7)
    first = network.convolution(x, 8)
    flipped = network.call(aten.flip.default, first, [3])
    down = network.convolution(flipped, 8, stride=2)
    rolled = network.call(aten.roll.default, down, [1], [2])
    gate = network.call(aten.sigmoid.default, network.linear(network.call(aten.mean.dim, rolled, [2, 3]), 8))
    gate = network.call(aten.reshape.default, gate, [2, 8, 1, 1])
    scaled = network.call(aten.mul.Tensor, rolled, gate)
    up = network.call(aten.upsample_nearest2d.vec, scaled, [9, 7], None)
    best = network.piece(network.call(aten.max.dim, up, 1, True), 0)
    return network, network.convolution(network.call(aten.add.Tensor, first, best), 3)


def tokens() -> tuple[GraphBuilder, fx.Node]:
    """Tokens from the first layer to the last; positions with a learned table."""
    network = Network()
    x, prompt = network.input(2, 6, 9, 7), network.input(2, 5, 10, name="prompt")
    moved = network.call(aten.flatten.using_ints, network.convolution(x, 8, kernel=1), 2)
    embedded = network.call(aten.add.Tensor, network.call(aten.transpose.int, moved, 1, 2), network.parameter(1, 63, 8))
    attended = network.attention(network.attention(embedded, embedded), prompt)
    normed = network.call(aten.rms_norm.default, attended, [8], network.parameter(8))
    back = network.call(aten.unflatten.int, network.call(aten.transpose.int, normed, 1, 2), 2, [9, 7])
    return network, network.convolution(back, 4)


NETWORKS = {"unet": small_unet, "convolutions": convolutions, "dense": densely, "tokens": tokens}


@dataclass
class Case:
    """A compiled network, a recorded call and the inputs of an edit."""

    program: Program
    dense: fx.GraphModule
    first: list[Tensor]
    second: list[Tensor]
    base: Base

    def run_dense(self, inputs: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            return self.dense(*inputs)[0]

    def edit(self, inputs: Sequence[Tensor], mask: Tensor, base: Base | None = None) -> Edit:
        return Edit(self.program, base or self.base, inputs, mask)


@cache
def build(name: str, norm: str = "exact") -> Case:
    """A case; shared by the tests, none of which changes it."""
    builder, output = NETWORKS[name]()
    program = compile_graph(builder, output, options=Options(norm=norm))
    other, result = NETWORKS[name]()
    first = random_inputs(builder, 1)
    second = random_inputs(builder, 2, fixed=first)
    return Case(program, other.module(result), first, second, record(program, first))


@pytest.fixture(scope="module", params=list(NETWORKS))
def case(request: pytest.FixtureRequest) -> Case:
    return build(request.param)


def masks(case: Case) -> list[Tensor]:
    """One mask for all samples; one for each; a corner in one sample and nothing in the other."""
    domain = case.program.mask_domain
    assert domain is not None
    corner = torch.zeros(2, domain.height, domain.width, dtype=torch.bool)
    corner[1, -1, -1] = True
    return [some_mask(domain), some_mask(domain, 2), corner]


def test_only_the_network_made_for_it_has_dense_nodes() -> None:
    targets = {name: {miss.target for miss in build(name).program.report.dense_nodes} for name in NETWORKS}
    assert targets.pop("dense") == {"aten.mean.dim", "aten.max.dim"}
    assert all(dense == set() for dense in targets.values())


def test_a_recorded_call_is_the_dense_call(case: Case) -> None:
    assert_near(case.base.outputs[0], case.run_dense(case.first))


def test_a_full_mask_is_the_dense_call(case: Case) -> None:
    domain = case.program.mask_domain
    (result,) = case.edit(case.second, torch.ones(1, domain.height, domain.width, dtype=torch.bool)).run()
    assert_near(result, case.run_dense(case.second))


@pytest.mark.parametrize("norm", ["exact", "cached"])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_the_recorded_input_gives_the_recorded_output(name, norm) -> None:
    case = build(name, norm)
    for mask in masks(case):
        (result,) = case.edit(case.first, mask).run()
        assert_near(result, case.base.outputs[0])


def test_positions_outside_the_mask_are_the_recorded_ones(case: Case) -> None:
    for mask in masks(case):
        (result,) = case.edit(case.second, mask).run()
        zeros = torch.zeros_like(result)
        assert_identical(mix(zeros, result, mask), mix(zeros, case.base.outputs[0], mask))
        inside = mask[:, None].expand(2, *result.shape[1:])
        assert not torch.equal(result[inside], case.base.outputs[0][inside])


def test_inputs_outside_the_mask_do_not_matter(case: Case) -> None:
    mask = masks(case)[1]
    changed = [mix(case.second[0], torch.full_like(case.second[0], 7.0), mask), *case.second[1:]]
    assert_identical(case.edit(changed, mask).run()[0], case.edit(case.second, mask).run()[0])


def test_a_mask_for_each_sample_edits_each_sample(case: Case) -> None:
    """Samples do not look at each other: the same mask for one sample gives the same picture."""
    mask = masks(case)[1]
    (both,) = case.edit(case.second, mask).run()
    for sample in range(2):
        (alone,) = case.edit(case.second, mask[sample : sample + 1]).run()
        assert_near(both[sample], alone[sample])


@pytest.mark.parametrize("norm", ["exact", "cached"])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_a_saved_edit_is_a_base(name, norm) -> None:
    case = build(name, norm)
    for mask in masks(case):
        edit = case.edit(case.second, mask)
        saved = edit.save()
        assert_identical(saved.outputs[0], edit.run()[0], "saving changes no output")
        assert_identical(saved.sites["output:0"], saved.outputs[0], "the output is stored")
        # Within the edited region the same inputs change nothing ...
        inner = mask & (torch.rand(mask.shape, generator=torch.Generator().manual_seed(5)) < 0.6)
        if inner.any():
            assert_near(case.edit(case.second, inner, saved).run()[0], saved.outputs[0])
        # ... and the first inputs bring the first picture back.
        undone = case.edit(case.first, mask, saved).save()
        assert_near(undone.outputs[0], case.base.outputs[0])
        for site in case.program.sites:
            assert_near(undone.sites[site.name], case.base.sites[site.name], site.name)


def test_a_saved_edit_of_everything_stores_what_a_recorded_call_stores(case: Case) -> None:
    domain = case.program.mask_domain
    full = torch.ones(1, domain.height, domain.width, dtype=torch.bool)
    saved, recorded = case.edit(case.second, full).save(), record(case.program, case.second)
    for site in case.program.sites:
        if "norm_" not in site.name:  # sums about the mean of the first call
            assert_near(saved.sites[site.name], recorded.sites[site.name], site.name)
    for name in saved.sites:
        if "norm_totals" in name:
            center = saved.sites[name.replace("totals", "center")]
            groups = center.shape[1]
            count = saved.sites[name.replace("totals", "partials")].shape[1] * 8 / groups
            mean = center + saved.sites[name][:, 0] / count
            assert_near(mean, recorded.sites[name.replace("totals", "center")], name)


def test_edits_of_saved_edits_equal_one_edit_of_both_regions() -> None:
    """Regions of a network of convolutions that lie far apart do not interact."""
    case = build("convolutions", "exact")
    first, second = (torch.zeros(1, 9, 7, dtype=torch.bool) for _ in range(2))
    first[:, 0, 0] = second[:, -1, -1] = True
    saved = case.edit(case.second, first).save()
    (twice,) = case.edit(case.second, second, saved).run()
    (once,) = case.edit(case.second, first | second).run()
    assert_near(twice, once)
    assert not torch.equal(twice, saved.outputs[0]) and not torch.equal(twice, case.base.outputs[0])


class Block(nn.Module):
    """A residual block, self-attention, and two outputs of which one is a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 6)
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.project = nn.Linear(6, 18)
        self.activation = nn.PReLU(6)
        self.register_buffer("scale", torch.tensor([0.5, 1.5]))

    def forward(self, x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.activation(x + self.conv(functional.silu(self.norm(x))) + shift[:, :, None, None])
        query, key, value = self.project(x.flatten(2).transpose(1, 2)).chunk(3, dim=-1)
        attended = functional.scaled_dot_product_attention(query, key, value)
        y = x + attended.transpose(1, 2).reshape(x.shape)
        return y, y.permute(0, 2, 3, 1).contiguous(), shift * self.scale[0]


def test_a_captured_module() -> None:
    torch.manual_seed(0)
    module = Block().requires_grad_(False)
    first, second = ((torch.randn(2, 6, 5, 4), torch.randn(2, 6)) for _ in range(2))
    (traced,) = capture(module, *first)
    program = build_program(traced.gm, traced.input_infos, Options())
    assert program.report.dense_nodes == [] and program.output_count == 3
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}

    def flat(inputs: Sequence[Tensor]) -> list[Tensor]:
        given = iter(inputs)
        return [state[info.name] if info.kind == "parameter" else next(given) for info in traced.input_infos]

    base = record(program, flat(first))
    for recorded, expected in zip(base.outputs, module(*first), strict=True):
        assert_near(recorded, expected)
    assert base.outputs[1].stride() == module(*first)[1].stride()
    full = torch.ones(1, 5, 4, dtype=torch.bool)
    results = Edit(program, base, flat(second), full).run()
    for edited, expected in zip(results, module(*second), strict=True):
        assert_near(edited, expected)
    assert len({result.data_ptr() for result in results}) == 3
    mask = some_mask(program.mask_domain)
    again = Edit(program, base, flat(first), mask).run()
    for edited, expected in zip(again, base.outputs, strict=True):
        assert_near(edited, expected)
    saved = Edit(program, base, flat(second), mask).save()
    assert_identical(saved.sites["output:1"], saved.outputs[1])
    assert_near(saved.outputs[1], saved.outputs[0].permute(0, 2, 3, 1))
    assert_near(saved.sites["output:2"], second[1] * 0.5)
