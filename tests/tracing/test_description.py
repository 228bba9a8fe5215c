"""What is read from a Dynamo graph while it is compiled, and what is known of graphs that cannot be traced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fisedit_compile.passes.common.ir import unknown
from fisedit_compile.tracing.description import GraphInputs, describe
from fisedit_compile.tracing.trace import DenseGraph, TracedGraph, capture_all
from support.opaque_networks import KINDS, Untraceable, draw

aten = torch.ops.aten


def described(module: nn.Module, *inputs: Any, **options: Any) -> GraphInputs:
    """What is described of the one graph of a call."""
    found: list[GraphInputs] = []

    def keep(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append(describe(gm, example_inputs))
        return gm.forward

    with torch.no_grad():
        torch.compile(module, backend=keep, **options)(*inputs)
    return found[-1]


def changes(module: nn.Module, *inputs: Any) -> set[str]:
    """Names of the inputs that were seen changed."""
    inputs_of = described(module, *inputs)
    return {inputs_of.infos[position].name for position in inputs_of.changed}


def in_a_view(net: Untraceable, x: Tensor) -> Tensor:
    x[:, :1, 2:].relu_()
    return net.both(x)


CHANGES: list[tuple[Callable[..., Any], set[str]]] = [
    (KINDS["overwritten input"], {"arguments[0]"}),
    (KINDS["buffer"], {"count"}),
    (KINDS["checkpoint"], set()),
    (KINDS["dropout"], set()),
    (in_a_view, {"arguments[0]"}),
    (lambda net, x: functional.relu(x, inplace=True), {"arguments[0]"}),
    (lambda net, x: torch.ops.fisedit_tests.triple_(x) or net.both(x), {"arguments[0]"}),
]


@pytest.mark.parametrize(("function", "expected"), CHANGES)
def test_inputs_changed_in_place_are_seen(function: Callable[..., Any], expected: set[str]) -> None:
    assert changes(Untraceable(function), draw(1)) == expected
    torch.compiler.reset()
    with torch.inference_mode():
        assert changes(Untraceable(function), draw(1)) == expected
    torch.compiler.reset()
    parts = torch.cat([draw(1), draw(2)])[:2]
    assert changes(Untraceable(function), parts.mul_(2)) == expected, "a view that was changed before"


def test_outputs_are_described() -> None:
    found = described(Untraceable(lambda net, x: (net.coarse(x), x.mean((2, 3)).bfloat16())), draw(1))
    assert found.outputs is not None
    assert [(value.shape, value.dtype) for value in found.outputs] == [
        ((2, 6, 7, 5), torch.float32),
        ((2, 3), torch.bfloat16),
    ]


def test_outputs_of_a_dynamic_size_are_fixed() -> None:
    found = described(Untraceable(lambda net, x: functional.interpolate(x, scale_factor=2.0)), draw(1), dynamic=True)
    assert found.outputs is not None
    assert [value.shape for value in found.outputs] == [(2, 3, 26, 18)]


def captured(function: Callable[..., Any], *inputs: Any) -> TracedGraph | DenseGraph:
    (found,) = capture_all(Untraceable(function), *inputs)
    return found


def test_outputs_whose_sizes_depend_on_data_are_not_known() -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert described(Untraceable(lambda net, x: x.nonzero()), draw(1)).outputs is None


def test_a_graph_that_returns_nothing_is_left_alone() -> None:
    """There is nothing to mask, and its effects must not be dropped with it."""

    def effect(net: Untraceable, x: Tensor) -> None:
        net.count.add_(x.mean())  # type: ignore[operator]

    assert isinstance(captured(effect, draw(1)), DenseGraph)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_known_of_graphs_that_cannot_be_traced(kind: str) -> None:
    found = captured(KINDS[kind], draw(1))
    assert isinstance(found, TracedGraph) and found.opaque is not None
    known = any(node.target is aten.conv2d.default for node in found.gm.graph.nodes)
    stand_ins = [node for node in found.gm.graph.nodes if node.target is unknown]
    assert bool(stand_ins) is not known, "the trace as far as it goes, or stand-ins"
    assert known is (kind not in ("cond", "checkpoint", "vmap", "views"))
    placeholders = [node for node in found.gm.graph.nodes if node.op == "placeholder"]
    assert len(placeholders) == len(found.input_infos)
    (output,) = next(node for node in found.gm.graph.nodes if node.op == "output").args[0]
    channels = 5 if kind == "batch statistics" else 4
    assert tuple(output.meta["val"].shape) == (2, channels, 13, 9)
    states = {info.name for info in found.input_infos if info.kind == "state"}
    expected = {"buffer": {"count"}, "batch statistics": {"norm.running_mean", "norm.running_var"}}
    assert {name for name in states if "num_batches" not in name} == expected.get(kind, set())
    changed = {found.input_infos[position].name for position in found.opaque.changed}
    assert changed == states | ({"args[0]"} if kind == "overwritten input" else set())


def test_stand_ins_read_all_inputs_and_have_the_dtype_of_the_output() -> None:
    def function(net: Untraceable, x: Tensor, t: Tensor) -> Any:
        return checkpoint(lambda y: (y * t).half(), x, use_reentrant=False)

    found = captured(function, draw(1), draw(2, 1))
    assert isinstance(found, TracedGraph)
    (stand_in,) = [node for node in found.gm.graph.nodes if node.target is unknown]
    assert stand_in.meta["val"].dtype == torch.float16
    assert len(stand_in.args) == len(found.input_infos) == 2
