"""Statistics and the norm itself against the plain reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisedit_compile.operators.group_norm import triton as norm
from fisedit_compile.operators.group_norm.spec import NormApply, NormPartials
from fisedit_compile.operators.triton import naive
from support.kernel_cases import DTYPES, flags, normal, positions
from support.tolerances import assert_near

pytestmark = pytest.mark.usefixtures("kernels_run")

SIZES = {
    "count": st.sampled_from([1, 2, 7, 17, 33]),
    "groups": st.sampled_from([1, 2, 5, 32]),
    "width": st.sampled_from([1, 4, 10, 33]),
    "seed": st.integers(0, 99),
}


def statistics(batch: int, groups: int, size: int, seed: int):
    """Center [B, G], totals [B, 2, G] and recorded partials [B, S, 2, G]."""
    squares = normal(batch, 2, groups, seed=seed).abs() * 50
    return normal(batch, groups, seed=seed + 1), squares, normal(batch, size, 2, groups, seed=seed + 2)


@given(batch=st.integers(1, 3), dtype=st.sampled_from(DTYPES), **SIZES)
def test_sums_of_rows(batch: int, count: int, groups: int, width: int, seed: int, dtype: torch.dtype) -> None:
    rows = normal(batch, count, groups * width, dtype=dtype, seed=seed)
    center = normal(batch, groups, seed=seed)
    result = norm.norm_partials(rows, center)
    assert_near(result, naive.norm_partials(rows, center))


@given(batch=st.integers(1, 3), own=st.booleans(), padded=st.booleans(), kept=st.booleans(), **SIZES)
def test_totals_in_one_pass(
    batch: int, own: bool, padded: bool, kept: bool, count: int, groups: int, width: int, seed: int
) -> None:
    """Each sample may have positions and padding of its own; padding rows are NaN."""
    samples, size = batch if own else 1, count + 3
    rows, index = normal(batch, count, groups * width, seed=seed), positions(samples, count, size, seed)
    valid = flags(samples, count, seed) if padded else None
    center, totals, recorded = statistics(batch, groups, size, seed)
    expected = naive.norm_totals(totals, recorded, naive.norm_partials(rows, center), index, valid)
    if valid is not None:
        rows = rows.masked_fill(~valid.expand(batch, -1)[..., None], torch.nan)
    before = totals.clone()
    result, partials = norm.norm_update(rows, center, totals, recorded, index, valid, kept)
    assert_near(result, expected)
    assert torch.equal(totals, before) and (partials is not None) == kept
    if partials is not None:
        wanted = naive.norm_partials(rows, center)
        assert torch.equal(partials.isnan(), wanted.isnan())
        assert_near(partials.nan_to_num(), wanted.nan_to_num())


def test_totals_of_a_slice_of_a_larger_recording() -> None:
    center, totals, recorded = statistics(2, 4, 9, 0)
    wide = normal(2, 9, 4, 4)
    wide[:, :, ::2] = recorded
    rows, index = normal(2, 6, 24), positions(1, 6, 9)
    result, _ = norm.norm_update(rows, center, totals, wide[:, :, ::2], index, None)
    assert_near(result, naive.norm_totals(totals, recorded, naive.norm_partials(rows, center), index, None))


@given(
    batch=st.integers(1, 3),
    affine=st.sampled_from(["none", "weight", "bias", "both"]),
    silu=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    **SIZES,
)
def test_norm(
    batch: int, affine: str, silu: bool, dtype: torch.dtype, count: int, groups: int, width: int, seed: int
) -> None:
    channels = groups * width
    rows = normal(batch, count, channels, dtype=dtype, seed=seed)
    center, totals, _ = statistics(batch, groups, 1, seed)
    weight = normal(channels, dtype=dtype, seed=1) if affine in ("weight", "both") else None
    bias = normal(channels, dtype=dtype, seed=2) if affine in ("bias", "both") else None
    result = norm.norm_apply(rows, center, totals, weight, bias, 1e-5, 40, silu)
    expected = naive.norm_apply(rows, center, totals, weight, bias, 1e-5, 40, "silu" if silu else "none")
    assert result.is_contiguous()
    assert_near(result, expected.to(dtype))


def test_negative_variance_by_rounding_is_none() -> None:
    rows, center = normal(1, 3, 8), normal(1, 2)
    totals = torch.stack((torch.full((1, 2), 4.0), torch.full((1, 2), 0.5)), 1).to(rows.device)
    result = norm.norm_apply(rows, center, totals, None, None, 1e-2, 4)
    assert_near(result, naive.norm_apply(rows, center, totals, None, None, 1e-2, 4))


def test_what_is_left_to_aten() -> None:
    rows, center = normal(2, 4, 8), normal(2, 2)
    totals, recorded = normal(2, 2, 2), normal(2, 9, 2, 2)
    index = positions(1, 4, 9)
    assert norm.supports_partials(NormPartials(rows, center)) is None
    gaps = rows.transpose(0, 1).transpose(1, 2).contiguous().transpose(1, 2)
    for other in (rows.double(), gaps, rows[:, :0]):
        assert "no rows" in (norm.supports_partials(NormPartials(other, center)) or "")
    assert "channels" in (norm.supports_partials(NormPartials(normal(1, 1, 4096), normal(1, 1))) or "")
    assert norm.supports_update(rows, center, totals, recorded, index, None)
    assert not norm.supports_update(rows, center, totals, recorded.double(), index, None)
    given = NormApply(rows, center, totals, None, normal(8), 1e-5, 9)
    assert norm.supports_apply(given) is None
    assert "bias" in (norm.supports_apply(given._replace(bias=normal(8).double())) or "")
