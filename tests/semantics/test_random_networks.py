"""Networks put together at random from the blocks of the others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import assume, given, settings, strategies
from torch import nn
from torch.nn import functional

from support.blocks import (
    CHANNELS,
    EMBEDDING,
    TOKENS,
    AdaptiveNorm,
    Attention,
    Chain,
    ChannelNorm,
    ConvNext,
    GatedFeedForward,
    Map,
    OnChannelsLast,
    OnTokens,
    PackedAttention,
    Residual,
    ResnetBlock,
    SingleHeadAttention,
    SqueezeExcite,
    activation,
    convolution,
    transposed,
)
from support.harness import MaskRecipe, compile_network, recipes, reference_of
from support.networks import TEXT, Network
from support.reference import AmbiguousShapeError

SIZES = ((26, 22), (23, 17), (19, 29))

MENU: dict[str, Callable[[], nn.Module]] = {
    "convolution": convolution,
    "pointwise": lambda: convolution(kernel=1),
    "dilated": lambda: convolution(dilation=2, padding=2),
    "grouped": lambda: convolution(groups=2, kernel=(1, 3)),
    "even": lambda: convolution(kernel=(2, 4), padding="same"),
    "valid": lambda: convolution(padding=0),
    "activation": activation,
    "residual": lambda: Residual(activation(), convolution()),
    "resnet": ResnetBlock,
    "resnet scale shift": lambda: ResnetBlock(scale_shift=True),
    "group norm": lambda: Map(nn.GroupNorm(2, CHANNELS)),
    "instance norm": lambda: Map(nn.InstanceNorm2d(CHANNELS)),
    "batch norm": lambda: Map(nn.BatchNorm2d(CHANNELS)),
    "channel norm": ChannelNorm,
    "channels last": lambda: OnChannelsLast(nn.Sequential(nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, CHANNELS))),
    "rms": lambda: OnTokens(nn.RMSNorm(CHANNELS)),
    "attention": Attention,
    "attention folded": lambda: Attention(form="baddbmm"),
    "attention packed": PackedAttention,
    "attention single": SingleHeadAttention,
    "cross": lambda: Attention(cross=True),
    "joint": lambda: Attention(form="joint"),
    "adaptive": AdaptiveNorm,
    "feed-forward": lambda: OnTokens(GatedFeedForward()),
    "squeeze-excite": SqueezeExcite,
    "convnext": ConvNext,
    "flip": lambda: Map(lambda x: torch.flip(x, [2])),
    "stride": lambda: convolution(stride=2),
    "asymmetric stride": lambda: Map(nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(CHANNELS, CHANNELS, 3, 2))),
    "average": lambda: Map(nn.AvgPool2d(2)),
    "maximum": lambda: Map(nn.MaxPool2d(3, 2, 1)),
    "nearest": lambda: Map(nn.Upsample(scale_factor=2)),
    "bilinear": lambda: Map(nn.Upsample(scale_factor=1.5, mode="bilinear")),
    "transposed": lambda: transposed(kernel_size=4, stride=2, padding=1),
    "shuffle": lambda: Map(nn.Sequential(nn.Conv2d(CHANNELS, 4 * CHANNELS, 1), nn.PixelShuffle(2))),
    "concatenated": lambda: Map(lambda x: torch.cat([x[:, 4:], functional.silu(x[:, :4])], dim=1)),
}
CHANGES_SIZE = ("stride", "asymmetric stride", "average", "maximum", "nearest", "bilinear", "transposed", "shuffle")


def random_networks() -> strategies.SearchStrategy[Network]:
    """Two to five blocks behind a convolution, at most two of which change the resolution."""

    def network(names: list[str], size: tuple[int, int], batch: int) -> Network:
        shapes = ((batch, CHANNELS, *size), (batch, EMBEDDING), (batch, TEXT, TOKENS))
        return Network(" > ".join(names), lambda: Chain(convolution(), *(MENU[name]() for name in names)), shapes)

    return strategies.builds(
        network,
        strategies.lists(strategies.sampled_from(sorted(MENU)), min_size=2, max_size=5).filter(
            lambda names: sum(name in CHANGES_SIZE for name in names) <= 2
        ),
        strategies.sampled_from(SIZES),
        strategies.integers(1, 2),
    )


@given(network=random_networks(), drawn=strategies.lists(recipes(), min_size=2, max_size=2))
@settings(max_examples=settings().max_examples + 7)
def test_random_networks(network: Network, drawn: list[MaskRecipe]) -> None:
    torch.compiler.reset()
    try:
        reference = reference_of(network)
    except AmbiguousShapeError:
        assume(False)
    assume(all(height * width > 48 for height, width in reference.resolutions))  # clear of the channel counts
    for norm in ("exact", "cached") if "norm" in network.name or "resnet" in network.name else ("exact",):
        torch.compiler.reset()
        case = compile_network(network, norm=norm)
        for recipe in drawn:
            mask, inputs = case.mask(recipe), network.inputs(1)
            outputs = case.edit(inputs, mask)
            case.assert_outside_untouched(outputs, mask)
            case.assert_all_near(outputs, case.expected(inputs, mask), f"{norm}, {recipe}")
        unchanged = case.edit(network.inputs(0), case.mask(drawn[0]))
        case.assert_all_near(unchanged, case.recorded, f"{norm}, unchanged inputs")
    reference_of.cache_clear()
