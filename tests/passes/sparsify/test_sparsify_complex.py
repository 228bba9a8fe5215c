"""sparsify_complex: pairs of channels become complex numbers on rows, and back."""

from __future__ import annotations

import torch

from fisedit_compile.passes.sparsify.complex import FAMILY, sparsify_complex
from support.execution import check_masked
from support.graphs import GraphBuilder, aten, layout, outputs, spell
from support.sparsifying import refused, sparsify

PAIRS = torch.ops.fisedit.complex_of_pairs.default


def test_pairs_of_channels_become_numbers_on_rows() -> None:
    builder = GraphBuilder()
    node = builder.call(PAIRS, builder.input(2, 20, 3, 2, spatial="bscc"))
    module, report = sparsify(sparsify_complex, FAMILY, builder, node)
    (output,) = outputs(module)
    assert spell(output) == ("to_map", ("fisedit.complex_of_pairs", ("to_rows", "x")))
    assert output.meta["spatial"] == layout("bsc") and output.meta["val"].dtype is torch.complex64
    assert report.matches == {"sparsify_complex": 1}


def test_numbers_become_pairs_of_channels_on_rows() -> None:
    builder = GraphBuilder()
    node = builder.call(aten.view_as_real.default, builder.input(2, 3, 20, dtype=torch.complex64, spatial="bcs"))
    module, _ = sparsify(sparsify_complex, FAMILY, builder, node)
    (output,) = outputs(module)
    assert spell(output) == ("to_map", ("aten.view_as_real", ("to_rows", "x")))
    assert output.meta["spatial"] == layout("bcsc") and output.meta["val"].shape == (2, 3, 20, 2)


def test_condition_1_pairs_of_positions_stay_dense() -> None:
    builder = GraphBuilder()
    node = builder.call(PAIRS, builder.input(2, 6, 10, 2, spatial="bchw"))
    assert refused(sparsify_complex, FAMILY, builder, node) == ["the last dimension is not a channel dimension"]


def test_a_rotation_is_that_of_the_map() -> None:
    angles = torch.arange(20.0)[:, None] * torch.tensor([1.0, 0.3, 0.1])
    turns = torch.complex(angles.cos(), angles.sin())
    builder = GraphBuilder()
    tokens = builder.call(aten.transpose.int, builder.call(aten.flatten.using_ints, builder.picture(), 2), 1, 2)
    numbers = builder.call(PAIRS, builder.call(aten.reshape.default, tokens, [2, 20, 3, 2]))
    turned = builder.call(aten.mul.Tensor, numbers, builder.constant(turns))
    real = builder.call(aten.reshape.default, builder.call(aten.view_as_real.default, turned), [2, 20, 6])

    def dense(x: torch.Tensor) -> torch.Tensor:
        pairs = x.flatten(2).transpose(1, 2).unflatten(2, (3, 2)).contiguous()
        return torch.view_as_real(torch.view_as_complex(pairs) * turns).flatten(2)

    check_masked(builder, real, dense, 1, flat=True, batch=2)
