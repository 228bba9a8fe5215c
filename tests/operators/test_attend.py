"""attend: PyTorch's attention, in the way that was measured to be the fastest."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fisedit_compile.operators.attention import aten as attention
from fisedit_compile.operators.attention import native
from fisedit_compile.operators.attention.aten import attend
from fisedit_compile.operators.attention.spec import MOST_KEYS, MOST_QUERIES, AttentionCase
from fisedit_compile.operators.choosing import taken
from support.tolerances import assert_identical, assert_near


class Table:
    """Costs of which the given way is the lowest."""

    def __init__(self, way: str) -> None:
        self.way = way
        self.cases: list[AttentionCase] = []
        self.shapes: list[dict[str, torch.Size]] = []

    def fastest(self, operator: str, case: AttentionCase, ways: Mapping[str, Callable[[], Tensor]]) -> str:
        self.cases.append(case)
        self.shapes.append({name: way().shape for name, way in ways.items()})
        return self.way if self.way in ways else next(iter(ways))


@pytest.fixture(params=["plain", "compiled"])
def table(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Table:
    """Costs that make attend take one way; compiled attention is computed by PyTorch in float64."""
    table = Table(request.param)

    def exact(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        given = (tensor.double() for tensor in (query, key, value))
        return functional.scaled_dot_product_attention(*given, scale=scale, enable_gqa=True).to(query.dtype)

    monkeypatch.setattr(attention, "costs", table)
    monkeypatch.setattr(native, "_function", lambda dtype: True)
    monkeypatch.setattr(native, "attention", exact)
    taken.drain()
    return table


def draw(queries: int, keys: int, heads: int = 2, shared: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(2, heads * shared, queries, 8),
        torch.randn(2, heads, keys, 8),
        torch.randn(2, heads, keys, 4),
    )


@pytest.mark.parametrize("scale", [None, 0.2])
@pytest.mark.parametrize("shared", [1, 3])
def test_takes_the_fastest_way_and_counts_it(table: Table, scale: float | None, shared: int) -> None:
    given = draw(5, 7, shared=shared)
    result = attend(*given, scale=scale, enable_gqa=shared > 1)
    expected = functional.scaled_dot_product_attention(*given, scale=scale, enable_gqa=shared > 1)
    assert_near(result, expected)
    assert dict(taken.drain()) == {f"attention: {table.way}": 1}
    assert table.cases == [AttentionCase(2 * shared, 2, 8, 4, "float32", 5, 7)]
    described = f"{2 * shared} of 2 heads 8->4 float32, about 5 queries, about 7 keys"
    assert str(table.cases[0]) == described


def test_many_positions_are_measured_by_some(table: Table) -> None:
    result = attend(*draw(2 * MOST_QUERIES, 2 * MOST_KEYS))
    assert result.shape == (2, 2, 2 * MOST_QUERIES, 4)
    assert (table.cases[0].queries, table.cases[0].keys) == (MOST_QUERIES, MOST_KEYS)
    assert set(table.shapes[-1].values()) == {(1, 2, MOST_QUERIES, 4)}


@pytest.mark.parametrize(
    "keywords",
    [{"attn_mask": torch.zeros(5, 5)}, {"is_causal": True}, {"dropout_p": 0.5}],
    ids=lambda keywords: next(iter(keywords)),
)
def test_pytorch_computes_what_compiled_code_does_not(table: Table, keywords: dict) -> None:
    given = draw(5, 5)
    torch.manual_seed(0)
    result = attend(*given, **keywords)
    torch.manual_seed(0)
    assert_identical(result, functional.scaled_dot_product_attention(*given, **keywords))
    assert not taken.drain() and not table.shapes


def test_shared_heads_must_be_asked_for(table: Table) -> None:
    """As PyTorch refuses them otherwise."""
    with pytest.raises(RuntimeError):
        attend(*draw(5, 7, shared=3))
    assert not table.shapes


def test_other_dtypes_are_left_to_pytorch(table: Table) -> None:
    given = [tensor.double() for tensor in draw(5, 7)]
    assert_identical(attend(*given), functional.scaled_dot_product_attention(*given))
    assert not table.shapes
