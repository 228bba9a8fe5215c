"""Moving rows, and attention over updated keys and values, against the plain reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fisedit_compile.operators.attention import triton as attention
from fisedit_compile.operators.attention.spec import AttentionRows
from fisedit_compile.operators.convolution.spec import GatherTaps
from fisedit_compile.operators.rows import triton as rows
from fisedit_compile.operators.rows.spec import GatherRows, ScatterRows
from fisedit_compile.operators.triton import naive
from support.kernel_cases import DTYPES, conv_tensors, flags, normal, positions
from support.tolerances import assert_identical, assert_near

pytestmark = pytest.mark.usefixtures("kernels_run")

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda map: map,
    "channels first": lambda map: map.transpose(1, 2).contiguous().transpose(1, 2),
    "a slice": lambda map: torch.cat((map, map), 2)[:, :, 1 : 1 + map.shape[2]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@given(
    batch=st.integers(1, 3),
    own=st.booleans(),
    count=st.sampled_from([1, 2, 7, 33]),
    channels=st.sampled_from([1, 3, 20, 64, 700]),
    dtype=st.sampled_from(DTYPES),
)
def test_gathering(layout: str, batch: int, own: bool, count: int, channels: int, dtype: torch.dtype) -> None:
    map = LAYOUTS[layout](normal(batch, count + 4, channels, dtype=dtype))
    index = positions(batch if own else 1, count, count + 4)
    assert rows.supports_gather(GatherRows(map, index)) is None
    result = rows.gather_rows(map, index)
    assert result.is_contiguous()
    assert_identical(result, naive.gather_rows(map, index))


@pytest.mark.parametrize("inner", [(12,), (3, 4)])
@given(
    own=st.booleans(),
    padded=st.booleans(),
    count=st.sampled_from([1, 2, 9]),
    dtypes=st.sampled_from([(torch.float32, torch.float32), (torch.float32, torch.float16)]),
)
def test_scattering(inner: tuple[int, ...], own: bool, padded: bool, count: int, dtypes: tuple) -> None:
    samples = 2 if own else 1
    map, new = normal(2, 11, *inner, dtype=dtypes[0]), normal(2, count, *inner, dtype=dtypes[1], seed=1)
    index, valid = positions(samples, count, 11), flags(samples, count) if padded else None
    assert rows.supports_scatter(ScatterRows(map, new, index, valid)) is None
    before = map.clone()
    assert_identical(rows.scatter_rows(map, new, index, valid), naive.scatter_rows(map, new, index, valid))
    assert_identical(map, before)


@pytest.mark.parametrize("fill", [0.0, float("-inf"), 2.5])
@given(own=st.booleans(), count=st.sampled_from([1, 7]), dtype=st.sampled_from(DTYPES), inputs=st.sampled_from([1, 20]))
def test_gathering_taps(fill: float, own: bool, count: int, dtype: torch.dtype, inputs: int) -> None:
    tensors = conv_tensors(samples=2 if own else 1, count=count, inputs=inputs, dtype=dtype)[:4]
    assert rows.supports_taps(GatherTaps(*tensors, fill)) is None
    assert_identical(rows.gather_taps(*tensors, fill), naive.gather_taps(*tensors, fill))


def test_taps_of_rows_in_another_type_than_the_recording() -> None:
    tensors = conv_tensors(dtype=torch.float32, recorded_dtype=torch.float16)[:4]
    assert_identical(rows.gather_taps(*tensors, 0.0), naive.gather_taps(*tensors, 0.0))


def test_taps_with_more_channel_dimensions() -> None:
    new, recorded, halo, table = conv_tensors(inputs=12)[:4]
    result = rows.gather_taps(new.unflatten(2, (3, 4)), recorded.unflatten(2, (3, 4)), halo, table, 0.0)
    assert_identical(result, naive.gather_taps(new, recorded, halo, table, 0.0).unflatten(3, (3, 4)))


@given(own=st.booleans(), padded=st.booleans(), dtype=st.sampled_from(DTYPES[:2]), value_width=st.sampled_from([4, 6]))
def test_attention_puts_keys_and_values_back(own: bool, padded: bool, dtype: torch.dtype, value_width: int) -> None:
    samples = 2 if own else 1
    query, key = normal(2, 5, 2, 4, dtype=dtype), normal(2, 5, 2, 4, dtype=dtype, seed=1)
    value = normal(2, 5, 2, value_width, dtype=dtype, seed=2)
    recorded_key = normal(2, 9, 2, 4, dtype=dtype, seed=3)
    recorded_value = normal(2, 9, 2, value_width, dtype=dtype, seed=4)
    index, valid = positions(samples, 5, 9), flags(samples, 5) if padded else None
    before = recorded_key.clone(), recorded_value.clone()
    arguments = AttentionRows(query, key, value, recorded_key, recorded_value, index, valid, 0.3)
    assert attention.supports_attention(arguments) is None
    result = attention.attention_rows(arguments)
    assert_near(result, naive.attention_rows(*arguments).to(dtype))
    assert_identical(recorded_key, before[0])
    assert_identical(recorded_value, before[1])


def test_attention_puts_back_also_when_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded_key, recorded_value = normal(1, 9, 2, 4), normal(1, 9, 2, 4, seed=1)
    before = recorded_key.clone(), recorded_value.clone()
    query = normal(1, 5, 2, 4, seed=2)

    def fail(query: Tensor, keys: Tensor, *_: object, **__: object) -> Tensor:
        assert not torch.equal(keys.transpose(1, 2), before[0])
        raise MemoryError

    monkeypatch.setattr(attention.functional, "scaled_dot_product_attention", fail)
    index = positions(1, 5, 9)
    given = AttentionRows(query, query, query, recorded_key, recorded_value, index, None, None)
    with pytest.raises(MemoryError):
        attention.attention_rows(given)
    assert_identical(recorded_key, before[0])
    assert_identical(recorded_value, before[1])


def test_what_is_left_to_aten() -> None:
    map, new, index = normal(2, 9, 6), normal(2, 4, 6), positions(1, 4, 9)
    assert rows.supports_write(map, new, index, None) is None
    assert "dtype" in (rows.supports_write(map.double(), new.double(), index, None) or "")
    assert "two dtypes" in (rows.supports_write(map, new.half(), index, None) or "")
    assert "share memory" in (rows.supports_write(map[:1].expand(2, -1, -1), new, index, None) or "")
    assert "side by side" in (rows.supports_write(LAYOUTS["channels first"](map), new, index, None) or "")
    assert "empty" in (rows.supports_write(map, new[:, :0], index[:, :0], None) or "")
    for other in (map.long(), map.unflatten(2, (2, 3))):
        assert "not a map" in (rows.supports_gather(GatherRows(other, index)) or "")
    heads, recorded = new.unflatten(2, (2, 3)), map.unflatten(2, (2, 3))

    def refused(key: Tensor, value: Tensor) -> str | None:
        return attention.supports_attention(AttentionRows(heads, heads, heads, key, value, index, None, None))

    assert refused(recorded, recorded.clone()) is None
    assert "overlap" in (refused(recorded, recorded) or "")
    both = torch.stack([recorded, recorded])
    assert refused(both[0], both[1]) is None
    shifted = both.flatten()[1 : 1 + recorded.numel()].view_as(recorded)
    assert "overlap" in (refused(both[0], shifted) or "")
