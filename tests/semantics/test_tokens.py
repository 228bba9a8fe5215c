"""Pictures that come as tokens ``[B, H * W, C]``, which option ``tokens`` lays out in rows and columns."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fisedit_compile as fisedit
from fisedit_compile.errors import OptionError
from fisedit_compile.options import parse_options
from support.harness import MaskRecipe, compile_network, compiled
from support.networks import Network

HEIGHT, WIDTH, PROMPT, CHANNELS, HEADS = 14, 10, 9, 16, 2
COUNT = HEIGHT * WIDTH


def places(height: int, width: int) -> Tensor:
    """Rows and columns of all positions: ``[H * W, 2]``."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns], dim=-1).reshape(-1, 2).float()


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotary embedding of ``[B, T, heads, D]`` by angles ``[T, D / 2]``, neighbouring channels in pairs."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(3)
    cosines, sines = (f(turns).repeat_interleave(2, dim=1)[None, :, None] for f in (torch.cos, torch.sin))
    return x * cosines + turned * sines


class JointBlock(nn.Module):
    """Attention between the tokens of a prompt and of a picture, each with weights of its own (Flux, Qwen-Image)."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(CHANNELS, elementwise_affine=False) for _ in range(2))
        self.packed = nn.ModuleList(nn.Linear(CHANNELS, 3 * CHANNELS) for _ in range(2))
        self.outputs = nn.ModuleList(nn.Linear(CHANNELS, CHANNELS) for _ in range(2))

    def forward(self, prompt: Tensor, x: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
        both = [
            packed(norm(value)).unflatten(2, (3, HEADS, -1)).unbind(2)
            for packed, norm, value in zip(self.packed, self.norms, (prompt, x), strict=True)
        ]
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(*both, strict=True))
        query, key = rotate(query, turns), rotate(key, turns)
        attended = functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (query, key, value)))
        parts = attended.transpose(1, 2).flatten(2).split([PROMPT, x.shape[1]], dim=1)
        return tuple(v + out(p) for v, out, p in zip((prompt, x), self.outputs, parts, strict=True))  # type: ignore[return-value]


class TokenTransformer(nn.Module):
    """A prompt, tokens of a picture and their places: a block with weights for each, then one for what they join to."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.text, self.leave = nn.Linear(12, CHANNELS), nn.Linear(20, CHANNELS), nn.Linear(CHANNELS, 12)
        self.joint = JointBlock()
        self.alone, self.gate = nn.Linear(CHANNELS, 4 * CHANNELS), nn.Linear(CHANNELS + 24, CHANNELS)
        self.register_buffer("frequencies", torch.tensor([[1.0, 0.3], [0.7, 0.2]]))

    def forward(self, tokens: Tensor, prompt: Tensor, where: Tensor) -> Tensor:
        turns = torch.cat([torch.zeros(PROMPT, 2), where]).repeat_interleave(2, dim=1) * self.frequencies.flatten()
        prompt, x = self.joint(self.text(prompt), self.enter(tokens), turns)
        joined = torch.cat([prompt, x], dim=1)
        query, key, value, feed = self.alone(joined).unflatten(2, (4, HEADS, -1)).unbind(2)
        query, key = rotate(query, turns), rotate(key, turns)
        attended = functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (query, key, value)))
        attended, feed = attended.transpose(1, 2).flatten(2), feed.flatten(2)
        joined = joined + self.gate(torch.cat([attended, functional.gelu(feed), feed[..., :8]], dim=2))
        return self.leave(joined[:, PROMPT:])


def flux() -> nn.Module:
    """Flux of diffusers, one block of each kind."""
    from diffusers import FluxTransformer2DModel

    class Positional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = FluxTransformer2DModel(
                patch_size=1,
                in_channels=12,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=20,
                pooled_projection_dim=24,
                axes_dims_rope=(4, 6, 6),
            )

        def forward(self, tokens: Tensor, prompt: Tensor, where: Tensor, pooled: Tensor, timestep: Tensor) -> Tensor:
            where = functional.pad(where, (1, 0))
            return self.network(
                hidden_states=tokens,
                encoder_hidden_states=prompt,
                pooled_projections=pooled,
                timestep=timestep,
                img_ids=where,
                txt_ids=torch.zeros(PROMPT, 3),
                return_dict=False,
            )[0]

    return Positional()


SHAPES = ((2, COUNT, 12), (2, PROMPT, 20), (COUNT, 2))
NETWORKS = [
    (Network("tokens", TokenTransformer, SHAPES, fixed=(2,), tokens=(HEIGHT, WIDTH)), 0.9),
    (Network("flux", flux, (*SHAPES, (2, 24), (2,)), fixed=(2, 4), tokens=(HEIGHT, WIDTH)), 0.9),
]


