"""Random chains of operators: an edit equals the dense graph run with every spatial value mixed by the mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from fisedit_compile.options import Options
from fisedit_compile.passes import DenseProgram, Program, SparseProgram, build_program
from fisedit_compile.passes.common.layouts import Spatial
from fisedit_compile.runtime.masks import reduce_mask
from support.execution import Edit, dense_inputs, random_inputs, record
from support.graphs import aten
from support.small_unet import Network

Step = Callable[[st.DrawFn, Network, fx.Node], fx.Node]


def shape_of(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def convolve(draw: st.DrawFn, network: Network, x: fx.Node) -> fx.Node:
    return network.convolution(
        x, draw(st.sampled_from([4, 6])), kernel=draw(st.sampled_from([1, 3])), stride=draw(st.integers(1, 2))
    )


def normalise(draw: st.DrawFn, network: Network, x: fx.Node) -> fx.Node:
    return network.norm(x, groups=draw(st.sampled_from([1, 2])))


def pool(draw: st.DrawFn, network: Network, x: fx.Node) -> fx.Node:
    target = draw(st.sampled_from([aten.avg_pool2d.default, aten.max_pool2d.default]))
    return network.call(target, x, [3, 3], [draw(st.integers(1, 2))] * 2, [1, 1])


def resize(draw: st.DrawFn, network: Network, x: fx.Node) -> fx.Node:
    sizes = [draw(st.integers(2, 7)), draw(st.integers(2, 7))]
    if draw(st.booleans()):
        return network.call(aten.upsample_nearest2d.vec, x, sizes, None)
    return network.call(aten.upsample_bilinear2d.vec, x, sizes, draw(st.booleans()), None)


def pad(draw: st.DrawFn, network: Network, x: fx.Node) -> fx.Node:
    mode = draw(st.sampled_from(["constant", "replicate"]))
    return network.call(aten.pad.default, x, [draw(st.integers(0, 2)) for _ in range(4)], mode)


def activate(draw: st.DrawFn, network: Network, x: fx.Node) -> fx.Node:
    return network.call(draw(st.sampled_from([aten.silu.default, aten.neg.default, aten.clone.default])), x)


def gate(draw: st.DrawFn, network: Network, x: fx.Node) -> fx.Node:
    """Both halves of a dimension multiplied, or another dimension's softmax."""
    dim = draw(st.integers(-1, len(shape_of(x)) - 1))
    if shape_of(x)[dim] % 2:
        return network.call(aten.softmax.int, x, dim)
    halves = network.call(aten.chunk.default, x, 2, dim)
    return network.call(aten.mul.Tensor, network.piece(halves, 0), network.piece(halves, 1))


def shift(draw: st.DrawFn, network: Network, x: fx.Node) -> fx.Node:
    """Add a parameter that broadcasts in some way."""
    shape = shape_of(x)
    keep = draw(st.lists(st.booleans(), min_size=1, max_size=len(shape)))
    sizes = [size if whole else 1 for size, whole in zip(shape[-len(keep) :], keep, strict=True)]
    return network.call(aten.add.Tensor, x, network.parameter(*sizes, name="shift"))


def join(draw: st.DrawFn, network: Network, x: fx.Node) -> fx.Node:
    return network.call(aten.cat.default, [x, network.call(aten.neg.default, x)], draw(st.integers(1, 2)))


def permute(draw: st.DrawFn, network: Network, x: fx.Node) -> fx.Node:
    order = draw(st.permutations(range(1, len(shape_of(x)))))
    return network.call(aten.permute.default, x, [0, *order])


def merge(draw: st.DrawFn, network: Network, x: fx.Node) -> fx.Node:
    start = draw(st.integers(0, len(shape_of(x)) - 2))
    return network.call(aten.flatten.using_ints, x, start, start + 1)


