"""literals: the code of a graph computes what an interpreter of the graph does."""

from __future__ import annotations

import math
import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fisedit_compile.passes.common.literals import IN_PLACE, spell_literals
from support.tolerances import assert_identical

EXPONENTS = torch.tensor([0.0, 1.0, 2.0, 3.0])
NUMBERS = [-1, -2, -1.5, -0.0, -math.inf, 2, complex(-1.0, -0.0), complex(0.0, -2.0), complex(-math.inf, 1.0)]


def module_of(*calls: Any) -> fx.GraphModule:
    """A graph of one input: each call is (kind, target, arguments); "x" is the input, an int n in brackets call n."""
    graph = fx.Graph()
    nodes = [graph.placeholder("x")]
    for kind, target, *arguments in calls:
        given = [nodes[0] if value == "x" else nodes[value[0]] if isinstance(value, list) else value
                 for value in arguments]  # fmt: skip
        nodes.append(graph.create_node(kind, target, tuple(given)))
    graph.output(tuple(nodes[1:]))
    return fx.GraphModule(nn.Module(), graph)


def assert_code_is_graph(module: fx.GraphModule, given: Any) -> None:
    wanted = fx.Interpreter(module).run(given)
    spell_literals(module)
    for results in (module(given), fx.Interpreter(module).run(given), spell_literals(module)(given)):
        for value, expected in zip(results, wanted, strict=True):
            if isinstance(expected, Tensor) and expected.is_complex():
                value, expected = torch.view_as_real(value), torch.view_as_real(expected)
            if isinstance(expected, Tensor):
                assert_identical(value, expected)
                assert torch.equal(value.signbit(), expected.signbit())
            else:
                assert repr(value) == repr(expected)


@pytest.mark.parametrize("number", NUMBERS, ids=str)
def test_a_power_of_a_number(number: complex) -> None:
    assert_code_is_graph(module_of(("call_function", operator.pow, number, "x")), EXPONENTS)


@pytest.mark.parametrize("function", [torch.add, torch.mul, operator.add, operator.truediv])
@pytest.mark.parametrize("number", NUMBERS, ids=str)
def test_a_number_among_the_arguments(number: complex, function: Any) -> None:
    assert_code_is_graph(module_of(("call_function", function, "x", number)), EXPONENTS)


def test_complex_numbers_within_lists() -> None:
    module = module_of(("call_function", torch.tensor, (complex(-0.0, -2.0), complex(1.0, math.inf))))
    assert_code_is_graph(module, EXPONENTS)


def test_methods_and_attributes_of_numbers() -> None:
    module = module_of(
        ("call_method", "__rpow__", -1.5, "x"),
        ("call_method", "is_integer", -1.0),
        ("call_function", getattr, -2.0, "real"),
        ("call_function", getattr, complex(-1.0, -0.0), "imag"),
    )
    assert_code_is_graph(module, 2)


@pytest.mark.parametrize(
    "function",
    [function for function in IN_PLACE if function is not operator.imatmul],
    ids=lambda function: function.__name__,
)
def test_what_cannot_be_changed_in_place_keeps_its_value_for_later_readers(function: Any) -> None:
    assert_code_is_graph(module_of(("call_function", function, "x", 2), ("call_function", operator.mul, "x", 1)), 7)


def test_tensors_are_changed_in_place_as_before() -> None:
    module = module_of(("call_function", operator.iadd, "x", 1))
    next(iter(module.graph.nodes)).meta["example_value"] = EXPONENTS
    before = module.code
    given = EXPONENTS.clone()
    assert_identical(spell_literals(module)(given)[0], EXPONENTS + 1)
    assert_identical(given, EXPONENTS + 1)
    assert module.code == before


def test_graphs_within_the_graph() -> None:
    inner = module_of(("call_function", operator.pow, -1, "x"))
    graph = fx.Graph()
    root = nn.Module()
    root.branch = inner
    x, branch = graph.placeholder("x"), graph.get_attr("branch")
    graph.output(graph.call_function(lambda value, body: body(value), (x, branch)))
    (result,) = spell_literals(fx.GraphModule(root, graph))(EXPONENTS)
    assert_identical(result, torch.tensor([1.0, -1.0, 1.0, -1.0]))


def test_other_graphs_keep_their_code() -> None:
    module = module_of(("call_function", operator.pow, "x", -1), ("call_function", operator.mod, -3, "x"))
    before = module.code
    assert spell_literals(module).code == before
