"""Compiled attention against exact attention: sizes around every block, strides, shared heads, special numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from fisedit_compile.operators.attention import native
from fisedit_compile.operators.attention.spec import Attention
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


def arguments(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Attention:
    """Attention in which heads may be shared."""
    return Attention(query, key, value, scale=scale, enable_gqa=True)


def compute(*given: Tensor, scale: float | None = None) -> Tensor:
    return native.attention(arguments(*given, scale=scale))


def refused(*given: Tensor, scale: float | None = None) -> str | None:
    return native.supports(arguments(*given, scale=scale))


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
    assert refused(query, key, value, scale=scale) is None
    result = compute(query, key, value, scale=scale)
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
    assert_near(compute(*tensors).double(), exact(*tensors), dtype=dtype)


@pytest.mark.parametrize("dtype", KINDS)
def test_large_and_far_scores(dtype: torch.dtype) -> None:
    """One key wins by far; the largest score comes first, in the middle, or last."""
    value = torch.arange(200.0).reshape(1, 1, 200, 1).to(dtype)
    query = torch.ones(1, 1, 3, 1, dtype=dtype)
    for winner in (0, 100, 199):
        key = torch.full((1, 1, 200, 1), -3e4).to(dtype)
        key[0, 0, winner] = 3e4
        expected = torch.full((1, 1, 3, 1), float(value[0, 0, winner]), dtype=dtype)
        assert torch.equal(compute(query, key, value, scale=1.0), expected)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_nothing_hides_numbers_that_are_none(dtype: torch.dtype, number: float) -> None:
    """Where exact attention is NaN, so is the result, and nowhere else."""
    for place in ("query", "key", "value"):
        given = {name: torch.randn(1, 2, 60, 8).to(dtype) for name in ("query", "key", "value")}
        given[place][0, 1, 50, 3] = number
        result, expected = compute(*given.values()), exact(**given)
        assert expected.isnan().any() or place == "value"
        assert torch.equal(result.isnan(), expected.isnan())
        assert torch.equal(result.isinf(), expected.isinf())


def test_few_and_many_threads_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.randn(2, 3, 150, 24) for _ in range(3)]
    results = []
    for threads in (1, 2, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(compute(*tensors))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_what_is_not_supported() -> None:
    query, key, value = (torch.randn(2, 4, 5, 6) for _ in range(3))
    assert refused(query, key, value) is None
    half = [tensor.half() for tensor in (query, key, value)]
    others = {
        "a dtype without code": ("dtypes", *half, None),
        "different dtypes": ("dtypes", query, key.bfloat16(), value, None),
        "three dimensions": ("empty", query[0], key[0], value[0], None),
        "no keys": ("empty", query, key[:, :, :0], value[:, :, :0], None),
        "no queries": ("empty", query[:, :, :0], key, value, None),
        "channels apart": ("side by side", query.transpose(2, 3).contiguous().transpose(2, 3), key, value, None),
        "samples to be repeated": ("sizes", query, key[:1], value[:1], None),
        "heads that are no multiple": ("sizes", query, key[:, :3], value[:, :3], None),
        "values of other keys": ("sizes", query, key, value[:, :, :4], None),
        "other channels": ("sizes", query, key[..., :5], value, None),
        "no number as a scale": ("scale", query, key, value, float("nan")),
        "another device": ("processor", query.to("meta"), key.to("meta"), value.to("meta"), None),
        "gradients": ("gradients", query.clone().requires_grad_(), key, value, None),
    }
    for why, (reason, *tensors, scale) in others.items():
        assert reason in (refused(*tensors, scale=scale) or ""), why
    masked = arguments(query, key, value)._replace(is_causal=True)
    assert "mask" in (native.supports(masked) or "")
    shared = Attention(query, key[:, :2], value[:, :2])
    assert "shared heads" in (native.supports(shared) or "")
    with torch.autocast("cpu", torch.bfloat16):
        assert refused(query, key, value) is not None


def test_pytorch_computes_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: str) -> None:
        raise NotCompiledError("no compiler")

    monkeypatch.setattr(native, "load_library", missing)
    monkeypatch.setattr(native, "_function", native._function.__wrapped__)
    query, key, value = (torch.randn(2, 4, 5, 6) for _ in range(3))
    assert refused(query, key, value) is not None
    assert_near(functional.scaled_dot_product_attention(query, key, value), exact(query, key, value).float())
