"""conv_tiles, conv_dense and conv_choice against the row by row convolution."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from fisedit_compile.operators import conv_choice, conv_dense, conv_tiles, pack_conv_weight, pack_tile_weights
from fisedit_compile.operators.choosing import taken
from fisedit_compile.operators.convolution import aten, native, tiles
from fisedit_compile.operators.convolution.spec import ConvolutionCase
from fisedit_compile.operators.products import native as products
from fisedit_compile.passes.processor.choose_convolution import tile_stencils
from fisedit_compile.runtime.plans import IndexPlan, build_plan
from fisedit_compile.runtime.spec import Domain, PlanInput
from support.choices import favour
from support.sparse_maps import Case, masks, window
from support.tolerances import assert_near

CHANNELS, OUTPUTS = 5, 7


class Setting:
    """A mask on a map of even size, with the plans of rows and of tiles."""

    def __init__(self, data: st.DataObject, channels: int = CHANNELS, outputs: int = OUTPUTS) -> None:
        self.outputs = outputs
        self.domain = Domain(2 * data.draw(st.integers(1, 5)), 2 * data.draw(st.integers(1, 5)))
        self.batch = data.draw(st.integers(1, 3))
        self.mask = data.draw(masks(self.domain, self.batch))
        self.case = Case.build(self.mask, window(self.domain), self.batch, channels)
        self.patches, self.places = tile_stencils(self.domain)
        self.plan: IndexPlan = build_plan(self.mask, [], [self.patches, self.places], "cpu")
        self.weight = torch.randn(outputs, channels, 3, 3, dtype=torch.float64)
        self.bias = data.draw(st.sampled_from([None, torch.randn(outputs, dtype=torch.float64)]))

    @property
    def tile_plan(self) -> list[Tensor]:
        wanted = [("halo", self.patches), ("table", self.patches), ("table", self.places), ("subposition", self.places)]
        tensors = [self.plan.tensor(PlanInput(kind, stencil)) for kind, stencil in wanted]
        return [tensor for tensor in tensors if tensor is not None]

    def expected(self) -> Tensor:
        return self.case.target_rows(functional.conv2d(self.case.dense_mixed(), self.weight, self.bias, padding=1))

    def check(self, result: Tensor, dtype: torch.dtype = torch.float64) -> None:
        """Valid rows are those of the dense convolution, in memory order."""
        assert result.is_contiguous() and result.shape == (self.batch, self.case.rows.shape[1], self.outputs)
        valid, expected = self.case.source("valid"), self.expected()
        if valid is not None:
            inside = valid.expand(self.batch, -1)[..., None]
            result, expected = torch.where(inside, result, 0), torch.where(inside, expected, 0)
        assert_near(result.double(), expected, dtype=dtype)


@pytest.mark.parametrize("chunk_bytes", [1, 3000, 1 << 30])
@given(data=st.data())
def test_tiles(data: st.DataObject, chunk_bytes: int) -> None:
    setting = Setting(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "CHUNK_BYTES", chunk_bytes)
        weights = pack_tile_weights(setting.weight)
        rows = setting.case.rows
        setting.check(conv_tiles(rows, setting.case.recorded, *setting.tile_plan, weights, setting.bias))


def check_float32(setting: Setting, weights: list[Tensor]) -> None:
    """Tiles of float32 against the dense convolution."""
    bias = None if setting.bias is None else setting.bias.float()
    rows, recorded = setting.case.rows.float(), setting.case.recorded.float()
    setting.check(conv_tiles(rows, recorded, *setting.tile_plan, weights, bias), torch.float32)


@given(data=st.data())
def test_tiles_of_float32_are_packed(data: st.DataObject) -> None:
    setting = Setting(data)
    weights = pack_tile_weights(setting.weight.float())
    assert len(weights) == 16 and all(weight.is_mkldnn for weight in weights)
    check_float32(setting, weights)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, 5000, 1 << 30])
@given(data=st.data())
def test_compiled_tiles(data: st.DataObject, chunk_bytes: int, ordered: bool) -> None:
    """Channels that fill vectors are transformed by compiled code, with weights in any order."""
    setting = Setting(data, channels=data.draw(st.sampled_from([16, 48])), outputs=32)
    if native.supports(torch.float32, torch.device("cpu"), 16, 32) is not None:
        pytest.skip("nothing is compiled on this machine")
    weights = pack_tile_weights(setting.weight.float())
    if ordered:
        weights = [products.order(weight.to_dense()) for weight in weights]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "CHUNK_BYTES", chunk_bytes)
        patch.setattr(tiles, "_transforms", None)  # of PyTorch's way
        check_float32(setting, weights)


def test_which_tiles_are_compiled() -> None:
    cpu = torch.device("cpu")
    if native.supports(torch.float32, cpu, 16, 32) is not None:
        pytest.skip("nothing is compiled on this machine")
    assert "float32" in (native.supports(torch.float64, cpu, 16, 32) or "")
    assert "processor" in (native.supports(torch.float32, torch.device("meta"), 16, 32) or "")
    for channels in ((20, 32), (16, 4)):
        assert "multiple of 16" in (native.supports(torch.float32, cpu, *channels) or "")


def test_transformed_weights_do_not_depend_on_how_they_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(9, 4, 3, 3, dtype=torch.float64)
    whole = pack_tile_weights(weight)
    kernel = torch.tensor(tiles.KERNEL, dtype=torch.float64)
    expected = torch.einsum("ia,jb,ocab->ijoc", kernel, kernel, weight).flatten(0, 1)
    assert_near(torch.stack(whole), expected)
    assert all(part.is_contiguous() for part in whole)


@given(data=st.data())
def test_dense(data: st.DataObject) -> None:
    setting = Setting(data)
    size = (setting.domain.height, setting.domain.width)
    index, valid = setting.case.source("index"), setting.case.source("valid")
    rows = setting.case.rows
    setting.check(conv_dense(rows, setting.case.recorded, index, valid, setting.weight, setting.bias, *size))


@pytest.mark.parametrize("fastest", ["rows", "tiles", "dense"])
@given(data=st.data())
def test_the_fastest_way_is_taken(data: st.DataObject, fastest: str) -> None:
    setting = Setting(data)
    with pytest.MonkeyPatch.context() as patch, taken.apart() as counts:
        table = favour(patch, fastest)
        patch.setattr(aten, "DENSE_FROM", 0.0)
        index, valid = setting.case.source("index"), setting.case.source("valid")
        result = conv_choice(
            setting.case.rows,
            setting.case.recorded,
            setting.case.taps("halo"),
            setting.case.taps("table"),
            pack_conv_weight(setting.weight, False, 1),
            setting.bias,
            setting.tile_plan,
            pack_tile_weights(setting.weight),
            index,
            valid,
            setting.weight,
            setting.domain.height,
            setting.domain.width,
        )
    ((operator, case, names),) = table.asked
    assert (operator, names) == ("convolution", ("rows", "tiles", "dense"))
    assert case[:6] == (setting.batch, setting.domain.height, setting.domain.width, CHANNELS, OUTPUTS, "float64")
    assert counts == {f"convolution: {fastest}": 1}
    setting.check(result)


@pytest.mark.parametrize("available", [False, True])
@given(data=st.data())
def test_tiles_that_are_compiled_take_the_place_of_the_others(data: st.DataObject, available: bool) -> None:
    setting = Setting(data, 16, 32)
    if native.supports(torch.float32, torch.device("cpu"), 16, 32) is not None:
        pytest.skip("nothing is compiled on this machine")
    case, weight = setting.case, setting.weight.float()
    bias = None if setting.bias is None else setting.bias.float()
    with pytest.MonkeyPatch.context() as patch:
        table = favour(patch, "rows")
        patch.setattr(aten, "DENSE_FROM", 2.0)
        if not available:
            patch.setattr(native, "_library", lambda: None)
        rows = (case.rows.float(), case.recorded.float(), case.taps("halo"), case.taps("table"))
        packed = (pack_conv_weight(weight, False, 1), bias, setting.tile_plan, pack_tile_weights(weight))
        whole = (case.source("index"), case.source("valid"), weight, setting.domain.height, setting.domain.width)
        conv_choice(*rows, *packed, *whole)
    assert [asked.names for asked in table.asked] == [("rows", "compiled tiles" if available else "tiles")]


def test_cases_differ_by_what_times_depend_on() -> None:
    base = (2, 64, 64, 320, 320, 400, 110, torch.float32)
    changes = [(0, 1), (1, 32), (2, 32), (3, 640), (4, 640), (5, 600), (6, 200), (7, torch.bfloat16)]
    cases = {ConvolutionCase.of(*base)}
    for at, value in changes:
        cases.add(ConvolutionCase.of(*base[:at], value, *base[at + 1 :]))  # type: ignore[arg-type]
    assert len(cases) == len({str(case) for case in cases}) == 1 + len(changes)
    assert "2x64x64 320->320 float32, about 431 rows, tiles 88% full" in map(str, cases)
    assert ConvolutionCase.of(*base[:5], 401, *base[6:]) in cases, "rows that are nearly as many are one case"
