"""gather_rows and scatter_rows: layouts, batches of masks, padding rows, dtypes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fisedit_compile.operators import gather_rows, scatter_rows
from fisedit_compile.runtime.spec import Domain
from support.sparse_maps import Case, masks, take, window

LAYOUTS = ["contiguous", "channels first", "slice of fused", "expanded", "transposed batch"]


def laid_out(map: Tensor, layout: str) -> Tensor:
    """The values of a map [B, S, C] in another memory layout."""
    if layout == "channels first":
        return map.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "slice of fused":
        return torch.cat([torch.full_like(map, torch.nan), map, torch.full_like(map, torch.nan)], 2).chunk(3, 2)[1]
    if layout == "expanded":
        return map[:1].contiguous().expand(map.shape)
    if layout == "transposed batch":
        return map.transpose(0, 1).contiguous().transpose(0, 1)
    return map.contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [(1,), (5,), (3, 2), ()], ids=str)
@pytest.mark.parametrize("samples", [1, 3])
def test_gather_reads_any_layout(layout: str, channels: tuple[int, ...], samples: int) -> None:
    size = max(1, torch.Size(channels).numel())
    map = laid_out(torch.randn(3, 12, size), layout)
    map = map.unflatten(2, channels) if channels else map[..., 0]
    index = torch.stack([torch.randperm(12)[:7] for _ in range(samples)])
    rows = gather_rows(map, index)
    assert torch.equal(rows, take(map, index))
    assert rows.is_contiguous() and rows.dtype == map.dtype


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_scatter_writes_valid_rows_only(layout: str, dtype: torch.dtype, samples: int, padded: bool) -> None:
    map = laid_out(torch.randn(3, 12, 4), layout)
    before = map.clone()
    index = torch.stack([torch.randperm(12)[:7] for _ in range(samples)])
    valid = torch.ones(samples, 7, dtype=torch.bool)
    if padded:
        valid[:, 4:] = False
        valid[-1] = False
    rows = torch.randn(3, 7, 4, dtype=dtype)
    rows[~valid.expand(3, 7)] = torch.nan
    result = scatter_rows(map, rows, index, valid if padded else None)
    expected = before.to(dtype, copy=True).contiguous()
    for sample in range(3):
        chosen = valid[sample % samples]
        expected[sample, index[sample % samples][chosen]] = rows[sample][chosen]
    assert result.dtype == dtype
    assert torch.equal(result, expected)
    assert torch.equal(map, before), "the recorded map must not change"


@given(data=st.data())
def test_scatter_then_gather_is_the_identity(data: st.DataObject) -> None:
    domain = Domain(data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6)))
    batch = data.draw(st.integers(1, 3))
    case = Case.build(data.draw(masks(domain, batch)), window(domain), batch, 3)
    mixed = scatter_rows(case.recorded, case.rows, case.source("index"), case.source("valid"))
    assert torch.equal(mixed, case.mixed)
    # In padding rows the recorded values come back.
    assert torch.equal(gather_rows(mixed, case.source("index")), take(case.mixed, case.source("index")))
