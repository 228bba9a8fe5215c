"""attend: PyTorch's attention, in the way that was measured to be the fastest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fisedit_compile.operators import attend
from fisedit_compile.operators.attention import native
from fisedit_compile.operators.attention.spec import MOST_KEYS, MOST_QUERIES, AttentionCase
from fisedit_compile.operators.choosing import taken
from support.choices import Favour, favour
from support.tolerances import assert_identical, assert_near


@pytest.fixture(params=["plain", "compiled"])
def table(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Favour:
    """Costs that make attend take one way; compiled attention is computed by PyTorch in float64."""

    def exact(function: object, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        given = (tensor.double() for tensor in (query, key, value))
        return functional.scaled_dot_product_attention(*given, scale=scale, enable_gqa=True).to(query.dtype)

    monkeypatch.setattr(native, "_function", lambda dtype: True)
    monkeypatch.setattr(native, "_call", exact)
    taken.drain()
    return favour(monkeypatch, request.param)


def draw(queries: int, keys: int, heads: int = 2, shared: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(2, heads * shared, queries, 8),
        torch.randn(2, heads, keys, 8),
        torch.randn(2, heads, keys, 4),
    )


@pytest.mark.parametrize("scale", [None, 0.2])
@pytest.mark.parametrize("shared", [1, 3])
def test_takes_the_fastest_way_and_counts_it(table: Favour, scale: float | None, shared: int) -> None:
    given = draw(5, 7, shared=shared)
    result = attend(*given, scale=scale, enable_gqa=shared > 1)
    expected = functional.scaled_dot_product_attention(*given, scale=scale, enable_gqa=shared > 1)
    assert_near(result, expected)
    assert dict(taken.drain()) == {f"attention: {table.name}": 1}
    ((operator, case, names),) = table.asked
    assert (operator, names) == ("attention", ("plain", "compiled"))
    assert case == AttentionCase(2 * shared, 2, 8, 4, "float32", 5, 7)
    described = f"{2 * shared} of 2 heads 8->4 float32, about 5 queries, about 7 keys"
    assert str(case) == described


def test_many_positions_are_measured_by_some(table: Favour) -> None:
    result = attend(*draw(2 * MOST_QUERIES, 2 * MOST_KEYS))
    assert result.shape == (2, 2, 2 * MOST_QUERIES, 4)
    assert table.asked[0].case[-2:] == (MOST_QUERIES, MOST_KEYS)
    assert {result.shape for result in table.results[0].values()} == {(1, 2, MOST_QUERIES, 4)}


@pytest.mark.parametrize(
    "keywords",
    [{"attn_mask": torch.zeros(5, 5)}, {"is_causal": True}, {"dropout_p": 0.5}],
    ids=lambda keywords: next(iter(keywords)),
)
def test_pytorch_computes_what_compiled_code_does_not(table: Favour, keywords: dict) -> None:
    given = draw(5, 5)
    torch.manual_seed(0)
    result = attend(*given, **keywords)
    torch.manual_seed(0)
    assert_identical(result, functional.scaled_dot_product_attention(*given, **keywords))
    assert not taken.drain() and not table.asked


def test_shared_heads_must_be_asked_for(table: Favour) -> None:
    """As PyTorch refuses them otherwise."""
    with pytest.raises(RuntimeError):
        attend(*draw(5, 7, shared=3))
    assert not table.asked


def test_other_dtypes_are_left_to_pytorch(table: Favour) -> None:
    given = [tensor.double() for tensor in draw(5, 7)]
    assert_identical(attend(*given), functional.scaled_dot_product_attention(*given))
    assert not table.asked
