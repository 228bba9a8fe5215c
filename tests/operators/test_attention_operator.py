"""attention_rows against dense attention on mixed keys and values, and its promise to leave the recording as it was."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fisedit_compile.operators import attention_rows
from fisedit_compile.operators.attention import aten as attention
from fisedit_compile.operators.attention.spec import Attention
from fisedit_compile.runtime.spec import Domain
from support.sparse_maps import Case, masks, take, window
from support.tolerances import assert_near

HEADS = 2


def dense(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """Attention of [B, S, heads, D], written out."""
    scores = torch.einsum("bnhd,bshd->bhns", query, key) * (scale or query.shape[3] ** -0.5)
    return torch.einsum("bhns,bshd->bnhd", scores.softmax(3), value)


def draw_case(data: st.DataObject) -> tuple[Case, Tensor]:
    """A case whose channels are key (2 x 3) and value (2 x 4), and queries of the rows."""
    domain = Domain(data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6)))
    batch = data.draw(st.integers(1, 3))
    case = Case.build(data.draw(masks(domain, batch)), window(domain), batch, HEADS * 7)
    return case, torch.randn(batch, case.rows.shape[1], HEADS, 3, dtype=torch.float64)


def split(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value of [B, S, heads * 7], views."""
    key, value = tensor.split([HEADS * 3, HEADS * 4], 2)
    return key.unflatten(2, (HEADS, 3)), value.unflatten(2, (HEADS, 4))


@pytest.mark.parametrize("layout", ["channels first", "fused", "separate"])
@pytest.mark.parametrize("scale", [None, 0.3])
@given(data=st.data())
def test_equals_dense(data: st.DataObject, layout: str, scale: float | None) -> None:
    case, query = draw_case(data)
    key, value = split(case.rows)
    recorded_key, recorded_value = split(case.recorded if layout == "channels first" else case.recorded.contiguous())
    if layout == "separate":
        recorded_key, recorded_value = recorded_key.contiguous(), recorded_value.contiguous()
    before = case.recorded.clone(), recorded_key.clone(), recorded_value.clone()
    arguments = query, key, value, recorded_key, recorded_value, case.source("index"), case.source("valid")
    result = attention_rows(*arguments, scale)
    assert_near(result, dense(query, *split(case.mixed), scale))
    assert result.is_contiguous()
    assert all(map(torch.equal, before, (case.recorded, recorded_key, recorded_value)))


@given(data=st.data())
def test_key_and_value_may_be_one_tensor(data: st.DataObject) -> None:
    case, query = draw_case(data)
    recorded = split(case.recorded.contiguous())[0].contiguous()
    rows, mixed = split(case.rows)[0], split(case.mixed)[0]
    before = recorded.clone()
    result = attention_rows(query, rows, rows, recorded, recorded, case.source("index"), case.source("valid"), None)
    assert_near(result, dense(query, mixed, mixed))
    assert torch.equal(recorded, before)


