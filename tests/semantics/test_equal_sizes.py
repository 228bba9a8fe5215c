"""Networks whose channels, heights, widths, positions and batch are equal numbers, around operators without a rule.

The masked reference knows resolutions by shapes and cannot be asked here; what an edit promises can.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fisedit_compile as fisedit
from support.harness import compiled
from support.tolerances import assert_identical, assert_near

Operator = Callable[[Tensor], Tensor]
#: batch, channels, height, width
SIZES = [(2, 64, 8, 8), (1, 256, 16, 16), (2, 8, 8, 8), (8, 8, 8, 8), (6, 4, 6, 4), (4, 16, 4, 8)]


def by_hand(x: Tensor) -> Tensor:
    """A norm of groups, written as a reshape to groups and back."""
    grouped = x.reshape(x.shape[0], 2, -1)
    return ((grouped - grouped.mean(2, keepdim=True)) / (1 + grouped.std(2, keepdim=True))).reshape(x.shape)


def between_channels(x: Tensor) -> Tensor:
    """Attention between channels: the scores have the shape of tokens when there are as many channels as positions."""
    flat = x.flatten(2)
    return ((flat @ flat.transpose(1, 2)).cumsum(-1).softmax(-1) @ flat).view(x.shape)


def between_positions(x: Tensor) -> Tensor:
    """Attention whose scores pass an operator without a rule."""
    tokens = x.flatten(2).transpose(1, 2)
    scores = (tokens @ tokens.transpose(1, 2)).flip(-1).softmax(-1)
    return (scores @ tokens).transpose(1, 2).reshape(x.shape)


def mixed_groups(x: Tensor) -> Tensor:
    """Channels and rows folded into one dimension, scanned, and taken apart."""
    return x.flatten(1, 2).cumsum(1).view(x.shape) * 0.1


def windows(x: Tensor) -> Tensor:
    """Attention within rows: the rows are folded into the batch."""
    batch, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(batch * height, width, channels)
    attended = functional.scaled_dot_product_attention(rows, rows, rows)
    return attended.reshape(batch, height, width, channels).permute(0, 3, 1, 2)


OPERATORS: dict[str, Operator] = {
    "scan of channels": lambda x: x.cumsum(1) * 0.1,
    "scan of rows": lambda x: x.cumsum(2) * 0.1,
    "maximum scan": lambda x: x.cummax(1).values,
    "sorted channels": lambda x: x.sort(dim=1).values,
    "sorted columns": lambda x: x.sort(dim=3).values,
    "flipped": lambda x: x.flip(2),
    "rolled": lambda x: torch.roll(x, (1, 2), (1, 3)),
    "fourier": lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * 0.5, s=x.shape[2:]),
    "fourier of channels": lambda x: torch.fft.fft(x, dim=1).real,
    "sorted tokens": lambda x: x.flatten(2).transpose(1, 2).sort(dim=-1).values.transpose(1, 2).reshape(x.shape),
    "sorted along positions": lambda x: x.flatten(2).sort(dim=-1).values.view(x.shape),
    "channels last": lambda x: x.permute(0, 2, 3, 1).flip(-1).permute(0, 3, 1, 2),
    "between channels": between_channels,
    "between positions": between_positions,
    "norm by hand": by_hand,
    "mixed groups": mixed_groups,
    "windows": windows,
    "swapped": lambda x: x.transpose(2, 3).cummax(2).values.transpose(2, 3),
}


#: Operators that move positions, and with them what a mask allows to change; a skip around them keeps the place.
MOVES: dict[str, Operator] = {"flipped": lambda mask: mask.flip(1), "rolled": lambda mask: mask.roll(2, 2)}


class Around(nn.Module):
    """A convolution, the operator, and what reads it: nothing, an activation and a skip, or a convolution."""

    def __init__(self, operator: Operator, channels: int, behind: str) -> None:
        super().__init__()
        self.operator, self.behind = operator, behind
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm, self.last = nn.GroupNorm(2, channels), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        made = self.operator(hidden)
        if self.behind == "activation":
            return functional.silu(made)
        if self.behind == "skip":
            return hidden + made
        if self.behind == "convolution":
            return self.last(self.norm(made))
        return made


def build(operator: Operator, channels: int, behind: str) -> nn.Module:
    torch.manual_seed(3)
    return Around(operator, channels, behind).requires_grad_(False).eval()


def draw(size: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def check_promises(module: nn.Module, size: tuple[int, int, int, int], moved: Operator = lambda mask: mask) -> None:
    """Full mask: dense. Outside a mask: the recording, bit by bit. Unchanged inputs: the recording.

    ``moved`` tells from the mask ``[B, H, W]`` which positions of the output may change.
    """
    batch, _, height, width = size
    runtime = fisedit.Runtime()
    network = compiled(module, runtime, convolution="rows")  # a mask of everything runs the sparse graph, too
    base, new = draw(size, 1), draw(size, 2)
    with runtime.record("base"):
        recorded = network(base)
    assert_near(recorded, module(base), "recorded")
    mask = torch.ones(batch, height, width, dtype=torch.bool)
    mask[:, 1 : height // 2, 2 : width - 1] = False
    mask[0, height - 1, 0] = False
    with runtime.edit("base", mask=mask):
        edited = network(new)
    outside = ~moved(mask)[:, None].expand(size)
    assert_identical(edited[outside], recorded[outside], "outside the mask")
    assert not torch.equal(edited, recorded), "the edit changed nothing at all"
    with runtime.edit("base", mask=torch.ones(height, width)):
        assert_near(network(new), module(new), "full mask")
    with runtime.edit("base", mask=mask):
        assert_near(network(base), recorded, "unchanged inputs")
    assert runtime.stats.calls["edit"] == 3, "the network runs densely"


@pytest.mark.parametrize("behind", ["nothing", "skip", "convolution"])
@pytest.mark.parametrize("name", OPERATORS)
def test_equal_sizes(name: str, behind: str) -> None:
    """All sizes for what returns the value itself, which nothing but its making tells apart; two for the others."""
    for size in SIZES if behind == "nothing" else SIZES[:3:2]:
        torch.compiler.reset()
        moved = {} if behind == "skip" or name not in MOVES else {"moved": MOVES[name]}
        check_promises(build(OPERATORS[name], size[1], behind), size, **moved)


class Doubled(nn.Module):
    """Four channels become eight, the height of the map, by an operator that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(self.first(x), n=8, dim=1).real


