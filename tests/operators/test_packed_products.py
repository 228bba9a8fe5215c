"""pack_matrix and linear_rows, and convolutions with packed weights, against the plain operators."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from fisedit_compile.operators import conv_rows, linear_map, linear_rows, pack_conv_weight, pack_matrix
from fisedit_compile.operators.choosing import taken
from fisedit_compile.operators.native.compiling import DTYPES as NATIVE
from fisedit_compile.operators.products import aten as packed_module
from fisedit_compile.operators.products import native as products
from fisedit_compile.operators.products.aten import packs
from fisedit_compile.operators.products.spec import MEASURED, MOST_ROWS, ProductCase
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
    asked: list[tuple[str, ProductCase]] = []

    class Table:
        def fastest(self, operator: str, case: ProductCase, ways: dict[str, Callable[[], torch.Tensor]]) -> str:
            asked.append((operator, case))
            # Five outputs fill no panel of compiled products.
            assert list(ways) == ["packed", "plain"] and [way().shape for way in ways.values()] == [(40, 5)] * 2
            return fastest

    monkeypatch.setattr(packed_module, "costs", Table())
    rows = torch.randn(3, 20)
    for weight in (torch.randn(5, 20), torch.randn(20, 5).t()):
        asked.clear()
        matrix = pack_matrix(weight, 40)
        assert asked == [("product", ProductCase(38, 20, 5, "float32"))]
        assert str(asked[0][1]) == "about 38 rows, 20->5 float32"
        assert matrix.is_mkldnn == (fastest == "packed") and matrix.shape == weight.shape
        assert_near(linear_rows(rows, matrix, None), functional.linear(rows, weight))
        torch.library.opcheck(torch.ops.fisedit.pack_matrix.default, (weight, 40), test_utils="test_schema")


class Known:
    """A table in which everything was measured already."""

    def __init__(self, way: str) -> None:
        self.way = way

    def fastest(self, operator: str, case: ProductCase, ways: dict[str, Callable[[], torch.Tensor]]) -> str:
        return self.way


def test_a_weight_that_stays_plain_is_neither_packed_nor_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_module, "costs", Known("plain"))
    weight = torch.nn.Parameter(torch.randn(5, 20))
    with monkeypatch.context() as patched:
        patched.setattr(packed_module.torch.ops.mkldnn, "_reorder_linear_weight", None)
        matrix = pack_matrix(weight, 40)
        assert matrix.data_ptr() == weight.data_ptr() and not matrix.requires_grad
        assert torch.equal(pack_matrix(weight.detach().t(), 40), weight.t())
    monkeypatch.setattr(packed_module, "costs", Known("packed"))
    assert pack_matrix(weight, 40).is_mkldnn


@pytest.mark.parametrize("dtype", list(NATIVE))
def test_compiled_products_are_taken_where_they_are_the_fastest(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    weight, rows = torch.randn(192, 20).to(dtype), torch.randn(3, 7, 20).to(dtype)
    if not products.supports(weight):
        pytest.skip("compiled code does not multiply here")
    asked: list[list[str]] = []

    class Table(Known):
        def fastest(self, operator: str, case: ProductCase, ways: dict[str, Callable[[], torch.Tensor]]) -> str:
            asked.append(list(ways))
            first, *others = (way() for way in ways.values())
            assert first.shape == (40, 192)
            for other in others:
                assert_near(other, first)
            return super().fastest(operator, case, ways)

    monkeypatch.setattr(packed_module, "costs", Table("compiled"))
    matrix = pack_matrix(weight, 40)
    assert asked == [["packed", "plain", "compiled"]]
    assert matrix.dim() > 2 and not matrix.is_mkldnn
    assert packed_module.outputs_of(matrix) == packed_module.outputs_of(weight) == 192
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
    asked: list[ProductCase] = []

    class Table:
        def fastest(self, operator: str, case: ProductCase, ways: dict[str, Callable[[], torch.Tensor]]) -> str:
            asked.append(case)
            assert operator == MEASURED and list(ways) == ["plain", order]
            assert all(way().shape == (min(rows, MOST_ROWS), 64) for way in ways.values())
            return "plain" if fastest == "plain" else order

    monkeypatch.setattr(packed_module, "costs", Table())
    for shape in ((2, 3, 20), (2, MOST_ROWS, 20), (0, 20)):
        map = torch.randn(shape).to(dtype)
        rows = map.numel() // 20
        taken.drain()
        result = linear_map(map, weight, packed, bias)
        assert result.is_contiguous() and result.dtype == dtype
        assert_near(result, functional.linear(map, weight, bias))
        expected = order if rows == 0 or fastest == "other" else "plain"
        assert dict(taken.drain()) == {f"{MEASURED}: {expected}": 1}
    assert len(asked) == (0 if order == "plain" else 2)
