"""Recordings on the host keep every promise: what is read too early or forgotten too soon would be NaN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fisedit_compile.runtime import tiers
from support.composite_networks import COMPOSITES
from support.diffusers_networks import DIFFUSERS
from support.harness import DEVICE, Case, MaskRecipe, compile_network
from support.lanes import LateLane
from support.networks import ATTENTION, Network
from support.shape_networks import BLOCKS
from support.tolerances import assert_identical

KEEPS_DYNAMO = True  # the tests of a network share one compilation

NETWORKS: list[Network] = [
    *BLOCKS[::20],
    *(network for network in ATTENTION if network.name == "self-attention"),
    *(network for network in COMPOSITES if network.name in ("skip network strided", "many outputs")),
    *(network for network in DIFFUSERS if network.name == "sd15"),
]


@pytest.fixture(scope="module", params=NETWORKS, ids=lambda network: network.name)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    """A network recorded on the host: by CUDA on a GPU, by copies that come late elsewhere."""
    torch.compiler.reset()
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setattr(tiers, "lane_for", lambda device: LateLane())
        yield compile_network(request.param, tier="host", traced_once=True)


@pytest.mark.parametrize("kind", ["rectangle", "ragged", "per-sample"])
def test_edits_are_the_masked_reference(case: Case, kind: str) -> None:
    for seed in range(3):
        mask, inputs = case.mask(MaskRecipe(kind, seed, "same")), case.network.inputs(1 + seed)
        outputs = case.edit(inputs, mask)
        case.assert_outside_untouched(outputs, mask)
        case.assert_all_near(outputs, case.expected(inputs, mask), f"from the host, mask {seed}")


def test_saved_edits_are_bases_like_any_other(case: Case) -> None:
    mask, inputs = case.mask(MaskRecipe("rectangle", 2, "same")), case.network.inputs(2)
    with case.runtime.edit("base", mask=mask, save_as="edited"):
        outputs = case.call(inputs)
    empty = torch.zeros(case.network.resolution)
    for output, again in zip(outputs, case.edit(inputs, empty, base="edited"), strict=True):
        assert_identical(again, output, "the saved output")
    case.assert_all_near(case.edit(inputs, mask, base="edited"), outputs, "edited again with the same inputs")
    case.runtime.drop("edited")


def test_edits_that_change_nothing_give_the_recording(case: Case) -> None:
    mask = case.mask(MaskRecipe("ragged", 4, "same"))
    case.assert_all_near(case.edit(case.network.inputs(0), mask), case.recorded, "with the recorded inputs")
