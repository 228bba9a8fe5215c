"""Class labels are content: an edit may change them. Timesteps stay those of the recording, also as integers."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from torch import Tensor, nn
from torch.nn import functional

import fisedit_compile as fisedit
from fisedit_compile.errors import ScalarMismatchError
from support.harness import Case, MaskRecipe, compile_network, dense_outputs
from support.networks import Network
from support.tolerances import assert_identical, assert_near

CLASSES, CHANNELS = 10, 12


@dataclass(frozen=True)
class Labelled(Network):
    """A network of a map, timesteps and class labels."""

    def inputs(self, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        (picture, *_) = super().inputs(seed, dtype)
        return picture, torch.tensor([500, 500]), torch.tensor([(1 + 3 * seed) % CLASSES, (4 + seed) % CLASSES])


class Positional(nn.Module):
    """A network of diffusers that takes timesteps and class labels by position."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        return self.network(x, timesteps, class_labels=labels).sample


class Guided(nn.Module):
    """Labels that are dropped by a comparison, and joined with those of no class, as networks with guidance do."""

    def __init__(self, table: bool = False) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, CHANNELS, 3, padding=1), nn.Conv2d(CHANNELS, 3, 3, padding=1)
        self.time = nn.Embedding(1000, CHANNELS) if table else None
        self.table = nn.Embedding(CLASSES + 1, CHANNELS)

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        labels = torch.where(labels == 0, CLASSES, labels.long())
        both = self.table(torch.cat([labels, torch.full_like(labels, CLASSES)]))
        if self.time is not None:
            time = self.time(timesteps)
        else:
            time = torch.sin(timesteps[:, None].float() * torch.linspace(0.01, 1, CHANNELS, device=x.device))
        embedding = time + both[:2] - 0.5 * both[2:]
        return self.leave(torch.tanh(self.enter(x) + embedding[:, :, None, None]))


def unet(**options: object) -> nn.Module:
    """A class-conditional U-Net of one level."""
    network = UNet2DModel(
        in_channels=3,
        out_channels=3,
        block_out_channels=(CHANNELS,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=CLASSES,
        add_attention=False,
        resnet_time_scale_shift="scale_shift",
        **options,
    )
    return Positional(network)


def transformer() -> nn.Module:
    """DiT of diffusers, one block."""
    network = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=3,
        out_channels=3,
        num_layers=1,
        sample_size=22,
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
        norm_num_groups=4,
    )
    return Positional(network)


SHAPES = ((2, 3, 13, 9), (2,), (2,))
UNET = Labelled("labelled unet", unet, SHAPES)
DIT = Labelled("labelled dit", transformer, ((2, 3, 22, 22), (2,), (2,)))
GUIDED = Labelled("guided", Guided, SHAPES)


def check_edits(case: Case) -> None:
    """Edits to new labels, with and without a new picture, are those of the reference."""
    base, new = case.network.inputs(0), case.network.inputs(1)
    for inputs in (new, (*base[:2], new[2])):
        mask = case.mask(MaskRecipe("per-sample", 5))
        outputs = case.edit(inputs, mask)
        case.assert_outside_untouched(outputs, mask)
        case.assert_all_near(outputs, case.expected(inputs, mask), "against the reference")
        assert not torch.equal(outputs[0], case.recorded[0])
    case.assert_all_near(case.edit(base, mask), case.recorded, "with unchanged inputs")
    for output, recorded in zip(case.edit(new, torch.zeros(case.network.resolution)), case.recorded, strict=True):
        assert_identical(output, recorded, "with an empty mask")
    assert case.runtime.stats.calls["dense"] == 0
    with pytest.raises(ScalarMismatchError, match=r"scalar input 0: expected \[500, 500\]"):
        case.edit((new[0], torch.tensor([500, 400]), new[2]), mask)


@pytest.mark.parametrize("norm", ["exact", "cached"])
def test_an_edit_may_change_the_label(norm: str) -> None:
    case = compile_network(UNET, norm=norm, convolution="rows", traced_once=True)
    check_edits(case)
    full = torch.ones(UNET.resolution)
    if norm == "exact":
        case.assert_all_near(case.edit(UNET.inputs(1), full), dense_outputs(UNET, 1), "with a full mask")
    first, second = case.mask(MaskRecipe("rectangle", 4)), case.mask(MaskRecipe("per-sample", 2))
    with case.runtime.edit("base", mask=first, save_as="second"):
        saved = case.call(UNET.inputs(1))
    recording = case.reference.edit(case.recording, UNET.inputs(1), first)
    case.assert_all_near(saved, recording.outputs, "saved")
    expected = case.reference.edit(recording, UNET.inputs(2), second).outputs
    case.assert_all_near(case.edit(UNET.inputs(2), second, "second"), expected, "an edit of the saved edit")
    with pytest.raises(ScalarMismatchError, match="scalar input 0"):
        case.edit((UNET.inputs(2)[0], torch.tensor([1, 1]), UNET.inputs(2)[2]), second, "second")


@pytest.mark.parametrize("network", [DIT, GUIDED], ids=["dit", "guided"])
def test_labels_of_other_networks(network: Labelled) -> None:
    check_edits(compile_network(network, convolution="rows"))


def test_labels_beside_timesteps_that_are_looked_up_stay_scalars() -> None:
    network = Labelled("looked up", functools.partial(Guided, table=True), SHAPES)
    case = compile_network(network)
    base, new = network.inputs(0), network.inputs(1)
    for inputs in ((base[0], base[1] - 1, base[2]), (*base[:2], new[2])):
        with pytest.raises(ScalarMismatchError):
            case.edit(inputs, torch.ones(network.resolution))


def test_one_recording_takes_several_labels_call_by_call() -> None:
    """As in guidance with two calls for each step, of which one has no class."""
    runtime = fisedit.Runtime()
    module = torch.compile(GUIDED.module(), backend="fisedit", options={"runtime": runtime})
    picture, time, labels = GUIDED.inputs(0)
    mask = MaskRecipe("rectangle", 4).draw(GUIDED.resolution)
    with torch.no_grad(), runtime.record("base"):
        recorded = [module(picture, time, given) for given in (labels, torch.zeros_like(labels))]
    with torch.no_grad(), runtime.edit("base", mask=mask):
        edited = [module(picture, time, given) for given in (labels + 1, torch.zeros_like(labels))]
    with torch.no_grad():
        dense = GUIDED.module()(picture, time, labels + 1)
    inner = functional.max_pool2d(1 - mask[None].float(), 3, 1, 1)[0] == 0
    assert_near(edited[0][..., inner], dense[..., inner], "inside the mask, away from its border")
    assert_identical(edited[0][..., ~mask], recorded[0][..., ~mask], "outside the mask")
    assert_near(edited[1], recorded[1], "the call without a class")
