"""The convolution kernels against the plain reference: shapes, dtypes, block sizes, parts of sums, chains."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from fisedit_compile.operators import pack_conv_weight
from fisedit_compile.operators.convolution import triton as conv
from fisedit_compile.operators.convolution.spec import ConvRows
from fisedit_compile.operators.convolution.triton import ConvCall, conv_rows_fused, run_conv
from fisedit_compile.operators.triton import naive
from fisedit_compile.operators.triton import reads as reads_module
from fisedit_compile.operators.triton.blocks import ConvBlocks
from fisedit_compile.operators.triton.pointwise import CURRENT, FORMULAS, Chain, Operand, Step, add_bias, apply_chain
from fisedit_compile.operators.triton.reads import resolve_reads
from fisedit_compile.runtime.spec import Domain
from support.kernel_cases import DEVICE, FACTORS, conv_tensors, normal
from support.sparse_maps import Case, masks, window
from support.tolerances import assert_near

pytestmark = pytest.mark.usefixtures("kernels_run")

SMALL = ConvBlocks(16, 16, 16)
SPLIT = ConvBlocks(16, 16, 16, splits=3)


def convolve(tensors: tuple, blocks: ConvBlocks | None, epilogue: Chain = conv.NOTHING, operands: tuple = ()):
    rows, recorded, halo, table, weight, bias, groups = tensors
    chain, values = (epilogue, operands) if bias is None else (add_bias(epilogue), (bias, *operands))
    reads = resolve_reads(halo, table, rows.shape[1])
    return run_conv(ConvCall(rows, recorded, reads, weight, groups, epilogue=chain, operands=values), blocks)


@given(
    batch=st.integers(1, 3),
    shared=st.booleans(),
    source=st.integers(1, 9),
    halo=st.integers(1, 6),
    count=st.sampled_from([1, 2, 7, 16, 17]),
    taps=st.sampled_from([1, 4, 9]),
    inputs=st.sampled_from([1, 4, 15, 16, 20, 33]),
    outputs=st.sampled_from([1, 8, 17, 24]),
    bias=st.booleans(),
    splits=st.sampled_from([1, 1, 2, 5]),
    share=st.booleans(),
    dtype=st.sampled_from(FACTORS),
    seed=st.integers(0, 99),
)
def test_any_shape(
    batch: int, shared: bool, splits: int, share: bool, dtype: torch.dtype, seed: int, **sizes: int
) -> None:
    tensors = conv_tensors(batch, 1 if shared else batch, dtype=dtype, seed=seed, **sizes)
    result = convolve(tensors, ConvBlocks(16, 16, 16, splits=splits, share=share))
    assert result.is_contiguous()
    assert_near(result, naive.conv_rows(*tensors).to(dtype))


@pytest.mark.parametrize("dtype", FACTORS)
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("inputs", [4, 40])
def test_padding_in_every_direction(dtype: torch.dtype, splits: int, inputs: int) -> None:
    tensors = conv_tensors(2, 2, count=19, inputs=inputs, outputs=37, dtype=dtype)
    result = convolve(tensors, ConvBlocks(32, 32, 32, splits=splits))
    assert_near(result, naive.conv_rows(*tensors).to(dtype))


@pytest.mark.parametrize("blocks", [SMALL, SPLIT, replace(SMALL, share=True), replace(SPLIT, share=True)], ids=str)
@pytest.mark.parametrize(("groups", "inputs", "outputs"), [(2, 40, 34), (3, 12, 27), (4, 64, 32)])
def test_groups(groups: int, inputs: int, outputs: int, blocks: ConvBlocks) -> None:
    tensors = conv_tensors(groups=groups, inputs=inputs, outputs=outputs)
    assert_near(convolve(tensors, blocks), naive.conv_rows(*tensors))


@pytest.mark.parametrize("share", [False, True])
def test_recordings_of_another_dtype(share: bool) -> None:
    for inputs in (4, 24):
        tensors = conv_tensors(inputs=inputs, recorded_dtype=torch.float16)
        assert_near(convolve(tensors, replace(SMALL, share=share)), naive.conv_rows(*tensors))


def test_more_parts_than_steps() -> None:
    tensors = conv_tensors(inputs=16, taps=1)
    assert_near(convolve(tensors, ConvBlocks(16, 16, 16, splits=8)), naive.conv_rows(*tensors))


def test_no_rows() -> None:
    tensors = conv_tensors(count=0)
    assert convolve(tensors, None).shape == (2, 0, 24)


def test_equal_inputs_give_equal_bits() -> None:
    tensors = conv_tensors(count=19, inputs=33)
    blocks = ConvBlocks(16, 16, 16, splits=4)
    assert torch.equal(convolve(tensors, blocks), convolve(tensors, blocks))


def test_rows_and_maps_with_gaps() -> None:
    rows, recorded, *others = conv_tensors(inputs=16)
    wide_rows, wide_recorded = normal(2, 6, 40), normal(2, 30, 50)
    wide_rows[:, :, 8:24], wide_recorded[:, :, 16:32] = rows, recorded
    result = convolve((wide_rows[:, :, 8:24], wide_recorded[:, :, 16:32], *others), SMALL)
    assert_near(result, naive.conv_rows(rows, recorded, *others))


@given(data=st.data())
def test_equals_the_dense_convolution_of_the_mixed_map(data: st.DataObject) -> None:
    """With plans of real masks, where padding rows hold NaN that nothing may read."""
    domain = Domain(data.draw(st.integers(4, 7)), data.draw(st.integers(4, 7)))
    stride, dilation = data.draw(st.sampled_from([(1, 1), (2, 1), (1, 2)]))
    stencil = window(domain, stride=stride, padding=dilation, dilation=dilation)
    case = Case.build(data.draw(masks(domain, 2)), stencil, 2, 8)
    weight, bias = torch.randn(2, 10, 8, 3, 3)[0].double(), torch.randn(10).double()
    dense = functional.conv2d(case.dense_mixed(), weight, bias, stride=stride, padding=dilation, dilation=dilation)
    packed = pack_conv_weight(weight, False, 1)
    tensors = (case.rows, case.recorded.contiguous(), case.taps("halo"), case.taps("table"), packed, bias)
    moved = [tensor.to(DEVICE, torch.float32 if tensor.is_floating_point() else None) for tensor in tensors]
    result, expected = convolve((*moved, 1), SMALL).cpu(), case.target_rows(dense).float()
    valid = case.target("valid")
    kept = slice(None) if valid is None else valid.expand(2, -1)
    assert_near(result[kept], expected[kept])


CHAINS = {
    "time": Chain((Step("add", (CURRENT, Operand(0))),), ("sample",)),
    "residual": Chain((Step("add", (Operand(0), CURRENT)), Step("div", (CURRENT, 1.4142))), ("rows",)),
    "all": Chain(
        (
            Step("add", (CURRENT, Operand(0))),
            Step("silu"),
            Step("mul", (CURRENT, Operand(1))),
            Step("sub", (Operand(2), CURRENT)),
            Step("mul", (CURRENT, -0.5)),
        ),
        ("sample", "channel", "rows"),
    ),
    **{name: Chain((Step(name),)) for name, formula in FORMULAS.items() if "{1}" not in formula},
    **{name: Chain((Step(name, (1.5, CURRENT)), Step(name, (CURRENT, 0.3)))) for name in ("add", "sub", "mul", "div")},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", CHAINS)
def test_every_epilogue(name: str, splits: int, dtype: torch.dtype) -> None:
    if splits > 1 and len(CHAINS[name].steps) == 1 and name != "time":
        pytest.skip("one operator more behind the same sum of parts")
    chain = CHAINS[name]
    tensors = conv_tensors(dtype=dtype, inputs=16)
    shapes = {"channel": (24,), "sample": (2, 1, 24), "rows": (2, 7, 24)}
    operands = tuple(normal(*shapes[kind], dtype=dtype, seed=number) for number, kind in enumerate(chain.kinds))
    result = convolve(tensors, ConvBlocks(16, 16, 16, splits=splits), chain, operands)
    assert_near(result, apply_chain(chain, naive.conv_rows(*tensors), operands).to(dtype))


def test_one_embedding_for_all_samples_and_residuals_with_gaps() -> None:
    chain = Chain((Step("add", (CURRENT, Operand(0))), Step("add", (CURRENT, Operand(1)))), ("sample", "rows"))
    tensors, wide = conv_tensors(), normal(2, 7, 40)
    operands = (normal(1, 1, 24), wide[:, :, 3:27])
    expected = apply_chain(chain, naive.conv_rows(*tensors), operands)
    assert_near(convolve(tensors, SMALL, chain, operands), expected)


@pytest.mark.parametrize("inputs", [6, 16, 24])
@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_norm_and_activation_of_rows_on_their_way_in(inputs: int, activation: bool, dtype: torch.dtype) -> None:
    """Halo rows are recorded behind the norm, and taps outside the map stay zero."""
    steps = [Step("mul", (CURRENT, Operand(0))), Step("add", (CURRENT, Operand(1)))]
    chain = Chain((*steps, Step("silu")) if activation else tuple(steps), ("sample", "channel"))
    rows, *others = conv_tensors(samples=2, inputs=inputs, dtype=dtype)
    operands = (normal(2, 1, inputs), normal(inputs))
    result = conv_rows_fused(rows, *others, conv.NOTHING, (), prologue=chain, inputs=operands)
    normed = apply_chain(chain, rows.float(), operands).to(dtype)
    assert_near(result, naive.conv_rows(normed, *others).to(dtype))


def test_reads_are_resolved_once_for_a_table_and_again_when_it_changes() -> None:
    cache = reads_module.ReadsCache()
    halo, table = torch.tensor([[5, 8]]), torch.tensor([[[0, 2, 3], [4, 1, 2]]])
    reads = cache.get(halo, table, 2)
    assert reads.tolist() == [[[0, 2 + 5, 2 + 8], [-1, 1, 2 + 5]]] and reads.dtype == torch.int32
    assert cache.get(halo, table, 2) is reads
    table[0, 0, 0] = 1
    assert cache.get(halo, table, 2)[0, 0, 0] == 1
    assert cache.get(halo, table, 3).tolist() == [[[1, 2, 3 + 5], [3 + 8, 1, 2]]]
    del table, reads
    assert len(cache) == 0
    assert resolve_reads(torch.zeros(1, 0, dtype=torch.int64), torch.tensor([[[0, 1]]]), 1).tolist() == [[[0, -1]]]


def test_reads_that_somebody_captures_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a replay there is nothing in their memory; a capture of its own keeps them until it ends."""
    cache, halo, table = reads_module.ReadsCache(), torch.tensor([[5, 8]]), torch.tensor([[[0, 2, 3]]])
    monkeypatch.setattr(reads_module, "captured", lambda tensor: True)
    assert cache.get(halo, table, 2) is not cache.get(halo, table, 2) and len(cache) == 0
    with cache.fresh():
        assert cache.get(halo, table, 2) is cache.get(halo, table, 2)
    monkeypatch.undo()
    assert cache.get(halo, table, 2) is cache.get(halo, table, 2)


def test_biases_with_gaps_are_left_to_aten() -> None:
    *others, bias, groups = conv_tensors()
    wide = torch.stack((bias, bias), 1)[:, 0]
    assert conv.supports_conv(ConvRows(*others, bias, groups)) is None
    assert "bias" in (conv.supports_conv(ConvRows(*others, wide, groups)) or "")
