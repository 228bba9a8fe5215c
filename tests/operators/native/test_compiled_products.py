"""Compiled products against exact ones: rows around every tile, inputs around every block, and what does not fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from fisedit_compile.operators.native.compiling import DTYPES, NotCompiledError
from fisedit_compile.operators.products import native as products
from support.tolerances import assert_near

KINDS = [dtype for dtype in DTYPES if products._library(dtype) is not None]
pytestmark = pytest.mark.skipif(torch.float32 not in KINDS, reason="nothing is compiled on this machine")
#: A multiple of all panels, which have 8 to 32 outputs.
PANEL = 32


def test_what_is_multiplied() -> None:
    assert not products.supports(torch.randn(PANEL, 4).double()), "a dtype without code"
    assert not products.supports(torch.randn(PANEL, 4, device="meta"))
    assert not products.supports(torch.randn(PANEL, 0)), "no inputs"
    assert not products.supports(torch.randn(PANEL, 4, 1)), "no matrix"
    for dtype in KINDS:
        assert products.supports(torch.randn(PANEL, 4).to(dtype))
        assert not products.supports(torch.randn(PANEL + 1, 4).to(dtype)), "outputs that fill no panel"
        assert products.supports(torch.randn(PANEL, 5).to(dtype)) == (dtype == torch.float32), "pairs of inputs"


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@given(
    # Tiles have up to 12 rows, groups up to 96; blocks have 256 inputs, or pairs of them.
    count=st.one_of(st.integers(1, 30), st.integers(90, 110), st.integers(180, 200)),
    inputs=st.one_of(st.integers(1, 20), st.integers(250, 260), st.integers(500, 600)),
    panels=st.integers(1, 5),
    biased=st.booleans(),
)
def test_equals_an_exact_product(dtype: torch.dtype, count: int, inputs: int, panels: int, biased: bool) -> None:
    inputs = inputs if dtype == torch.float32 else 2 * inputs
    rows, weight = torch.randn(count, inputs).to(dtype), torch.randn(PANEL * panels, inputs).to(dtype)
    bias = torch.randn(PANEL * panels).to(dtype) if biased else None
    result = products.product(rows, products.order(weight), bias)
    exact = functional.linear(rows.double(), weight.double(), None if bias is None else bias.double())
    assert result.dtype == dtype and result.is_contiguous()
    assert_near(result.double(), exact, dtype=dtype)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_shapes_and_strides(dtype: torch.dtype) -> None:
    weight = torch.randn(PANEL, 6).to(dtype)
    ordered = products.order(weight)
    assert products.is_ordered(ordered) and not products.is_ordered(weight)
    for rows in (
        torch.randn(6),
        torch.randn(0, 6),
        torch.randn(2, 3, 6),
        torch.randn(6, 5).t(),
        torch.randn(4, 9)[:, 2:8],
    ):
        rows = rows.to(dtype)
        result = products.product(rows, ordered, None)
        assert result.shape == (*rows.shape[:-1], PANEL)
        assert_near(result, functional.linear(rows, weight))
    gaps = torch.randn(PANEL, 2).to(dtype)[:, 0]
    assert_near(products.product(rows, ordered, gaps), functional.linear(rows, weight, gaps))


@pytest.mark.parametrize("threads", [1, 2, 3, 40])
def test_threads_share_panels_and_rows(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, weight = torch.randn(50, 300), torch.randn(PANEL, 300)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert_near(products.product(rows, products.order(weight), None), functional.linear(rows, weight))


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_long_sums_round_little(dtype: torch.dtype) -> None:
    """Sums of a block are added to those before by themselves."""
    rows, weight = torch.rand(3, 20000).to(dtype), torch.rand(PANEL, 20000).to(dtype)
    exact = functional.linear(rows.double(), weight.double())
    result = products.product(rows, products.order(weight), None).double()
    assert float(((result - exact) / exact).abs().max()) < (2e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_what_does_not_fit_is_refused(dtype: torch.dtype) -> None:
    ordered = products.order(torch.randn(PANEL, 6).to(dtype))
    fitting = torch.randn(2, 6).to(dtype)
    for rows, bias in (
        (torch.randn(2, 5).to(dtype), None),
        (fitting.double(), None),
        (fitting, torch.randn(PANEL - 1).to(dtype)),
        (fitting, torch.randn(PANEL).double()),
    ):
        with pytest.raises(ValueError, match=rf"expected rows \[..., 6\] and a bias \[{PANEL}\]"):
            products.product(rows, ordered, bias)


def test_pytorch_computes_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: str) -> None:
        raise NotCompiledError("no compiler")

    monkeypatch.setattr(products, "load_library", missing)
    monkeypatch.setattr(products, "_library", products._library.__wrapped__)
    assert not products.supports(torch.randn(PANEL, 4))
