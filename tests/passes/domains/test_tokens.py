"""declare_tokens: what option tokens says of the inputs is checked and noted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fisedit_compile.errors import OptionError
from fisedit_compile.options import Options
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.program import InputInfo
from fisedit_compile.passes.common.report import Report
from fisedit_compile.passes.domains.propagate_domains import find_spatial_inputs
from fisedit_compile.passes.domains.tokens import declare_tokens
from support.graphs import BATCH_SIZE, CHANNELS, DOMAIN, GraphBuilder, layout

OPTION = (("x", ((3, 7), (DOMAIN.height, DOMAIN.width))), ("absent", ((2, 2),)))


def declared(built: GraphBuilder, tokens: tuple[Any, ...] = OPTION) -> tuple[InputInfo, ...]:
    """The descriptions of the inputs behind the pass."""
    compilation = Compilation(built.module(), tuple(built.infos), Options(tokens=tokens))
    declare_tokens(compilation)
    return compilation.inputs


def builder() -> GraphBuilder:
    found = GraphBuilder()
    found.input(BATCH_SIZE, DOMAIN.size, CHANNELS)
    found.input(BATCH_SIZE, 7, CHANNELS, name="prompt")
    return found


def test_the_resolution_with_as_many_positions_is_noted() -> None:
    built = builder()
    infos = declared(built)
    assert [(info.name, info.tokens) for info in infos] == [("x", DOMAIN), ("prompt", None)]
    report = Report()
    (found,) = find_spatial_inputs(built.graph, infos, report)
    assert found.name == "x" and found.meta["spatial"] == layout("bsc")
    assert not report.misses


def test_nothing_is_noted_without_the_option() -> None:
    built = builder()
    assert declared(built, ()) == tuple(built.infos)
    assert find_spatial_inputs(built.graph, built.infos, Report()) == []


def test_another_batch_is_not_that_of_the_first_picture() -> None:
    built = builder()
    built.input(1, DOMAIN.size, CHANNELS, name="other")
    option = (*OPTION, ("other", ((DOMAIN.height, DOMAIN.width),)))
    report = Report()
    (found,) = find_spatial_inputs(built.graph, declared(built, option), report)
    assert found.name == "x" and [miss.reason for miss in report.misses] == ["its batch is 1, not 2"]


@pytest.mark.parametrize(
    ("shape", "dtype", "came"),
    [
        ((2, 20), torch.float32, r"\[2, 20\] of torch.float32"),
        ((2, 6, 5, 4), torch.float32, r"\[2, 6, 5, 4\] of torch.float32"),
        ((2, 20, 6), torch.int64, r"\[2, 20, 6\] of torch.int64"),
    ],
)
def test_condition_1(shape: tuple[int, ...], dtype: torch.dtype, came: str) -> None:
    built = GraphBuilder()
    built.input(*shape, dtype=dtype)
    with pytest.raises(OptionError, match=rf"x, which must be a floating tensor \[B, tokens, C\]; it is {came}"):
        declared(built)


def test_a_number_is_no_picture() -> None:
    built = GraphBuilder()
    built.number(3.0, "x")
    with pytest.raises(OptionError, match="it is float"):
        declared(built)


def test_a_parameter_of_that_name_is_left_alone() -> None:
    built = GraphBuilder()
    built.parameter(4, name="x")
    assert declared(built)[0].tokens is None


def test_condition_2() -> None:
    built = GraphBuilder()
    built.input(2, 33, 6)
    message = r"x came with 33 tokens, but option tokens gives it 3x7 \(21 tokens\), 5x4 \(20 tokens\)"
    with pytest.raises(OptionError, match=message):
        declared(built)
