"""Lowering: plain code that calls operators directly, and inductor code in which the mask's sizes are symbols."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fisedit_compile.executing.lowering import BINDINGS, InductorGraph, lower, lower_plain, symbol_of, valid_rows
from fisedit_compile.operators import OPERATORS
from fisedit_compile.operators.choosing import lowered as lowered_operator
from fisedit_compile.passes import GraphInput
from fisedit_compile.private.inductor import compile_with_inductor
from fisedit_compile.runtime import Domain, PlanInput, Stencil
from support.tolerances import assert_identical, assert_near

aten, operators = torch.ops.aten, torch.ops.fisedit
BATCH, CHANNELS, DOMAIN = 2, 6, Domain(5, 7)
COARSE = Domain(3, 4)
WINDOW = Stencil.of("window", DOMAIN, COARSE, kernel_height=3, kernel_width=3)

#: What lowered graphs call for operators of PyTorch.
CALLED = BINDINGS | {
    overload: lowered_operator(operator) for overload, operator in OPERATORS.items() if overload.namespace == "aten"
}
ARGUMENTS: dict[Any, tuple[Any, ...]] = {
    aten.add.Tensor: ("x", "x"),
    aten.cat.default: (["x", "x"], 1),
    aten.conv2d.default: ("x", "kernel", "bias", [2, 1], [1, 1], [1, 1], 1),
    aten.div.Tensor: ("x", 3.0),
    aten.gelu.default: ("x",),
    aten.group_norm.default: ("x", 3, "bias", "bias", 1e-3),
    aten.layer_norm.default: ("x", [5], "row", "row", 1e-3),
    aten.linear.default: ("x", "matrix"),
    aten.mul.Tensor: ("x", 0.5),
    aten.permute.default: ("x", [0, 2, 3, 1]),
    aten.reshape.default: ("x", [2, -1]),
    aten.scaled_dot_product_attention.default: ("x", "x", "x", None, 0.0, False),
    aten.silu.default: ("x",),
    aten.split.Tensor: ("x", 2, 1),
    aten.sub.Tensor: ("x", "x"),
    aten.transpose.int: ("x", 1, 2),
    aten.unsqueeze.default: ("x", -1),
}
KEYWORDS: dict[Any, dict[str, Any]] = {
    aten.add.Tensor: {"alpha": 2},
    aten.div.Tensor: {"rounding_mode": "floor"},
    aten.gelu.default: {"approximate": "tanh"},
    aten.scaled_dot_product_attention.default: {"scale": 0.3},
}


def values() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 6, 4, 5), "kernel": (3, 6, 3, 3), "bias": (6,), "row": (5,), "matrix": (7, 5)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("target", sorted(CALLED, key=str), ids=str)
@pytest.mark.parametrize("keywords", [False, True])
def test_bindings_are_the_operators_they_stand_for(target: Any, keywords: bool) -> None:
    given = {**values(), "bias": values()["bias"][:3]} if target is aten.conv2d.default else values()
    named = KEYWORDS.get(target, {}) if keywords else {}
    if target is aten.div.Tensor:
        target = aten.div.Tensor_mode if named else target
    arguments = fx.node.map_aggregate(ARGUMENTS[aten.div.Tensor if "div" in str(target) else target], given_or(given))
    binding = CALLED.get(target, torch.div)
    expected, got = target(*arguments, **named), binding(*arguments, **named)
    if isinstance(expected, Tensor):
        expected, got = [expected], [got]
    for wanted, result in zip(expected, got, strict=True):
        assert_identical(result, wanted, str(target))


def given_or(given: dict[str, Tensor]) -> Any:
    """Replaces names by tensors."""
    return lambda value: given[value] if isinstance(value, str) else value


def rows_graph() -> tuple[fx.GraphModule, tuple[GraphInput, ...]]:
    """A bit of everything: gather, a convolution over rows and halo, self-attention, scatter."""
    graph = fx.Graph()
    names = ("x", "recorded", "index", "valid", "halo", "table", "weight")
    x, recorded, index, valid, halo, table, weight = (graph.placeholder(name) for name in names)
    rows = graph.call_function(operators.gather_rows.default, (x, index))
    rows = graph.call_function(aten.silu.default, (rows,))
    convolved = graph.call_function(operators.conv_rows.default, (rows, recorded, halo, table, weight, None, 1))
    heads = graph.call_function(aten.unflatten.int, (rows, -1, [2, 3]))
    maps = graph.call_function(aten.unflatten.int, (recorded, -1, [2, 3]))
    attended = graph.call_function(
        operators.attention_rows.default, (heads, heads, heads, maps, maps, index, valid, None)
    )
    flat = graph.call_function(aten.flatten.using_ints, (attended, 2, 3))
    total = graph.call_function(aten.add.Tensor, (flat, rows))
    written = graph.call_function(operators.scatter_rows.default, (recorded, total, index, valid))
    graph.output((written, convolved))
    sources = (
        GraphInput("argument", 0),
        GraphInput("recorded", "x"),
        GraphInput("plan", PlanInput("index", DOMAIN)),
        GraphInput("plan", PlanInput("valid", DOMAIN)),
        GraphInput("plan", PlanInput("halo", WINDOW)),
        GraphInput("plan", PlanInput("table", WINDOW)),
        GraphInput("hoisted", 0),
    )
    return fx.GraphModule(torch.nn.Module(), graph), sources


def rows_inputs(rows: int, halo: int, targets: int, samples: int = 1, seed: int = 0) -> tuple[Tensor, ...]:
    """Inputs of ``rows_graph`` for any number of rows, halo positions and target rows."""
    generator = torch.Generator().manual_seed(seed)

    def positions(count: int) -> Tensor:
        drawn = [torch.randperm(DOMAIN.size, generator=generator)[:count] for _ in range(samples)]
        return torch.stack(drawn)

    valid = torch.rand(samples, rows, generator=generator) < 0.7
    table = torch.randint(rows + halo + 1, (samples, targets, 9), generator=generator)
    x, recorded = (torch.randn(BATCH, DOMAIN.size, CHANNELS, generator=generator) for _ in range(2))
    weight = torch.randn(4, 9 * CHANNELS, generator=generator)
    return x, recorded, positions(rows), valid, positions(halo), table, weight


def interpreted(graph_module: fx.GraphModule, inputs: tuple[Any, ...]) -> Any:
    with torch.no_grad():
        return fx.Interpreter(graph_module).run(*inputs)


def test_plain_code_calls_the_implementations_directly() -> None:
    graph_module, _ = rows_graph()
    before = graph_module.code
    lowered = lower_plain(graph_module)
    inputs = rows_inputs(5, 6, 4)
    results = lowered(*inputs)
    for got, wanted in zip(results, interpreted(graph_module, inputs), strict=True):
        assert_identical(got, wanted, "plain")
    assert graph_module.code == before, "the program's graph is left alone"
    targets = {node.target for node in lowered.__self__.graph.nodes}  # type: ignore[attr-defined]
    assert not targets & (set(OPERATORS) | set(BINDINGS))
    assert set(BINDINGS.values()) & targets
    names = {target.__name__ for target in targets if not isinstance(target, str)}
    assert names >= {"gather_rows", "conv_rows", "attention_rows", "scatter_rows"}


def test_plain_code_keeps_constants_and_optional_inputs() -> None:
    root = torch.nn.Module()
    root.register_buffer("constant", torch.tensor([1.0, 2.0]))
    graph = fx.Graph()
    x, nothing = graph.placeholder("x"), graph.placeholder("nothing")
    total = graph.call_function(aten.add.Tensor, (x, graph.get_attr("constant")))
    graph.output((total, nothing, None))
    lowered = lower_plain(fx.GraphModule(root, graph))
    total_value, *others = lowered(torch.zeros(2), None)
    assert total_value.tolist() == [1.0, 2.0]
    assert others == [None, None]


def test_plain_code_frees_intermediates_after_their_last_use() -> None:
    alive: list[int] = []
    references: list[weakref.ref[Tensor]] = []

    def observed(x: Tensor) -> Tensor:
        result = x + 1
        alive.append(sum(reference() is not None for reference in references))
        references.append(weakref.ref(result))
        return result

    graph = fx.Graph()
    value = graph.placeholder("x")
    for _ in range(6):
        value = graph.call_function(observed, (value,))
    graph.output((value,))
    lower_plain(fx.GraphModule(torch.nn.Module(), graph))(torch.zeros(3))
    assert max(alive) <= 1


def test_symbols_are_shared_by_what_counts_the_same() -> None:
    assert symbol_of(PlanInput("index", COARSE)) == symbol_of(PlanInput("table", WINDOW))
    assert symbol_of(PlanInput("index", DOMAIN)) == symbol_of(PlanInput("valid", DOMAIN))
    assert len({symbol_of(PlanInput(kind, WINDOW)) for kind in ("halo", "table")}) == 2
    assert symbol_of(PlanInput("halo", WINDOW)) != symbol_of(PlanInput("index", DOMAIN))


def test_valid_rows() -> None:
    valid = valid_rows(torch.zeros(2, 5, dtype=torch.int64))
    assert valid.dtype == torch.bool and valid.shape == (2, 5) and valid.all()


def test_inductor_compiles_once_for_all_masks() -> None:
    graph_module, sources = rows_graph()
    lowered = lower(graph_module, "inductor", sources)
    assert isinstance(lowered, InductorGraph)
    assert lowered.compilations == 0, "nothing is compiled before the first call"
    for seed, sizes in enumerate([(5, 6, 4), (2, 2, 2), (35, 2, 12), (20, 13, 9), (3, 35, 2), (4, 4, 4), (7, 7, 7)]):
        inputs = rows_inputs(*sizes, seed=seed)
        recorded = inputs[1].clone()
        with torch.no_grad():
            results = lowered(*inputs)
        for got, wanted in zip(results, interpreted(graph_module, inputs), strict=True):
            assert_near(got, wanted, f"sizes {sizes}")
        assert_identical(inputs[1], recorded, "attention undoes what it writes")
    assert lowered.compilations == 1
    inputs = rows_inputs(6, 5, 3, samples=BATCH)
    for got, wanted in zip(lowered(*inputs), interpreted(graph_module, inputs), strict=True):
        assert_near(got, wanted, "a mask for each sample")
    lowered(*rows_inputs(9, 8, 7, samples=BATCH))
    assert lowered.compilations == 2


def test_inductor_compiles_again_where_its_code_does_not_hold() -> None:
    """A slice of a symbolic size holds for sizes on one side of its end only."""
    graph = fx.Graph()
    x, index = graph.placeholder("x"), graph.placeholder("index")
    rows = graph.call_function(operators.gather_rows.default, (x, index))
    graph.output((graph.call_function(aten.slice.Tensor, (rows, 1, 0, 8)),))
    graph_module = fx.GraphModule(torch.nn.Module(), graph)
    sources = (GraphInput("argument", 0), GraphInput("plan", PlanInput("index", DOMAIN)))
    lowered = lower(graph_module, "inductor", sources)
    assert isinstance(lowered, InductorGraph)
    for rows_count in (12, 20, 5, 3, 30):  # inductor's cache knows the first code when it is asked for the second
        inputs = rows_inputs(rows_count, 2, 2)[0:3:2]
        (got,), (wanted,) = lowered(*inputs), interpreted(graph_module, inputs)
        assert_identical(got, wanted, f"{rows_count} rows")
    assert lowered.compilations <= 2


def test_sizes_that_compiled_code_does_not_hold_for_are_recognised() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(aten.reshape.default, (x, [2, 3, -1])),))
    graph_module = fx.GraphModule(torch.nn.Module(), graph)
    run, holds = compile_with_inductor(graph_module, [torch.zeros(1, 12)], {0: {1: "N"}})
    assert run({"N": 18}, torch.zeros(1, 18))[0].shape == (2, 3, 3)
    assert holds({"N": 12}) and holds({"N": 18})
    assert not holds({"N": 13})


def test_graphs_without_mask_inputs_are_static_in_inductor() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(aten.silu.default, (x,)),))
    lowered = lower(fx.GraphModule(torch.nn.Module(), graph), "inductor")
    x_value = torch.randn(3, 4)
    assert_near(lowered(x_value)[0], torch.nn.functional.silu(x_value))
