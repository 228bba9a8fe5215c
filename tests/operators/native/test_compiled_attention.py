"""Compiled attention against exact attention: sizes around every block, strides, shared heads, special numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from fisedit_compile.operators.attention import native
from fisedit_compile.operators.native.compiling import DTYPES, NotCompiledError
from support.tolerances import assert_near

pytestmark = pytest.mark.usefixtures("compiler")
KINDS = tuple(DTYPES)


def exact(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """The definition, in float64."""
    shared = query.shape[1] // key.shape[1]
    query, key, value = (tensor.double() for tensor in (query, key, value))
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scale is None else scale)
    return scores.softmax(3) @ value


def draw(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    """[B, heads, positions, channels] in an order of memory."""
    batch, heads, positions, channels = shape
    if layout == "heads first":
        return torch.randn(shape).to(dtype)
    if layout == "heads last":
        return torch.randn(batch, positions, heads, channels).to(dtype).transpose(1, 2)
    # A part of a wider tensor, as of a projection to queries, keys and values at once.
    return torch.randn(batch, positions, heads, channels + 3).to(dtype).transpose(1, 2)[..., 1 : channels + 1]


@pytest.mark.parametrize("dtype", KINDS)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    shared=st.integers(1, 2),
    # Vectors have 4 to 16 lanes, and three of them make a part; blocks have up to 96 keys.
    queries=st.one_of(st.integers(1, 60), st.integers(90, 200)),
    keys=st.one_of(st.integers(1, 20), st.integers(90, 300)),
    depth=st.integers(1, 90),
    width=st.integers(1, 50),
    layout=st.sampled_from(["heads first", "heads last", "part"]),
    scale=st.sampled_from([None, 0.3, -0.2]),
)
def test_equals_exact_attention(
    dtype: torch.dtype,
    batch: int,
    heads: int,
    shared: int,
    queries: int,
    keys: int,
    depth: int,
    width: int,
    layout: str,
    scale: float | None,
) -> None:
    query = draw((batch, heads * shared, queries, depth), dtype, layout)
    key, value = (draw((batch, heads, keys, size), dtype, layout) for size in (depth, width))
    before = [tensor.clone() for tensor in (query, key, value)]
    assert native.supports(query, key, value, scale)
    result = native.attention(query, key, value, scale)
    assert_near(result.double(), exact(query, key, value, scale), dtype=dtype)
    assert result.dtype == dtype and result.transpose(1, 2).is_contiguous()
    assert all(map(torch.equal, before, (query, key, value)))


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(
    ("batch", "heads", "queries", "keys", "depth"),
    [(2, 8, 33, 1024, 40), (1, 1, 17, 300, 512), (2, 3, 500, 77, 64), (1, 2, 16, 96, 160)],
)
def test_equals_exact_attention_at_sizes_of_networks(
    dtype: torch.dtype, batch: int, heads: int, queries: int, keys: int, depth: int
) -> None:
    tensors = [draw((batch, heads, count, depth), dtype, "heads last") for count in (queries, keys, keys)]
    assert_near(native.attention(*tensors, None).double(), exact(*tensors), dtype=dtype)


@pytest.mark.parametrize("dtype", KINDS)
def test_large_and_far_scores(dtype: torch.dtype) -> None:
    """One key wins by far; the largest score comes first, in the middle, or last."""
    value = torch.arange(200.0).reshape(1, 1, 200, 1).to(dtype)
    query = torch.ones(1, 1, 3, 1, dtype=dtype)
    for winner in (0, 100, 199):
        key = torch.full((1, 1, 200, 1), -3e4).to(dtype)
        key[0, 0, winner] = 3e4
        expected = torch.full((1, 1, 3, 1), float(value[0, 0, winner]), dtype=dtype)
        assert torch.equal(native.attention(query, key, value, 1.0), expected)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_nothing_hides_numbers_that_are_none(dtype: torch.dtype, number: float) -> None:
    """Where exact attention is NaN, so is the result, and nowhere else."""
    for place in ("query", "key", "value"):
        given = {name: torch.randn(1, 2, 60, 8).to(dtype) for name in ("query", "key", "value")}
        given[place][0, 1, 50, 3] = number
        result, expected = native.attention(**given, scale=None), exact(**given)
        assert expected.isnan().any() or place == "value"
        assert torch.equal(result.isnan(), expected.isnan())
        assert torch.equal(result.isinf(), expected.isinf())


def test_few_and_many_threads_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.randn(2, 3, 150, 24) for _ in range(3)]
    results = []
    for threads in (1, 2, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(native.attention(*tensors, None))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_what_is_not_supported() -> None:
    query, key, value = (torch.randn(2, 4, 5, 6) for _ in range(3))
    assert native.supports(query, key, value, None)
    half = [tensor.half() for tensor in (query, key, value)]
    others = {
        "a dtype without code": (*half, None),
        "different dtypes": (query, key.bfloat16(), value, None),
        "three dimensions": (query[0], key[0], value[0], None),
        "no keys": (query, key[:, :, :0], value[:, :, :0], None),
        "no queries": (query[:, :, :0], key, value, None),
        "channels apart": (query.transpose(2, 3).contiguous().transpose(2, 3), key, value, None),
        "samples to be repeated": (query, key[:1], value[:1], None),
        "heads that are no multiple": (query, key[:, :3], value[:, :3], None),
        "values of other keys": (query, key, value[:, :, :4], None),
        "other channels": (query, key[..., :5], value, None),
        "no number as a scale": (query, key, value, float("nan")),
        "another device": (query.to("meta"), key.to("meta"), value.to("meta"), None),
        "gradients": (query.clone().requires_grad_(), key, value, None),
    }
    for why, arguments in others.items():
        assert not native.supports(*arguments), why
    with torch.autocast("cpu", torch.bfloat16):
        assert not native.supports(query, key, value, None)


def test_pytorch_computes_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: str) -> None:
        raise NotCompiledError("no compiler")

    monkeypatch.setattr(native, "load_library", missing)
    monkeypatch.setattr(native, "_function", native._function.__wrapped__)
    query, key, value = (torch.randn(2, 4, 5, 6) for _ in range(3))
    assert not native.supports(query, key, value, None)
    assert_near(functional.scaled_dot_product_attention(query, key, value), exact(query, key, value).float())
