"""The masked reference against what is known of it without any compiler."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies
from torch import Tensor, nn
from torch.nn import functional

from support.composite_networks import COMPOSITES
from support.harness import MaskRecipe, dense_outputs, recipes, reference_of
from support.networks import Network
from support.reference import AmbiguousShapeError, Place, Reference, locate, reduce_mask
from support.shape_networks import BLOCKS
from support.tolerances import assert_identical, assert_near

SAMPLE = [
    network
    for network in BLOCKS
    if network.name
    in (
        "two convolutions",
        "group norm",
        "instance norm",
        "batch norm",
        "self-attention folded heads",
        "self-attention torch module",
        "transformer block",
        "pixel unshuffle",
        "flip",
        "windows",
        "one row",
    )
] + [network for network in COMPOSITES if network.name in ("skip network averaged", "residual inputs", "many outputs")]
every_network = pytest.mark.parametrize("network", SAMPLE, ids=lambda network: network.name)


def test_every_network_of_the_sample_exists() -> None:
    assert len(SAMPLE) == 14


@given(
    size=strategies.tuples(strategies.integers(1, 12), strategies.integers(1, 12)),
    target=strategies.tuples(strategies.integers(1, 15), strategies.integers(1, 15)),
    seed=strategies.integers(0, 99),
)
@settings(max_examples=50)
def test_masks_reduce_by_adaptive_maximum(size: tuple[int, int], target: tuple[int, int], seed: int) -> None:
    mask = torch.rand(2, *size, generator=torch.Generator().manual_seed(seed)) < 0.2
    expected = functional.adaptive_max_pool2d(mask.float(), target) > 0
    assert_identical(reduce_mask(mask, *target), expected, f"{size} to {target}")


@pytest.mark.parametrize(
    ("shape", "place"),
    [
        ((2, 8, 13, 9), Place(13, 9, 2, flattened=False)),
        ((2, 13, 9, 8), Place(13, 9, 1, flattened=False)),
        ((2, 117, 8), Place(13, 9, 1, flattened=True)),
        ((2, 8, 117), Place(13, 9, 2, flattened=True)),
        ((2, 4, 117, 8), Place(13, 9, 2, flattened=True)),
        ((2, 117, 4, 8), Place(13, 9, 1, flattened=True)),
        ((6, 117, 8), Place(13, 9, 1, flattened=True, folds=3)),
        ((6, 117, 117), Place(13, 9, 1, flattened=True, folds=3)),
        ((2, 8, 6, 5), Place(6, 5, 2, flattened=False)),
        ((2, 8, 1, 1), None),
        ((2, 8), None),
        ((4, 8, 13, 9), None),
        ((5, 117, 8), None),
        ((2, 9, 13, 8), None),
        ((2, 7, 12), None),
    ],
)
def test_resolution_is_recognised_by_shape(shape: tuple[int, ...], place: Place | None) -> None:
    assert locate(shape, 2, [(6, 5), (13, 9)]) == place


def test_a_shape_of_two_resolutions_is_refused() -> None:
    with pytest.raises(AmbiguousShapeError, match="fits"):
        locate((2, 30, 117), 2, [(6, 5), (13, 9)])


def test_a_mask_of_folded_heads_repeats_by_sample() -> None:
    mask = torch.tensor([[[True, False]], [[False, False]]])
    view = Place(1, 2, 1, flattened=True, folds=2).view(mask, 3)
    assert view[:, :, 0].tolist() == [[True, False], [True, False], [False, False], [False, False]]


@every_network
def test_recording_and_full_mask_are_the_dense_network(network: Network) -> None:
    reference = reference_of(network)
    recording = reference.record(network.inputs(0))
    for output, dense in zip(recording.outputs, dense_outputs(network, 0), strict=True):
        assert_near(output, dense, "recorded")
    edited = reference.edit(recording, network.inputs(1), torch.ones(3, 4))
    for output, dense in zip(edited.outputs, dense_outputs(network, 1), strict=True):
        assert_near(output, dense, "full mask")


@every_network
@pytest.mark.parametrize("norm", ["exact", "cached"])
@given(recipe=recipes())
@settings(max_examples=3)
def test_unchanged_inputs_change_nothing(network: Network, norm: str, recipe: MaskRecipe) -> None:
    reference = reference_of(network).with_norm(norm)
    recording = reference.record(network.inputs(0))
    mask = recipe.draw(network.resolution, network.batch)
    for output, recorded in zip(
        reference.edit(recording, network.inputs(0), mask).outputs, recording.outputs, strict=True
    ):
        assert_near(output, recorded, str(recipe))


@every_network
@given(recipe=recipes())
@settings(max_examples=3)
def test_positions_outside_keep_the_recording(network: Network, recipe: MaskRecipe) -> None:
    reference = reference_of(network)
    recording = reference.record(network.inputs(0))
    mask = recipe.draw(network.resolution, network.batch)
    edited = reference.edit(recording, network.inputs(1), mask)
    assert any(inside is not None for inside in reference.inside(mask))
    for output, recorded, inside in zip(edited.outputs, recording.outputs, reference.inside(mask), strict=True):
        if inside is not None:
            outside = ~inside.expand(output.shape)
            assert_identical(output[outside], recorded[outside], "outside")
            if inside.any():
                changed = (output != recorded) & inside
                assert changed.any(), "nothing changed inside the mask"


@pytest.mark.parametrize("network", [network for network in BLOCKS if network.radius == 2][:4], ids=lambda n: n.name)
def test_a_mask_grown_by_the_receptive_field_is_exact(network: Network) -> None:
    reference = reference_of(network)
    changed = MaskRecipe("sparse", 1).draw(network.resolution)
    assert changed.any() and not changed.all()
    (base,), (new,) = network.inputs(0), network.inputs(1)
    inputs = (torch.where(changed, new, base),)
    dense = network.module()(*inputs)
    recording = reference.record((base,))
    grown = functional.max_pool2d(changed[None, None].float(), 5, 1, 2)[0, 0]
    assert_near(reference.edit(recording, inputs, grown).outputs[0], dense, "grown")
    with pytest.raises(AssertionError, match="not grown"):
        assert_near(reference.edit(recording, inputs, changed).outputs[0], dense, "not grown")


def small(module: nn.Module, channels: int = 4) -> tuple[Reference, Tensor, Tensor]:
    """The reference of a module on a map ``[2, channels, 5, 3]``, with two inputs."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn((2, channels, 5, 3), generator=generator)
    new = torch.randn((2, channels, 5, 3), generator=generator) * 2 + 1
    return Reference(module, (base,)), base, new