@pytest.mark.parametrize(("network", "share"), NETWORKS, ids=[network.name for network, _ in NETWORKS])
def test_tokens_are_edited_like_maps(network: Network, share: float) -> None:
    case = compile_network(network, convolution="rows")  # a mask of everything runs the sparse graph, too
    case.check_edits(MaskRecipe("per-sample", 5), MaskRecipe("pixel", 11, "finer"), MaskRecipe("ragged", 3))
    base = network.inputs(0)
    assert fisedit.explain(case.module, *base).sparse_mac_fraction >= share
    assert fisedit.explain(network.module(), *base).sparse_mac_fraction == 0, "without the option"


def record(tokens: Any, count: int = COUNT, places_of: tuple[int, int] = (HEIGHT, WIDTH)) -> fisedit.Runtime:
    """Record one call of the network, compiled with an option ``tokens``."""
    network, runtime = NETWORKS[0][0], fisedit.Runtime()
    module = compiled(network.module(), runtime, tokens=tokens)
    generator = torch.Generator().manual_seed(4)
    given = torch.randn((2, count, 12), generator=generator), network.inputs(0)[1], places(*places_of)
    with torch.no_grad(), runtime.record("base"):
        module(*given)
    return runtime


def test_each_resolution_of_a_list_is_known_by_its_tokens() -> None:
    network, runtime = NETWORKS[0][0], fisedit.Runtime()
    module = compiled(network.module(), runtime, tokens={"tokens": [(6, 10), (HEIGHT, WIDTH)]})
    prompt = network.inputs(0)[1]
    for height, width in ((6, 10), (HEIGHT, WIDTH)):
        first, second = (
            torch.randn((2, height * width, 12), generator=torch.Generator().manual_seed(n)) for n in (1, 2)
        )
        mask = torch.zeros((height, width))
        mask[2:4, 5:] = 1
        with torch.no_grad():
            with runtime.record("base"):
                recorded = module(first, prompt, places(height, width))
            with runtime.edit("base", mask=mask):
                edited = module(second, prompt, places(height, width))
        changed = (edited != recorded).any(dim=2).reshape(2, height, width)
        assert torch.equal(changed, mask.bool().expand_as(changed)), "the mask lies in rows of the right width"
        assert str(next(iter(runtime.stats.density))) == f"{height}x{width}"
        runtime.drop("base")


def test_a_count_of_tokens_that_no_resolution_has_is_an_error() -> None:
    with pytest.raises(
        OptionError, match=r"tokens came with 60 tokens, but option tokens gives it 14x10 \(140 tokens\)"
    ):
        record({"tokens": (HEIGHT, WIDTH)}, 60, (6, 10))


def test_only_floating_tensors_of_rank_three_are_tokens() -> None:
    message = r"option tokens names where, which must be a floating tensor \[B, tokens, C\]; it is \[140, 2\]"
    with pytest.raises(OptionError, match=message):
        record({"where": (HEIGHT, WIDTH)})


def test_a_name_that_no_input_has_leaves_the_graph_dense_with_a_hint(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fisedit_compile"):
        record({"token": (HEIGHT, WIDTH)})
    assert "is not masked: none of its inputs is a picture or a feature map; option tokens makes one of tokens" in (
        caplog.text
    )
    assert "[B, H * W, C], here of prompt or tokens" in caplog.text


def test_explain_takes_positional_arguments_by_name() -> None:
    network = NETWORKS[0][0]
    module = torch.compile(network.module(), backend="fisedit", options={"tokens": {"tokens": (HEIGHT, WIDTH)}})
    tokens, *others = network.inputs(0)
    shares = {
        fisedit.explain(module, tokens, *others).sparse_mac_fraction,
        fisedit.explain(module, tokens, prompt=others[0], where=others[1]).sparse_mac_fraction,
        fisedit.explain(module, where=others[1], tokens=tokens, prompt=others[0]).sparse_mac_fraction,
    }
    assert len(shares) == 1 and shares.pop() > 0.9


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([("tokens", (14, 10))], "got \\[\\('tokens', \\(14, 10\\)\\)\\]"),
        ({"tokens": 140}, "got 'tokens': 140"),
        ({"tokens": []}, "got 'tokens': \\[\\]"),
        ({3: (14, 10)}, "got 3: \\(14, 10\\)"),
        ({"tokens": (14, 0)}, "got \\(14, 0\\) for 'tokens'"),
        ({"tokens": (14, 10.0)}, "got \\(14, 10.0\\) for 'tokens'"),
        (
            {"tokens": [(14, 10), (10, 14)]},
            "several have as many tokens",
        ),
    ],
)
def test_a_malformed_option_is_refused(given: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_options(None, {"tokens": given})