def split(draw: st.DrawFn, network: Network, x: fx.Node) -> fx.Node:
    dim = draw(st.integers(0, len(shape_of(x)) - 1))
    size = shape_of(x)[dim]
    first = draw(st.sampled_from([number for number in range(1, size + 1) if size % number == 0]))
    return network.call(aten.unflatten.int, x, dim, [first, size // first])


def reduce(draw: st.DrawFn, network: Network, x: fx.Node) -> fx.Node:
    dim = draw(st.integers(0, len(shape_of(x)) - 1))
    return network.call(aten.mean.dim, x, [dim], True)


def project(draw: st.DrawFn, network: Network, x: fx.Node) -> fx.Node:
    if draw(st.booleans()):
        return network.call(aten.layer_norm.default, x, [shape_of(x)[-1]])
    return network.linear(x, draw(st.sampled_from([4, 6])))


def attend(draw: st.DrawFn, network: Network, x: fx.Node) -> fx.Node:
    """Attention of a value to itself, as tokens and perhaps back."""
    shape = shape_of(x)
    tokens = x
    if len(shape) == 4:
        moved = network.call(aten.permute.default, x, [0, 2, 3, 1])
        tokens = network.call(aten.reshape.default, moved, [shape[0], -1, shape[1]])
    key = tokens if draw(st.booleans()) else network.linear(tokens, shape_of(tokens)[-1])
    value = draw(st.sampled_from([tokens, key]))
    attended = network.call(aten.scaled_dot_product_attention.default, tokens, key, value)
    if len(shape) == 3 or draw(st.booleans()):
        return attended
    back = network.call(aten.reshape.default, attended, [shape[0], *shape[2:], shape[1]])
    return network.call(aten.permute.default, back, [0, 3, 1, 2])


def disturb(draw: st.DrawFn, network: Network, x: fx.Node) -> fx.Node:
    """An operator without a rule."""
    if draw(st.booleans()):
        return network.call(aten.flip.default, x, [draw(st.integers(0, len(shape_of(x)) - 1))])
    return network.piece(network.call(aten.max.dim, x, draw(st.integers(0, len(shape_of(x)) - 1)), True), 0)


PICTURES: Sequence[Step] = (convolve, convolve, normalise, pool, resize, pad)
ANY: Sequence[Step] = (activate, gate, shift, join, permute, merge, split, reduce, project, disturb)


@st.composite
def networks(draw: st.DrawFn) -> tuple[Network, fx.Node]:
    """Operators one after another; those for pictures only while the value has four dimensions and even channels."""
    network = Network()
    sizes = draw(st.sampled_from([(2, 4, 6, 5), (1, 4, 4, 4), (2, 6, 3, 7)]))
    x = network.convolution(network.input(*sizes), 4)
    for _ in range(draw(st.integers(3, 7))):
        steps = list(ANY)
        shape = shape_of(x)
        if len(shape) == 4 and shape[0] == sizes[0] and shape[1] % 2 == 0 and min(shape[2:]) > 1:
            steps += PICTURES
        if len(shape) in (3, 4):
            steps += [attend, attend]
        if not 3 <= len(shape) <= 5 or x.meta["val"].numel() > 4000:
            break
        x = draw(st.sampled_from(steps))(draw, network, x)
    return network, x


def mixed(new: Tensor, old: Tensor, spatial: Spatial, mask: Tensor) -> Tensor:
    """``new`` where the mask of the value's resolution is active."""
    active = reduce_mask(mask, spatial.domain)
    active = active.flatten(1) if spatial.space_rank == 1 else active
    active = active.reshape(*active.shape, *[1] * len(spatial.channel_dims))
    order = spatial.order
    chosen = torch.where(active, new.permute(order), old.permute(order))
    return chosen.permute([order.index(dim) for dim in range(len(order))])


def interpret(graph: fx.Graph, inputs: Sequence[Tensor], mask: Tensor | None, recorded: dict | None) -> dict:
    """Every node's value, dense, mixed with its recorded value where it is spatial."""
    values: dict[str, object] = {}
    remaining = iter(inputs)
    for node in graph.nodes:
        if node.op == "output":
            return values
        if node.op == "placeholder":
            value = next(remaining)
        else:
            arguments, keywords = fx.node.map_arg((node.args, node.kwargs), lambda source: values[source.name])
            value = node.target(*arguments, **keywords)
        if recorded is not None and mask is not None and (spatial := node.meta.get("spatial")) is not None:
            value = mixed(value, recorded[node.name], spatial, mask)
        values[node.name] = value
    raise AssertionError("a graph ends with its output")


def assert_near(actual: Tensor, expected: object, what: str) -> None:
    """Norms of nearly constant maps magnify rounding, so the tolerance does not shrink with the result."""
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=2e-3, msg=lambda text: f"{what}: {text}")


def check_program(program: Program, dense: fx.Graph, output: str, inputs: list[list[Tensor]], mask: Tensor) -> None:
    first, second = inputs
    base = record(program, first)

    def with_hoisted(inputs: list[Tensor]) -> list[Tensor]:
        return [*inputs, *dense_inputs(program, inputs)]

    recorded = interpret(dense, with_hoisted(first), None, None)
    assert_near(base.outputs[0], recorded[output], "record")
    edit = Edit(program, base, second, mask)
    assert_near(edit.run()[0], interpret(dense, with_hoisted(second), mask, recorded)[output], "edit")
    assert_near(Edit(program, base, first, mask).run()[0], base.outputs[0], "the recorded input")
    saved = edit.save()
    assert_near(saved.sites["output:0"], saved.outputs[0], "the saved output")
    assert_near(Edit(program, saved, first, mask).run()[0], base.outputs[0], "undone")


@settings(max_examples=20)
@given(networks(), st.integers(0, 1000), st.booleans())
@torch.no_grad()
def test_random_networks_equal_the_masked_dense_graph(network_and_output, seed, every_sample) -> None:
    network, x = network_and_output
    module = network.module(x)
    program = build_program(module, network.infos, Options())
    if isinstance(program, DenseProgram):
        assert "which of its dimensions are positions" in str(program.report.dense_reason)
    assume(isinstance(program, SparseProgram))
    # The passes rewrite the module; its annotated copy is the record graph, whose stores are dead here.
    dense, output = program.record.graph, next(iter(reversed(program.record.graph.nodes))).args[0][0].name
    first = random_inputs(network, seed)
    second = random_inputs(network, seed + 1, fixed=first)
    batch, _, height, width = first[0].shape
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch if every_sample else 1, height, width, generator=generator) < 0.3
    mask[-1, 0, 0] = True
    check_program(program, dense, output, [first, second], mask)
