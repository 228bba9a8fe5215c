"""gather_taps, conv_rows, pack_conv_weight and pixel_select against the dense operators on the mixed map."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from fisedit_compile.operators import conv_rows, gather_taps, pack_conv_weight, pixel_select
from fisedit_compile.operators.convolution import aten as stencils
from fisedit_compile.runtime.spec import Domain, Stencil
from support.sparse_maps import Case, masks, window
from support.tolerances import assert_near


def draw_case(data: st.DataObject, stencil: Stencil, channels: int, batch: int | None = None) -> Case:
    batch = batch or data.draw(st.integers(1, 3))
    finest = max(stencil.source, stencil.target, key=lambda domain: domain.size)
    return Case.build(data.draw(masks(finest, batch)), stencil, batch, channels)


def draw_window(data: st.DataObject) -> tuple[Stencil, dict[str, int]]:
    domain = Domain(data.draw(st.integers(3, 8)), data.draw(st.integers(3, 8)))
    kernel = data.draw(st.integers(1, 3))
    arguments = {
        "stride": data.draw(st.integers(1, 2)),
        "padding": data.draw(st.integers(0, kernel // 2)),
        "dilation": 1 if kernel == 3 else data.draw(st.integers(1, 2)),
    }
    return window(domain, kernel, **arguments), arguments | {"kernel_size": kernel}


def convolve(case: Case, weight: torch.Tensor, bias: torch.Tensor | None, groups: int, transposed: bool = False):
    packed = pack_conv_weight(weight, transposed, groups)
    assert packed.is_contiguous() and packed.data_ptr() != weight.data_ptr()
    return conv_rows(case.rows, case.recorded, case.taps("halo"), case.taps("table"), packed, bias, groups)


@pytest.mark.parametrize("chunk_bytes", [0, 600, 1 << 30])
@pytest.mark.parametrize(("groups", "outputs"), [(1, 5), (2, 6), (4, 4), (4, 8)])
@given(data=st.data())
def test_convolution(data: st.DataObject, groups: int, outputs: int, chunk_bytes: int) -> None:
    stencil, arguments = draw_window(data)
    case = draw_case(data, stencil, channels=4)
    kernel = arguments.pop("kernel_size")
    weight = torch.randn(outputs, 4 // groups, kernel, kernel, dtype=torch.float64)
    bias = data.draw(st.sampled_from([None, torch.randn(outputs, dtype=torch.float64)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stencils, "CHUNK_BYTES", chunk_bytes)
        result = convolve(case, weight, bias, groups)
    dense = functional.conv2d(case.dense_mixed(), weight, bias, groups=groups, **arguments)
    assert_near(result, case.target_rows(dense))
    assert result.is_contiguous()


@pytest.mark.parametrize("groups", [1, 2])
@given(data=st.data())
def test_transposed_convolution(data: st.DataObject, groups: int) -> None:
    source = Domain(data.draw(st.integers(2, 6)), data.draw(st.integers(2, 6)))
    kernel, stride, padding = data.draw(st.sampled_from([(2, 2, 0), (3, 2, 1), (4, 2, 1), (3, 1, 1), (4, 3, 0)]))
    extra = data.draw(st.integers(0, stride - 1))
    weight = torch.randn(4, 6 // groups, kernel, kernel, dtype=torch.float64)
    bias = torch.randn(6, dtype=torch.float64)

    def dense(map: torch.Tensor) -> torch.Tensor:
        return functional.conv_transpose2d(map, weight, bias, stride, padding, extra, groups)

    height, width = dense(torch.zeros(1, 4, source.height, source.width, dtype=torch.float64)).shape[2:]
    values = {f"{n}_{a}": v for n, v in (("stride", stride), ("padding", padding), ("dilation", 1)) for a in "yx"}
    stencil = Stencil.of(
        "transposed", source, Domain(height, width), kernel_height=kernel, kernel_width=kernel, **values
    )
    case = draw_case(data, stencil, channels=4)
    assert_near(convolve(case, weight, bias, groups, transposed=True), case.target_rows(dense(case.dense_mixed())))


@given(data=st.data())
def test_pooling(data: st.DataObject) -> None:
    stencil, arguments = draw_window(data)
    case = draw_case(data, stencil, channels=3)
    dense = functional.max_pool2d(case.dense_mixed(), **arguments)
    taps = gather_taps(case.rows, case.recorded, case.taps("halo"), case.taps("table"), -torch.inf)
    assert torch.equal(taps.amax(2), case.target_rows(dense))
    if arguments.pop("dilation") == 1:
        taps = gather_taps(case.rows, case.recorded, case.taps("halo"), case.taps("table"), 0.0)
        for padded in (True, False):
            dense = functional.avg_pool2d(case.dense_mixed(), count_include_pad=padded, **arguments)
            count = taps.shape[2] if padded else case.taps("inside")[..., None]
            assert_near(taps.sum(2) / count, case.target_rows(dense))


@given(data=st.data())
def test_pixel_shuffle(data: st.DataObject) -> None:
    source = Domain(data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4)))
    factor = data.draw(st.integers(1, 3))
    target = Domain(source.height * factor, source.width * factor)
    case = draw_case(data, Stencil.of("pixel_shuffle", source, target, factor=factor), channels=3 * factor**2)
    taps = gather_taps(case.rows, case.recorded, case.taps("halo"), case.taps("table"), 0.0)
    result = pixel_select(taps, case.taps("subposition"), factor)
    assert torch.equal(result, case.target_rows(functional.pixel_shuffle(case.dense_mixed(), factor)))
    assert result.is_contiguous()


@given(data=st.data())
def test_taps_with_several_channel_dimensions(data: st.DataObject) -> None:
    case = draw_case(data, window(Domain(4, 5)), channels=6)
    flat = gather_taps(case.rows, case.recorded, case.taps("halo"), case.taps("table"), 2.5)
    rows, recorded = case.rows.unflatten(2, (3, 2)), case.recorded.unflatten(2, (3, 2))
    result = gather_taps(rows, recorded, case.taps("halo"), case.taps("table"), 2.5)
    assert result.shape == (*flat.shape[:3], 3, 2)
    assert torch.equal(result.flatten(3), flat)


@pytest.mark.parametrize("storage", [torch.float16, torch.float64])
def test_recorded_maps_of_another_dtype(storage: torch.dtype) -> None:
    mask = torch.zeros(1, 5, 4, dtype=torch.bool)
    mask[0, 1:3, 1:] = True
    case = Case.build(mask, window(Domain(5, 4)), 2, 4)
    case.recorded = case.recorded.to(storage)
    case.mixed = torch.where(mask.flatten(1)[..., None], case.mixed.float(), case.recorded.float())
    case.rows = case.rows.float()
    weight = torch.randn(3, 4, 3, 3)
    dense = functional.conv2d(case.dense_mixed(), weight, padding=1)
    assert_near(convolve(case, weight, None, 1), case.target_rows(dense))


def test_weights_that_require_grad_are_accepted() -> None:
    case = Case.build(torch.ones(1, 4, 4, dtype=torch.bool), window(Domain(4, 4)), 1, 2)
    packed = torch.randn(3, 18, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    arguments = (case.rows, case.recorded, case.taps("halo"), case.taps("table"), packed, bias, 1)
    whole = conv_rows(*arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stencils, "CHUNK_BYTES", 300)
        assert_near(conv_rows(*arguments), whole)


@pytest.mark.parametrize("groups", [1, 2])
def test_conv_rows_follows_autocast(groups: int) -> None:
    """Beyond one chunk the products are written to given outputs, which autocast does not reach by itself."""
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(1, 900, 64, generator=generator)
    table = torch.randint(0, 900, (1, 12000, 9), generator=generator)
    weight = torch.randn(8, 9 * 64 // groups, generator=generator)
    halo = torch.zeros(1, 2, dtype=torch.int64)
    arguments = (source, source, halo, table, weight, None, groups)
    exact = conv_rows(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        computed = conv_rows(*arguments)
    assert computed.dtype == torch.bfloat16
    assert (computed.float() - exact).norm() < 0.02 * exact.norm()
