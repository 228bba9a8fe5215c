"""Other data types than float32: of the network, and of the stored maps."""

from __future__ import annotations

import pytest
import torch

from support.composite_networks import COMPOSITES
from support.diffusers_networks import DIFFUSERS
from support.harness import MaskRecipe, compile_network
from support.shape_networks import BLOCKS
from support.tolerances import assert_identical

ALL = {network.name: network for network in (*BLOCKS, *COMPOSITES, *DIFFUSERS)}
NAMES = (
    "residual convolutions",
    "convolution stride 2 kernel 4",
    "transposed stride 2",
    "group norm",
    "instance norm",
    "batch norm",
    "transformer block",
    "self-attention folded heads",
    "pool average padded",
    "bilinear by factor",
    "squeeze-excite",
    "flip",
    "skip network averaged",
    "sd15",
)
RECIPES = (MaskRecipe("ragged", 3), MaskRecipe("per-sample", 5))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_network_of_another_type(name: str, dtype: torch.dtype) -> None:
    if dtype is torch.float64 and name == "sd15":
        pytest.skip("its timestep embedding computes in float32 whatever the weights are")
    case = compile_network(ALL[name], dtype=dtype, traced_once=True)
    if dtype is torch.float64:
        case.dtype = torch.float32  # the table's row: norm statistics are float32 whatever the network is
    inputs = case.network.inputs(1, dtype)
    for recipe in RECIPES:
        mask = case.mask(recipe)
        outputs = case.edit(inputs, mask)
        case.assert_outside_untouched(outputs, mask)
        case.assert_all_near(outputs, case.expected(inputs, mask), f"{dtype}, {recipe}")
    unchanged = case.edit(case.network.inputs(0, dtype), case.mask(RECIPES[0]))
    case.assert_all_near(unchanged, case.recorded, f"{dtype}, unchanged inputs")
    for output, recorded in zip(case.edit(inputs, torch.zeros(3, 3)), case.recorded, strict=True):
        assert_identical(output, recorded, "empty mask")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norm", ["exact", "cached"])
def test_maps_stored_as_bfloat16(name: str, norm: str) -> None:
    """What lies outside the mask is exact, what is read from the store is rounded."""
    if norm == "cached" and name not in ("group norm", "transformer block", "sd15"):
        pytest.skip("the option makes no difference")
    case = compile_network(ALL[name], norm=norm, storage=torch.bfloat16, traced_once=True)
    exact = compile_network(ALL[name], norm=norm, traced_once=True)
    assert 0 < case.runtime.stats.bytes_stored <= exact.runtime.stats.bytes_stored
    case.dtype = torch.bfloat16  # the row of the table
    inputs = case.network.inputs(1)
    for recipe in RECIPES:
        mask = case.mask(recipe)
        outputs = case.edit(inputs, mask)
        case.assert_outside_untouched(outputs, mask)
        case.assert_all_near(outputs, case.expected(inputs, mask), f"stored as bfloat16, {recipe}")
    mask = case.mask(RECIPES[0])
    with case.runtime.edit("base", mask=mask, save_as="next"):
        case.call(inputs)
    recording = case.reference.edit(case.recording, inputs, mask)
    later, other = case.network.inputs(2), case.mask(RECIPES[1])
    expected = case.reference.edit(recording, later, other).outputs
    case.assert_all_near(case.edit(later, other, base="next"), expected, "edit of an edit")
    for output, recorded in zip(case.edit(inputs, torch.zeros(3, 3)), case.recorded, strict=True):
        assert_identical(output, recorded, "empty mask")
