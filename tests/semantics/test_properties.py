"""What an edit promises, for every test network: equal to dense, to the recording, or to the masked reference."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import example, given, settings
from torch import nn
from torch.nn import functional

from support.composite_networks import COMPOSITES
from support.diffusers_networks import DIFFUSERS
from support.harness import Case, MaskRecipe, compile_network, dense_outputs, recipes
from support.networks import Network
from support.shape_networks import BLOCKS
from support.tolerances import assert_identical

KEEPS_DYNAMO = True  # the tests of a network share one compilation

NETWORKS = [*BLOCKS, *COMPOSITES, *DIFFUSERS]


def has_group_norm(network: Network) -> bool:
    """Whether the option ``norm`` makes a difference."""
    return any(isinstance(module, (nn.GroupNorm, nn.InstanceNorm2d)) for module in network.module().modules())


#: Their norms are those of other networks of diffusers here, and compiling them takes long.
EXACT_ONLY = set() if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" else {"sd21", "sdxl"}
CASES = [(network, "exact") for network in NETWORKS]
CASES += [(network, "cached") for network in NETWORKS if has_group_norm(network) and network.name not in EXACT_ONLY]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0].name}, {case[1]}")
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    """A compiled and recorded network."""
    torch.compiler.reset()
    yield compile_network(request.param[0], norm=request.param[1], traced_once=True)


def test_outside_a_context_it_is_the_dense_network(case: Case) -> None:
    outputs = case.call(case.network.inputs(1))
    case.assert_all_near(outputs, dense_outputs(case.network, 1), "outside a context")


def test_recording_is_the_dense_network(case: Case) -> None:
    case.assert_all_near(case.recorded, dense_outputs(case.network, 0), "recorded")


def test_full_mask_is_the_dense_network(case: Case) -> None:
    if case.reference.norm == "cached":
        expected = case.expected(case.network.inputs(1), torch.ones(1, 1))
    else:
        expected = dense_outputs(case.network, 1)
    outputs = case.edit(case.network.inputs(1), torch.ones(case.network.resolution))
    case.assert_all_near(outputs, expected, "with a full mask")


def test_empty_mask_is_the_recording(case: Case) -> None:
    outputs = case.edit(case.network.inputs(1), torch.zeros(case.network.resolution))
    for output, recorded in zip(outputs, case.recorded, strict=True):
        assert_identical(output, recorded, "with an empty mask")
        output.add_(1.0)  # the caller owns the result; the base must not see this
    again = case.edit(case.network.inputs(1), torch.zeros(case.network.resolution))
    for output, recorded in zip(again, case.recorded, strict=True):
        assert_identical(output, recorded, "with an empty mask, after writing to an earlier result")


@given(recipe=recipes())
@example(MaskRecipe("ragged", 3))
@example(MaskRecipe("per-sample", 5))
@settings(max_examples=settings().max_examples - 1)
def test_any_mask_is_the_masked_reference(case: Case, recipe: MaskRecipe) -> None:
    mask, inputs = case.mask(recipe), case.network.inputs(2 + recipe.seed % 3)
    outputs = case.edit(inputs, mask)
    case.assert_outside_untouched(outputs, mask)
    case.assert_all_near(outputs, case.expected(inputs, mask), f"against the reference, {recipe}")


@given(recipe=recipes())
@example(MaskRecipe("ragged", 3))
@settings(max_examples=settings().max_examples // 2)
def test_unchanged_inputs_are_the_recording(case: Case, recipe: MaskRecipe) -> None:
    outputs = case.edit(case.network.inputs(0), case.mask(recipe))
    case.assert_all_near(outputs, case.recorded, f"with unchanged inputs, {recipe}")


@pytest.mark.parametrize("network", [n for n in NETWORKS if n.radius is not None], ids=lambda network: network.name)
def test_grown_mask_is_the_dense_network(network: Network) -> None:
    """What changes nothing beyond its receptive field is exact once the mask covers that."""
    torch.compiler.reset()
    case = compile_network(network, traced_once=True)
    module = network.module()
    (base,), (new,) = network.inputs(0), network.inputs(1)
    size = 2 * (network.radius or 0) + 1
    for kind in ("pixel", "border", "sparse"):
        changed = MaskRecipe(kind, 4).draw(network.resolution)
        mask = functional.max_pool2d(changed[None, None].float(), size, 1, size // 2)[0, 0]
        inputs = (torch.where(changed, new, base),)
        case.assert_all_near(case.edit(inputs, mask), (module(*inputs),), f"with a grown mask, {kind}")