@torch.no_grad()
def test_what_cannot_be_told_runs_densely_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """The output could not be masked, so nothing is: the edit is the dense network, never half of it."""
    module, size = Doubled().requires_grad_(False), (2, 4, 8, 8)
    runtime = fisedit.Runtime()
    network = compiled(module, runtime)
    with runtime.record("base"):
        network(draw(size, 1))
    for seed in (2, 3):
        with runtime.edit("base", mask=torch.eye(8)):
            assert_near(network(draw(size, seed)), module(draw(size, seed)), "dense")
    assert runtime.stats.calls == {"record": 1, "edit": 0, "dense": 2}
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("fisedit_compile")]
    assert "is not masked: its output" in message and "which of its dimensions are positions" in message
    report = fisedit.explain(module, draw(size, 1))
    (miss,) = report.dense_nodes
    assert miss.target == "the whole graph" and miss.reason in message
    assert miss.reason[:40] in str(report)


@torch.no_grad()
def test_no_spatial_input_runs_densely_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    module = nn.Linear(6, 6).requires_grad_(False)
    runtime = fisedit.Runtime()
    network = compiled(module, runtime)
    with runtime.record("base"):
        network(draw((2, 5, 6), 1))
    for seed in (2, 3):
        with runtime.edit("base", mask=torch.eye(8)):
            assert_near(network(draw((2, 5, 6), seed)), module(draw((2, 5, 6), seed)), "dense")
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("fisedit_compile")]
    reason = (
        "none of its inputs is a picture or a feature map; option tokens makes one of tokens [B, H * W, C], here of "
    )
    assert message.endswith(f"runs densely and is not masked: {reason}args[0]")
    (miss,) = fisedit.explain(module, draw((2, 5, 6), 1)).dense_nodes
    assert (miss.target, miss.reason) == ("the whole graph", f"{reason}input")
