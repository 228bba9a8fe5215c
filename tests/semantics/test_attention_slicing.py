"""Attention computed a few heads at a time is as sparse as attention at once, and computes the same."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    SlicedAttnAddedKVProcessor,
    SlicedAttnProcessor,
)
from torch import Tensor, nn

import fisedit_compile as fisedit
from support.diffusers_networks import unet
from support.harness import MaskRecipe, compile_network, compiled
from support.networks import Network
from support.tolerances import assert_near

CHANNELS, HEADS, TOKENS = 12, 3, 20
SHAPES = ((2, 3, 13, 9), (2, 7, TOKENS), (2, 7))


class Attending(nn.Module):
    """Self-attention, and cross-attention to a prompt with a mask, between two convolutions."""

    def __init__(self, processor: Any) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, CHANNELS, 3, padding=1), nn.Conv2d(CHANNELS, 3, 3, padding=1)
        options: dict[str, Any] = {"heads": HEADS, "dim_head": 4, "residual_connection": True, "processor": processor}
        self.self_attention = Attention(CHANNELS, upcast_softmax=True, **options)
        self.cross_attention = Attention(CHANNELS, cross_attention_dim=TOKENS, **options)

    def forward(self, x: Tensor, prompt: Tensor, mask: Tensor) -> Tensor:
        hidden = self.self_attention(self.enter(x))
        attended = self.cross_attention(hidden, encoder_hidden_states=prompt, attention_mask=mask[:, None])
        return self.leave(attended)


class AddedKeys(nn.Module):
    """Attention to the picture and to a prompt at once."""

    def __init__(self, processor: Any) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, CHANNELS, 3, padding=1), nn.Conv2d(CHANNELS, 3, 3, padding=1)
        self.attention = Attention(
            CHANNELS,
            heads=HEADS,
            dim_head=4,
            bias=True,
            added_kv_proj_dim=TOKENS,
            norm_num_groups=4,
            processor=processor,
        )

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        return self.leave(self.attention(self.enter(x), encoder_hidden_states=prompt))


def share(module: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    return fisedit.explain(module.eval().requires_grad_(False), *inputs).sparse_mac_fraction


# The reference takes slices of as many heads as there are samples, or a multiple of them, for samples.
@pytest.mark.parametrize(
    ("build", "sliced"),
    [(Attending, SlicedAttnProcessor(5)), (AddedKeys, SlicedAttnAddedKVProcessor(3))],
    ids=["five and one", "added keys"],
)
def test_sliced_attention(build: type[nn.Module], sliced: Any) -> None:
    shapes = SHAPES if build is Attending else SHAPES[:2]
    network = Network(f"{build.__name__} {sliced.slice_size}", functools.partial(build, sliced), shapes)
    case = compile_network(network, convolution="rows")
    case.check_edits(MaskRecipe("per-sample", 5), MaskRecipe("rectangle", 4))
    assert share(network.module(), network.inputs(0)) > 0.99


def small_unet() -> nn.Module:
    return unet(
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        block_out_channels=(12,),
        attention_head_dim=6,  # diffusers means heads
        mid_block_type=None,
    )


UNET_INPUTS = (torch.randn(2, 4, 14, 10), torch.tensor(500.0), torch.randn(2, 7, TOKENS))


@functools.cache
def share_without_slices() -> float:
    return share(small_unet(), UNET_INPUTS)


@pytest.mark.parametrize("size", ["auto", "max"])
def test_a_unet_with_slices_is_as_sparse_as_without(size: str) -> None:
    network = small_unet()
    network.network.set_attention_slice(size)
    assert share(network, UNET_INPUTS) == share_without_slices() > 0.9


class ByHand(nn.Module):
    """Attention of as many heads at a time as there are samples, in a form that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, CHANNELS, 3, padding=1), nn.Conv2d(CHANNELS, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.enter(x)
        batch, channels, height, width = hidden.shape
        split = hidden.reshape(batch, HEADS, channels // HEADS, height * width).transpose(2, 3)
        folded = split.reshape(batch * HEADS, height * width, channels // HEADS)
        found = []
        for start in range(0, batch * HEADS, 2):
            part = folded[start : start + 2]
            scores = torch.softmax(torch.cos(torch.bmm(part, part.transpose(1, 2))), dim=-1)
            found.append(torch.bmm(scores, part))
        attended = torch.cat(found).reshape(batch, HEADS, height * width, -1).transpose(2, 3)
        return self.leave(hidden + attended.reshape(hidden.shape))


def test_heads_cut_like_samples_are_not_masked_like_samples() -> None:
    """What a sample becomes does not depend on the masks of others."""
    torch.manual_seed(5)
    module = ByHand().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(6)
    base, new = torch.randn((2, 2, 3, 13, 9), generator=generator)
    masks = torch.zeros((2, 13, 9))
    masks[0, 2:6, 3:7] = 1
    masks[1, 8:12, 1:3] = 1
    runtime = fisedit.Runtime()
    network = compiled(module, runtime)

    def edit(which: slice) -> Tensor:
        with torch.no_grad():
            with runtime.record("base"):
                network(base[which])
            with runtime.edit("base", mask=masks[which]):
                edited = network(new[which])
        runtime.drop("base")
        return edited

    together = edit(slice(0, 2))
    for sample in range(2):
        assert_near(together[sample], edit(slice(sample, sample + 1))[0], f"sample {sample} alone")
