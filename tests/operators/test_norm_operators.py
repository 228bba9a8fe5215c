"""Group norm of rows against torch's group norm of the mixed map."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from fisedit_compile.operators import norm_apply, norm_partials, norm_record, norm_totals
from fisedit_compile.operators.group_norm import native
from fisedit_compile.operators.group_norm.spec import NormApply, NormPartials, NormTotals
from fisedit_compile.runtime.spec import Domain
from support.sparse_maps import Case, masks, take, window
from support.tolerances import assert_near

EPS = 1e-5


@pytest.fixture(autouse=True, params=["compiled", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Everything holds with compiled code and without."""
    if request.param == "plain":
        monkeypatch.setattr(native, "_library", lambda dtype: None)
    elif native._library(torch.float32) is None:
        pytest.skip("nothing is compiled on this machine")
    return request.param


def normalise(
    rows: Tensor, recorded: Tensor, groups: int, index: Tensor, valid: Tensor | None, affine: tuple
) -> Tensor:
    """The whole chain, as a compiled edit runs it."""
    center, partials, totals = norm_record(recorded, groups)
    totals = norm_totals(totals, partials, norm_partials(rows, center), index, valid)
    return norm_apply(rows, center, totals, *affine, EPS, recorded.shape[1] * recorded.shape[2] // groups)


def check(case: Case, groups: int, affine: tuple, dtype: torch.dtype = torch.float32) -> None:
    rows, recorded, mixed = case.rows.to(dtype), case.recorded.to(dtype), case.mixed.to(dtype)
    index, valid = case.source("index"), case.source("valid")
    result = normalise(rows, recorded, groups, index, valid, affine)
    weight, bias = (None if tensor is None else tensor.double() for tensor in affine)
    expected = functional.group_norm(mixed.double().transpose(1, 2), groups, weight, bias, EPS).transpose(1, 2)
    expected = take(expected, index)
    assert result.dtype == dtype and result.is_contiguous()
    if valid is not None:
        valid = valid.expand(rows.shape[0], -1)
        result, expected = result[valid], expected[valid]
    assert_near(result, expected.to(dtype))


@pytest.mark.parametrize(("channels", "groups"), [(6, 3), (4, 1), (5, 5), (60, 20)])
@given(data=st.data())
def test_equals_group_norm_of_the_mixed_map(data: st.DataObject, channels: int, groups: int) -> None:
    domain = Domain(data.draw(st.integers(2, 7)), data.draw(st.integers(1, 7)))
    batch = data.draw(st.integers(1, 3))
    case = Case.build(data.draw(masks(domain, batch)), window(domain), batch, channels)
    affine = data.draw(st.sampled_from([(None, None), (torch.randn(channels), torch.randn(channels))]))
    check(case, groups, affine)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("affine_dtype", [torch.float32, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, affine_dtype: torch.dtype) -> None:
    mask = torch.rand(2, 6, 5) < 0.3
    case = Case.build(mask, window(Domain(6, 5)), 2, 8)
    check(case, 2, (torch.randn(8, dtype=affine_dtype), torch.randn(8, dtype=affine_dtype)), dtype)


def test_a_mean_far_from_zero() -> None:
    """Sums of x and x**2 would lose the variance here; sums around the recorded mean keep it."""
    mask = torch.rand(1, 16, 16) < 0.3
    case = Case.build(mask, window(Domain(16, 16)), 2, 8)
    for tensor in (case.recorded, case.mixed, case.rows):
        tensor += 1000.0
    index = case.source("index")
    result = normalise(case.rows.float(), case.recorded.float(), 2, index, case.source("valid"), (None, None))
    expected = functional.group_norm(case.mixed.transpose(1, 2), 2, eps=EPS).transpose(1, 2)
    assert (result - take(expected, index)).abs().max() < 1e-3


def test_a_bias_or_a_weight_alone() -> None:
    case = Case.build(torch.ones(1, 4, 3, dtype=torch.bool), window(Domain(4, 3)), 2, 6)
    check(case, 2, (torch.randn(6), None))
    rows, center, totals = case.rows.float(), torch.zeros(2, 2), torch.ones(2, 2, 2) * 4.0
    bias = torch.randn(6)
    plain = norm_apply(rows, center, totals, None, None, EPS, 7)
    assert_near(norm_apply(rows, center, totals, None, bias, EPS, 7), plain + bias)


@pytest.mark.parametrize("layout", ["channels first", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_recorded_statistics(layout: str, dtype: torch.dtype) -> None:
    map = torch.randn(2, 6, 20, dtype=torch.float64).to(dtype) + 3.0
    map = map.transpose(1, 2) if layout == "channels first" else map.transpose(1, 2).contiguous()
    center, partials, totals = norm_record(map, 3)
    exact = map.double().unflatten(2, (3, 2))
    mean = exact.mean((1, 3))
    assert_near(center, mean.float())
    centered = exact - center.double()[:, None, :, None]
    assert_near(partials, torch.stack([centered.sum(3), centered.square().sum(3)], 2).float())
    assert_near(totals[:, 1], centered.square().sum((1, 3)).float())
    assert totals[:, 0].abs().max() < 1e-3
    assert center.dtype == partials.dtype == totals.dtype == torch.float32
    assert partials.is_contiguous() and partials.shape == (2, 20, 2, 3)
    index = torch.tensor([[3, 7, 0]])
    assert_near(norm_partials(take(map, index), center), take(partials, index))


def test_unchanged_rows_leave_the_totals() -> None:
    map = torch.randn(3, 20, 6)
    center, partials, totals = norm_record(map, 3)
    index = torch.stack([torch.randperm(20)[:5] for _ in range(3)])
    same = norm_partials(take(map, index), center)
    assert_near(norm_totals(totals, partials, same, index, None), totals)


def test_padding_rows_do_not_count() -> None:
    map = torch.randn(2, 20, 6)
    center, partials, totals = norm_record(map, 3)
    index = torch.tensor([[1, 2, 3], [4, 5, 6]])
    valid = torch.tensor([[True, True, False], [False, False, False]])
    new = torch.randn(2, 3, 2, 3)
    result = norm_totals(totals, partials, torch.where(valid[..., None, None], new, torch.nan), index, valid)
    assert torch.equal(result[1], totals[1])
    assert_near(result[0], totals[0] + (new[0, :2] - partials[0, 1:3]).sum(0))


def test_a_constant_map_stays_finite() -> None:
    """Rounding may leave a variance below zero."""
    rows = torch.zeros(1, 2, 4)
    totals = torch.tensor([[[0.3], [0.0]]])
    assert norm_apply(rows, torch.zeros(1, 1), totals, None, None, 1e-12, 10).isfinite().all()


def test_numbers_that_are_none_are_not_hidden() -> None:
    rows = torch.randn(1, 3, 4)
    rows[0, 1, 2] = torch.nan
    sums = norm_partials(rows, torch.zeros(1, 2))
    assert sums.isnan().nonzero()[:, :2].unique(dim=0).tolist() == [[0, 1]]
    fresh = norm_totals(torch.zeros(1, 2, 2), torch.zeros(1, 5, 2, 2), sums, torch.tensor([[0, 1, 4]]), None)
    assert fresh.isnan().tolist() == [[[False, True], [False, True]]]
    result = norm_apply(rows, torch.zeros(1, 2), fresh, None, None, EPS, 10)
    assert result[..., 2:].isnan().all() and result[..., :2].isfinite().all()


def test_which_tensors_compiled_code_reads(way: str) -> None:
    rows, center, weight = torch.randn(2, 3, 8), torch.zeros(2, 4), torch.ones(8)

    def refused(rows: Tensor, center: Tensor = center, weight: Tensor | None = weight) -> str | None:
        return native.supports_apply(NormApply(rows, center, torch.zeros(2, 2, 4), weight, None, EPS, 9))

    assert (refused(rows) is None) == (way == "compiled")
    assert "dtype" in (refused(rows.double()) or "")
    assert "without gaps" in (refused(rows.transpose(0, 1)) or "")
    assert "no rows" in (refused(rows[:, :0]) or "")
    assert "float32" in (refused(rows, center.double()) or "")
    assert "weight" in (refused(rows, weight=weight.bfloat16()) or "")
    assert "host's memory" in (refused(rows.to("meta")) or "")
    assert "channels" in (native.supports_partials(NormPartials(torch.randn(1, 1, native.CHANNELS + 1), center)) or "")
    recorded_in_half = NormTotals(center, center.half(), center, torch.zeros(1, 2, dtype=torch.int64), None)
    assert "float32" in (native.supports_totals(recorded_in_half) or "")