def ragged(samples: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Arguments of attention_rows with padding rows; index batch ``samples`` of batch 3."""
    mask = torch.zeros(samples, 4, 5, dtype=torch.bool)
    for sample in range(samples):
        mask[sample, sample : sample + 2, : 3 - sample] = True
    case = Case.build(mask, window(Domain(4, 5)), 3, HEADS * 7)
    query = torch.randn(3, case.rows.shape[1], HEADS, 3, dtype=dtype)
    key, value = split(case.rows.to(dtype))
    recorded = split(case.recorded.to(dtype))
    return query, key, value, *recorded, case.source("index"), case.source("valid")


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("one_tensor", [False, True])
def test_exceptions_leave_the_recording(monkeypatch: pytest.MonkeyPatch, samples: int, one_tensor: bool) -> None:
    query, key, value, recorded_key, recorded_value, index, valid = ragged(samples)
    if one_tensor:
        recorded_key = recorded_key.contiguous()
        # Different rows for one recorded tensor: only undoing in reverse order restores it.
        value, recorded_value = key + 1.0, recorded_key
    before = recorded_key.clone(), recorded_value.clone()
    seen: list[bool] = []

    def fail(operator: object, given: Attention) -> Tensor:
        seen.append(torch.equal(given.key.transpose(1, 2), before[0]))
        raise RuntimeError("out of memory")

    monkeypatch.setattr(attention, "call", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        attention_rows(query, key, value, recorded_key, recorded_value, index, valid, None)
    assert seen == [False], "the test must fail while the rows are in place"
    assert torch.equal(recorded_key, before[0]) and torch.equal(recorded_value, before[1])


def test_an_exception_between_the_writes_leaves_the_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value, recorded_key, recorded_value, index, valid = ragged(3)
    before = recorded_key.clone(), recorded_value.clone()
    write, calls = attention.write_rows, []

    def fail_second(*arguments: Tensor) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("second write")
        write(*arguments)

    monkeypatch.setattr(attention, "write_rows", fail_second)
    with pytest.raises(RuntimeError, match="second write"):
        attention_rows(query, key, value, recorded_key, recorded_value, index, valid, None)
    assert torch.equal(recorded_key, before[0]) and torch.equal(recorded_value, before[1])


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("samples", [1, 3])
def test_storage_of_another_dtype(storage: torch.dtype, samples: int) -> None:
    query, key, value, recorded_key, recorded_value, index, valid = ragged(samples, torch.float32)
    recorded_key, recorded_value = recorded_key.to(storage), recorded_value.to(storage)
    before = recorded_key.clone(), recorded_value.clone()
    result = attention_rows(query, key, value, recorded_key, recorded_value, index, valid, None)
    mixed = []
    for recorded, rows in ((recorded_key, key), (recorded_value, value)):
        full = recorded.float()
        for sample in range(3):
            chosen = slice(None) if valid is None else valid[sample % len(valid)]
            full[sample, index[sample % len(index)][chosen]] = rows[sample][chosen]
        mixed.append(full)
    assert_near(result, dense(query, *mixed))
    assert torch.equal(recorded_key, before[0]) and torch.equal(recorded_value, before[1])


def test_expanded_recordings_are_not_written() -> None:
    """A recorded key that is one sample expanded over the batch: writing in place would mix the samples."""
    query, key, value, recorded_key, recorded_value, index, valid = ragged(1)
    recorded_key = recorded_key[:1].expand_as(recorded_key)
    before = recorded_key.clone()
    result = attention_rows(query, key, value, recorded_key, recorded_value, index, valid, None)
    full_key, full_value = recorded_key.clone(), recorded_value.clone()
    full_key[:, index[0]], full_value[:, index[0]] = key, value
    assert_near(result, dense(query, full_key, full_value))
    assert torch.equal(recorded_key, before)


def test_recordings_made_in_inference_mode() -> None:
    with torch.inference_mode():
        arguments = ragged(1)
        expected = attention_rows(*arguments, None)
    recorded = arguments[3], arguments[4]
    before = [tensor.clone() for tensor in recorded]
    outside = [argument.clone() for argument in arguments[:3]]
    result = attention_rows(*outside, *recorded, arguments[5], arguments[6], None)
    assert torch.equal(result, expected)
    assert all(map(torch.equal, recorded, before))


def test_shared_key_heads() -> None:
    query, key, value, recorded_key, recorded_value, index, valid = ragged(1)
    many = torch.randn(3, query.shape[1], 3 * HEADS, 3, dtype=torch.float64)
    result = attention_rows(many, key, value, recorded_key, recorded_value, index, valid, None)
    expected = attention_rows(
        many,
        *(tensor.repeat_interleave(3, 2) for tensor in (key, value, recorded_key, recorded_value)),
        index,
        valid,
        None,
    )
    assert_near(result, expected)


def test_unchanged_rows_give_the_recorded_attention() -> None:
    query, _, _, recorded_key, recorded_value, index, valid = ragged(3)
    key, value = take(recorded_key, index), take(recorded_value, index)
    result = attention_rows(query, key, value, recorded_key, recorded_value, index, valid, None)
    assert_near(result, dense(query, recorded_key, recorded_value))