class Mixed(nn.Module):
    """A global operator behind a map, and a result of it that is no map."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = x.exp().mean(dim=(2, 3))
        return x - mean[:, :, None, None], mean


def test_global_operators_see_the_mixed_map() -> None:
    reference, base, new = small(Mixed())
    mask = MaskRecipe("rectangle", 4).draw((5, 3))
    edited, mean = reference.edit(reference.record((base,)), (new,), mask).outputs
    mixed = torch.where(mask, new, base)
    assert_near(mean, mixed.exp().mean(dim=(2, 3)), "mean")
    expected = torch.where(mask, mixed - mean[:, :, None, None], base - base.exp().mean(dim=(2, 3))[:, :, None, None])
    assert_near(edited, expected, "map")


@pytest.mark.parametrize("norm", ["exact", "cached"])
def test_statistics_of_group_norm(norm: str) -> None:
    torch.manual_seed(3)
    layer = nn.GroupNorm(2, 4)
    layer.weight.data.normal_()
    layer.bias.data.normal_()
    reference, base, new = small(layer.requires_grad_(False))
    reference = reference.with_norm(norm)
    mask = MaskRecipe("rectangle", 4).draw((5, 3))
    mixed = torch.where(mask, new, base)
    source = (mixed if norm == "exact" else base).reshape(2, 2, -1)
    mean, deviation = source.mean(2), (source.var(2, unbiased=False) + 1e-5).sqrt()
    spread = [value.repeat_interleave(2, dim=1)[:, :, None, None] for value in (mean, deviation)]
    normal = (mixed - spread[0]) / spread[1] * layer.weight[:, None, None] + layer.bias[:, None, None]
    expected = torch.where(mask, normal, functional.group_norm(base, 2, layer.weight, layer.bias))
    recording = reference.record((base,))
    edited = reference.edit(recording, (new,), mask)
    assert_near(edited.outputs[0], expected, norm)
    if norm == "cached":  # an edit of the edit goes on with the same statistics
        (name,) = edited.statistics
        again = reference.edit(edited, (base,), mask)
        assert again.statistics[name][0] is recording.statistics[name][0]
        assert_near(again.outputs[0], recording.outputs[0], "back to the base")


def test_an_edit_of_an_edit_starts_from_the_first() -> None:
    reference, base, new = small(nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False))
    left, right = torch.zeros(5, 3), torch.zeros(5, 3)
    left[:, 0], right[:, 2] = 1, 1
    first = reference.edit(reference.record((base,)), (new,), left)
    second = reference.edit(first, (base,), right)
    assert_identical(second.outputs[0][..., :2], first.outputs[0][..., :2], "outside the second mask")
    mixed = torch.where(left > 0, new, base)
    dense = reference.record((mixed,)).outputs[0]
    assert_near(second.outputs[0][..., 2], dense[..., 2], "inside the second mask")


def test_empty_mask_and_no_mask() -> None:
    reference, base, new = small(nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False))
    recording = reference.record((base,))
    assert reference.edit(recording, (new,), torch.zeros(2, 2)) is recording
    dense = reference.record((new,)).outputs[0]
    assert_identical(reference.edit(recording, (new,), None).outputs[0], dense, "no mask")
