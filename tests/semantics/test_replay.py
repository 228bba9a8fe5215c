"""Edits whose launches are captured and replayed keep every promise, for masks and inputs the capture never saw."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fisedit_compile import backend
from support.composite_networks import COMPOSITES
from support.diffusers_networks import DIFFUSERS
from support.harness import DEVICE, Case, MaskRecipe, compile_network
from support.networks import Network
from support.shape_networks import BLOCKS
from support.tape import TapeCapturer, only_operators
from support.tolerances import assert_identical

KEEPS_DYNAMO = True  # the tests of a network share one compilation

#: Capturing knows nothing of operators: some networks of each kind are enough.
NETWORKS: list[Network] = [*BLOCKS[::12], *COMPOSITES[::2], *(net for net in DIFFUSERS if net.name == "sd15")]


@pytest.fixture(scope="module", params=NETWORKS, ids=lambda network: network.name)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    """A recorded network whose edits are captured: by CUDA on a GPU, by a tape elsewhere."""
    torch.compiler.reset()
    with pytest.MonkeyPatch.context() as patch, only_operators():
        if DEVICE == "cpu":
            patch.setattr(backend, "capturer_for", lambda devices: TapeCapturer())
        # Packed weights are opaque to the tape.
        yield compile_network(request.param, packing=False, traced_once=True)


def replays(case: Case) -> int:
    """How many calls were replayed so far."""
    return case.runtime.stats.ways.get("edit graph: replayed", 0)


@pytest.mark.parametrize("kind", ["rectangle", "ragged", "per-sample"])
def test_replays_are_the_masked_reference(case: Case, kind: str) -> None:
    before = replays(case)
    drawn = (case.mask(MaskRecipe(kind, seed, "same")) for seed in range(20))
    first = next((mask for mask in drawn if mask.any()), None)
    if first is None:
        pytest.skip("the map is too small for such a mask")
    # Mirrored masks have as many active positions, elsewhere: they fall into the buckets of the captured one.
    masks = [first, first, first.flip(-1), first.flip(-2), first.flip(-1, -2), first]
    for seed, mask in enumerate(masks):
        inputs = case.network.inputs(1 + seed)
        outputs = case.edit(inputs, mask)
        case.assert_outside_untouched(outputs, mask)
        case.assert_all_near(outputs, case.expected(inputs, mask), f"replayed, mask {seed}")
    assert replays(case) >= before + 2


def test_saved_edits_are_bases_like_any_other(case: Case) -> None:
    before = replays(case)
    mask = case.mask(MaskRecipe("rectangle", 2, "same"))
    for number in range(3):
        inputs = case.network.inputs(1 + number)
        with case.runtime.edit("base", mask=mask, save_as=f"edited {number}"):
            outputs = case.call(inputs)
        case.assert_all_near(outputs, case.expected(inputs, mask), f"saved, edit {number}")
        again = case.edit(inputs, mask, base=f"edited {number}")
        case.assert_all_near(again, outputs, f"edited again with the same inputs, edit {number}")
        case.runtime.drop(f"edited {number}")
    assert replays(case) > before


def test_results_belong_to_the_caller(case: Case) -> None:
    mask, inputs = case.mask(MaskRecipe("rectangle", 3, "same")), case.network.inputs(2)
    results = []
    for _ in range(4):
        outputs = case.edit(inputs, mask)
        results.append([output.clone() for output in outputs])
        for output in outputs:
            output.fill_(float("nan"))
    for later in results[1:]:
        for output, first in zip(later, results[0], strict=True):
            assert_identical(output, first, "after writing to earlier results")
