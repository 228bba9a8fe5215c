"""conv_map and conv_map_tiles against PyTorch's convolution, contiguous_rows against PyTorch's copy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from fisedit_compile.operators import contiguous_rows, conv_map, conv_map_tiles, pack_tile_weights
from fisedit_compile.operators.choosing import taken
from fisedit_compile.operators.convolution import maps
from fisedit_compile.operators.convolution.maps import convolve
from fisedit_compile.operators.convolution.spec import EXAMPLE, MEASURED_MAPS, MapCase
from support.choices import favour
from support.tolerances import assert_identical, assert_near


class Setting:
    """A convolution of a map of even size."""

    def __init__(self, data: st.DataObject, dtype: torch.dtype = torch.float64) -> None:
        sizes = [data.draw(st.integers(1, most)) for most in (3, 5, 6, 6)]
        batch, channels, height, width = sizes[0], sizes[1], 2 * sizes[2], 2 * sizes[3]
        outputs = data.draw(st.integers(1, 5))
        self.weight = torch.randn(outputs, channels, 3, 3, dtype=dtype)
        self.bias = data.draw(st.sampled_from([None, torch.randn(outputs, dtype=dtype)]))
        self.channels_last = data.draw(st.booleans())
        map = torch.randn(batch, channels, height, width, dtype=dtype)
        orders = [map, map.to(memory_format=torch.channels_last), torch.cat([map, map], 3)[..., ::2]]
        self.map = data.draw(st.sampled_from(orders))
        rows = self.map.flatten(2).transpose(1, 2).contiguous()
        self.rows = data.draw(st.sampled_from([None, rows]))

    def check(self, result: Tensor) -> None:
        """The values and the strides are those that were asked for."""
        expected = functional.conv2d(self.map, self.weight, self.bias, padding=1)
        assert_near(result, expected)
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        assert result.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(("strip_bytes", "strip_tiles"), [(1, 1), (3000, 1), (1, 7), (1 << 30, 1)])
@given(data=st.data())
def test_tiles_of_a_map(data: st.DataObject, strip_bytes: int, strip_tiles: int) -> None:
    setting = Setting(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maps, "STRIP_BYTES", strip_bytes)
        patch.setattr(maps, "STRIP_TILES", strip_tiles)
        weights = pack_tile_weights(setting.weight)
        before = setting.map.clone()
        setting.check(conv_map_tiles(setting.map, setting.rows, weights, setting.bias, setting.channels_last))
        assert_identical(setting.map, before, "the map is left as it was")


@given(data=st.data())
def test_tiles_of_a_map_with_packed_weights(data: st.DataObject) -> None:
    setting = Setting(data, torch.float32)
    weights = pack_tile_weights(setting.weight)
    assert all(weight.is_mkldnn for weight in weights)
    setting.check(conv_map_tiles(setting.map, setting.rows, weights, setting.bias, setting.channels_last))


@pytest.mark.parametrize("fastest", ["direct", "tiles"])
@given(data=st.data())
def test_the_faster_way_is_taken(data: st.DataObject, fastest: str) -> None:
    setting = Setting(data)
    arguments = setting.map, setting.rows, setting.weight, setting.bias, pack_tile_weights(setting.weight)
    with pytest.MonkeyPatch.context() as patch, taken.apart() as counts:
        table = favour(patch, fastest)
        setting.check(conv_map(*arguments, setting.channels_last))
    outputs, inputs = setting.weight.shape[:2]
    case = MapCase(inputs, outputs, "float64", setting.channels_last)
    assert table.asked == [(MEASURED_MAPS, case, ("direct", "tiles"))]
    (examples,) = table.results
    assert_near(examples["direct"], examples["tiles"])
    assert {tuple(example.shape[2:]) for example in examples.values()} == {(EXAMPLE, EXAMPLE)}
    assert counts == {f"{MEASURED_MAPS}: {fastest}": 1}


def test_cases_of_maps_differ_by_what_decides() -> None:
    base = (320, 640, False, torch.float32)
    changes = [(0, 640), (1, 320), (2, True), (3, torch.float64)]
    cases = {MapCase.of(*base)} | {MapCase.of(*base[:at], value, *base[at + 1 :]) for at, value in changes}
    assert len(cases) == len({str(case) for case in cases}) == 5
    assert "320->640 float32, channels last" in map(str, cases)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 70, 65), (1, 3, 5), (3, 1, 4), (2, 6, 2, 3)])
def test_contiguous_rows(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rows = torch.randn(shape).to(dtype)
    for given_rows in (rows, rows.transpose(1, 2).contiguous().transpose(1, 2), torch.cat([rows, rows], -1)[..., ::2]):
        result = contiguous_rows(given_rows)
        assert result.is_contiguous() and result.data_ptr() != given_rows.data_ptr()
        assert_identical(result, given_rows.contiguous())


@pytest.mark.parametrize("weight_last", [False, True], ids=["weight as it is", "weight with channels last"])
@pytest.mark.parametrize("order", ["contiguous", "channels last", "gaps"])
def test_a_map_is_brought_to_the_order_of_the_weight(
    order: str, weight_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    map, weight, bias = torch.randn(2, 4, 6, 8), torch.randn(5, 4, 3, 3), torch.randn(5)
    if weight_last:
        weight = weight.to(memory_format=torch.channels_last)
    given_map = {
        "contiguous": map,
        "channels last": map.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        "gaps": torch.cat([map, map], 3)[..., 1:9],
    }[order]
    expected = functional.conv2d(given_map, weight, bias, [2, 1], [1, 1], [1, 1], 1)
    seen: list[Tensor] = []
    conv2d = torch.conv2d
    monkeypatch.setattr(torch, "conv2d", lambda map, *rest: seen.append(map) or conv2d(map, *rest))
    assert_near(convolve(given_map, weight, bias, [2, 1], [1, 1], [1, 1], 1), expected)
    assert_identical(seen[0], given_map)
    assert seen[0].is_contiguous() == (order == "contiguous" or not weight_last)
    assert (seen[0] is given_map) == (order == "contiguous" or weight_last), "copied only where it has to be"


def test_a_map_without_samples() -> None:
    map, weight = torch.randn(6, 8, 4).permute(2, 0, 1), torch.randn(5, 4, 3, 3)
    assert_near(convolve(map, weight), functional.conv2d(map, weight))
