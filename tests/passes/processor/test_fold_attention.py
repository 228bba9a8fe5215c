"""fold_attention: attention within windows, of whole maps, has four dimensions and the same result."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.report import Report
from fisedit_compile.passes.processor.fold_attention import fold_attention
from support.graphs import GraphBuilder, aten, outputs, spell
from support.tolerances import assert_near

SDPA = aten.scaled_dot_product_attention.default
SHAPE = (2, 6, 3, 5, 4)


@pytest.mark.parametrize("mask", [None, (3, 5, 5), (1, 1, 3, 5, 5), (6, 1, 5, 5), (2, 6, 3, 5, 5)])
def test_samples_and_windows_are_one_dimension(mask: tuple[int, ...] | None) -> None:
    builder = GraphBuilder()
    shapes = [SHAPE] * 3 + ([] if mask is None else [mask])
    inputs = [builder.input(*shape, name=f"x{number}") for number, shape in enumerate(shapes)]
    module, report = builder.module(builder.call(SDPA, *inputs, scale=0.5)), Report()
    fold_attention(Compilation(module, record=module, report=report))
    assert report.matches == {"fold_attention": 1}
    (attention,) = [node for node in module.graph.nodes if node.target is SDPA]
    assert [value.meta["val"].dim() for value in attention.all_input_nodes] == [4] * len(shapes)
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    expected = functional.scaled_dot_product_attention(*values, scale=0.5)
    assert_near(module(*values)[0], expected, "folded")
    again = Report()
    fold_attention(Compilation(module, record=module, report=again))
    assert again.matches == {}


@pytest.mark.parametrize("shapes", [((2, 3, 5, 4),) * 3, (SHAPE, (2, 1, 3, 5, 4), (2, 1, 3, 5, 4))])
def test_condition_1(shapes: tuple[tuple[int, ...], ...]) -> None:
    builder = GraphBuilder()
    inputs = [builder.input(*shape, name=f"x{number}") for number, shape in enumerate(shapes)]
    module, report = builder.module(builder.call(SDPA, *inputs)), Report()
    fold_attention(Compilation(module, record=module, report=report))
    assert report.matches == {} and spell(outputs(module)[0])[1:4] == ("x0", "x1", "x2")
