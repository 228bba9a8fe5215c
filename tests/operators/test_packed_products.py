"""pack_matrix and linear_rows, and convolutions with packed weights, against the plain operators."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from fisedit_compile.operators import conv_rows, linear_map, linear_rows, pack_conv_weight, pack_matrix
from fisedit_compile.operators.choosing import taken
from fisedit_compile.operators.native.compiling import DTYPES as NATIVE
from fisedit_compile.operators.products import aten as packed_products
from fisedit_compile.operators.products import native as products
from fisedit_compile.operators.products.aten import packs
from fisedit_compile.operators.products.spec import MEASURED, MOST_ROWS, ProductCase, outputs_of
from support.choices import favour
from support.tolerances import assert_near

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16, torch.float16) if packs("cpu", dtype)]


def test_what_can_be_packed() -> None:
    assert not packs("cuda", torch.float32) and not packs("meta", torch.float32)
    assert not packs("cpu", torch.float64) and not packs("cpu", torch.int8)
    assert packs("cpu", torch.float32) == torch.backends.mkldnn.is_available()


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_a_packed_product_is_the_plain_one(data: st.DataObject, dtype: torch.dtype) -> None:
    rows, inputs, outputs = (data.draw(st.integers(1, 70)) for _ in range(3))
    given_rows = torch.randn(2, rows, inputs).to(dtype)
    weight = torch.randn(outputs, inputs).to(dtype)
    if data.draw(st.booleans()):
        weight = weight.t().contiguous().t()
    bias = data.draw(st.sampled_from([None, torch.randn(outputs).to(dtype)]))
    packed = pack_matrix(weight)
    assert packed.is_mkldnn and packed.shape == weight.shape and packed.dtype == dtype
    result = linear_rows(given_rows, packed, bias)
    assert result.is_contiguous() and result.dtype == dtype
    assert_near(result, functional.linear(given_rows, weight, bias))
    assert_near(linear_rows(given_rows, weight, bias), functional.linear(given_rows, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_any_strides(dtype: torch.dtype) -> None:
    rows, weight = torch.randn(3, 20, 7).to(dtype), torch.randn(5, 20).to(dtype)
    result = linear_rows(rows.transpose(1, 2), pack_matrix(weight), None)
    assert_near(result, functional.linear(rows.transpose(1, 2), weight))


@pytest.mark.parametrize("fastest", ["packed", "plain"])
def test_what_was_measured_to_be_the_fastest_is_taken(monkeypatch: pytest.MonkeyPatch, fastest: str) -> None:
    rows = torch.randn(3, 20)
    for weight in (torch.randn(5, 20), torch.randn(20, 5).t()):
        table = favour(monkeypatch, fastest)
        matrix = pack_matrix(weight, 40)
        # Five outputs fill no panel of compiled products.
        assert table.asked == [("product", ProductCase(38, 20, 5, "float32"), ("packed", "plain"))]
        assert str(table.asked[0].case) == "about 38 rows, 20->5 float32"
        assert [product.shape for product in table.results[0].values()] == [(40, 5)] * 2
        assert matrix.is_mkldnn == (fastest == "packed") and matrix.shape == weight.shape
        assert_near(linear_rows(rows, matrix, None), functional.linear(rows, weight))
        torch.library.opcheck(torch.ops.fisedit.pack_matrix.default, (weight, 40), test_utils="test_schema")


def test_a_weight_that_stays_plain_is_neither_packed_nor_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    favour(monkeypatch, "plain", runs=False)
    weight = torch.nn.Parameter(torch.randn(5, 20))
    with monkeypatch.context() as patched:
        patched.setattr(packed_products, "pack_weight", None)
        matrix = pack_matrix(weight, 40)
        assert matrix.data_ptr() == weight.data_ptr() and not matrix.requires_grad
        assert torch.equal(pack_matrix(weight.detach().t(), 40), weight.t())
    favour(monkeypatch, "packed", runs=False)
    assert pack_matrix(weight, 40).is_mkldnn


def test_what_cannot_be_packed_is_refused_where_it_is_asked_for() -> None:
    with pytest.raises(ValueError, match="packed was asked for .*pack_matrix, but oneDNN multiplies no torch.float64"):
        pack_matrix(torch.randn(5, 20, dtype=torch.float64))
    empty = torch.randn(0, 20)
    assert pack_matrix(empty, 3).shape == (0, 20)


@pytest.mark.parametrize("dtype", list(NATIVE))
def test_compiled_products_are_taken_where_they_are_the_fastest(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    weight, rows = torch.randn(192, 20).to(dtype), torch.randn(3, 7, 20).to(dtype)
    if not products.supports(weight):
        pytest.skip("compiled code does not multiply here")
    table = favour(monkeypatch, "compiled")
    matrix = pack_matrix(weight, 40)
    assert [asked.names for asked in table.asked] == [("packed", "plain", "compiled")]
    first, *others = table.results[0].values()
    assert first.shape == (40, 192)
    for other in others:
        assert_near(other, first)
    assert matrix.dim() > 2 and not matrix.is_mkldnn
    assert outputs_of(matrix) == outputs_of(weight) == 192
    bias = torch.randn(192).to(dtype)
    assert_near(linear_rows(rows, matrix, bias), functional.linear(rows, weight, bias))
    assert_near(linear_rows(rows.transpose(0, 1), matrix, None), functional.linear(rows.transpose(0, 1), weight))


def test_packing_copies() -> None:
    weight = torch.randn(64, 64)
    packed, rows = pack_matrix(weight), torch.randn(4, 64)
    before = linear_rows(rows, packed, None)
    weight.zero_()
    assert torch.equal(linear_rows(rows, packed, None), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("samples", [1, 2])
def test_a_convolution_with_a_packed_weight(samples: int, dtype: torch.dtype) -> None:
    rows, recorded = torch.randn(2, 3, 4).to(dtype), torch.randn(2, 6, 4).to(dtype)
    halo, table = torch.tensor([[0, 3]] * samples), torch.randint(0, 6, (samples, 3, 4))
    weight = pack_conv_weight(torch.randn(6, 4, 2, 2).to(dtype), False, 1)
    bias = torch.randn(6).to(dtype)
    plain = conv_rows(rows, recorded, halo, table, weight, bias, 1)
    assert_near(conv_rows(rows, recorded, halo, table, pack_matrix(weight), bias, 1), plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["packed", "compiled", "plain"])
@pytest.mark.parametrize("fastest", ["plain", "other"])
def test_maps_are_multiplied_in_the_fastest_way(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, order: str, fastest: str
) -> None:
    weight, bias = torch.randn(64, 20).to(dtype), torch.randn(64).to(dtype)
    if order == "compiled" and not products.supports(weight):
        pytest.skip("compiled code does not multiply here")
    orders = {"packed": pack_matrix, "compiled": products.order, "plain": lambda weight: weight}
    packed = orders[order](weight)
    table = favour(monkeypatch, "plain" if fastest == "plain" else order)
    for shape in ((2, 3, 20), (2, MOST_ROWS, 20), (0, 20)):
        map = torch.randn(shape).to(dtype)
        rows = map.numel() // 20
        taken.drain()
        result = linear_map(map, weight, packed, bias)
        assert result.is_contiguous() and result.dtype == dtype
        assert_near(result, functional.linear(map, weight, bias))
        if order == "plain":
            assert not taken.drain() and not table.asked, "there is no choice"
            continue
        chosen = order if rows == 0 or fastest == "other" else "plain"
        assert dict(taken.drain()) == {f"{MEASURED}: {chosen}": 1}
        if rows > 0:
            case = ProductCase.of(min(rows, MOST_ROWS), 20, 64, dtype)
            assert table.asked[-1] == (MEASURED, case, ("plain", order))
            assert {product.shape for product in table.results[-1].values()} == {(min(rows, MOST_ROWS), 64)}
    assert len(table.asked) == (0 if order == "plain" else 2)
