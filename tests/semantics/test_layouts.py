"""Pictures given as [B, H, W, C], operators that look at strides, networks that are not one graph."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fisedit_compile as fisedit
from fisedit_compile.errors import FisEditError
from support.harness import compiled
from support.tolerances import assert_identical, assert_near

SIZE = (2, 13, 9, 8)


class First(nn.Module):
    """A block of ConvNeXt: a norm, or something else over the last dimension, comes before the permutation."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first, self.inner = first, nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.first(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Tokens(nn.Module):
    """A block of Swin without windows: attention between all positions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(1, 2)
        return x + self.attention(tokens, tokens, tokens, need_weights=False)[0].reshape(x.shape)


class Windows(nn.Module):
    """Means of overlapping windows of tokens, by strides."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.inner(x).flatten(2).transpose(1, 2).contiguous()
        windows = tokens.as_strided((2, tokens.shape[1] - 2, 3, 8), (tokens.stride(0), 8, 8, 1))
        return self.inner(x) + windows.mean((1, 2))[..., None, None]


def draw(seed: int, size: tuple[int, ...] = SIZE) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def mask() -> Tensor:
    found = torch.zeros(13, 9, dtype=torch.bool)
    found[3:7, 2:5] = True
    return found


def network_of(module: nn.Module, base: Tensor) -> tuple[nn.Module, fisedit.Runtime, nn.Module, Tensor]:
    """The module, its runtime, compiled, and what was recorded from ``base``."""
    runtime = fisedit.Runtime()
    module = module.eval().requires_grad_(False)
    network = compiled(module, runtime)
    with runtime.record("base"):
        return module, runtime, network, network(base).clone()


@torch.no_grad()
@pytest.mark.parametrize(
    "make", [lambda: First(nn.LayerNorm(8)), lambda: First(nn.Linear(8, 8)), Tokens], ids=["norm", "linear", "tokens"]
)
def test_maps_with_channels_last(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    module, runtime, network, recorded = network_of(make(), draw(0))
    with runtime.edit("base", mask=mask()):
        output = network(draw(1))
    assert_identical(output[:, ~mask()], recorded[:, ~mask()], "outside")
    assert (output[:, mask()] != recorded[:, mask()]).all()
    with runtime.edit("base", mask=torch.ones(13, 9)):
        assert_near(network(draw(1)), module(draw(1)), "everything")


@torch.no_grad()
def test_what_looks_at_strides_sees_the_order_of_the_traced_network() -> None:
    torch.manual_seed(0)
    size = (2, 8, 13, 9)
    module, runtime, network, recorded = network_of(Windows(), draw(0, size))
    assert_near(recorded, module(draw(0, size)), "recorded")
    with runtime.edit("base", mask=torch.ones(13, 9)):
        assert_near(network(draw(1, size)), module(draw(1, size)), "everything")
    with runtime.edit("base", mask=mask()):
        assert_near(network(draw(0, size)), recorded, "unchanged")


class Half(nn.Module):
    """A network whose last layer PyTorch's compiler must not see."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    @torch.compiler.disable
    def finish(self, x: Tensor) -> Tensor:
        return self.last(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.first(x))


@torch.no_grad()
def test_a_network_that_is_not_one_graph_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fisedit_compile"):
        network_of(Half(), draw(0, (2, 8, 13, 9)))
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("fisedit_compile")]
    assert "is not the whole network" in message and "positions outside the mask may change" in message
    caplog.clear()
    with caplog.at_level(logging.WARNING, "fisedit_compile"):
        network_of(Windows(), draw(0, (2, 8, 13, 9)))
    assert not caplog.records


@torch.no_grad()
def test_a_number_of_the_network_that_changed_before_the_recording() -> None:
    class Scaled(nn.Conv2d):
        factor = 1.5

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.factor

    module, runtime = Scaled(8, 8, 3, padding=1).eval().requires_grad_(False), fisedit.Runtime()
    network = compiled(module, runtime)
    network(draw(0, (2, 8, 13, 9)))
    module.factor = 0.7
    with runtime.record("base"):
        recorded = network(draw(0, (2, 8, 13, 9))).clone()
    with runtime.edit("base", mask=mask()):
        output = network(draw(1, (2, 8, 13, 9)))
    assert runtime.stats.calls["edit"] == 1
    assert_identical(output[..., ~mask()], recorded[..., ~mask()], "outside")
    module.factor = 0.9
    with pytest.raises(FisEditError, match="factor"), runtime.edit("base", mask=mask()):
        network(draw(1, (2, 8, 13, 9)))


@torch.no_grad()
def test_a_copy_of_a_compiled_network_uses_the_same_runtime() -> None:
    size = (2, 8, 13, 9)
    module, runtime, network, recorded = network_of(nn.Conv2d(8, 8, 3, padding=1), draw(0, size))
    twin = copy.deepcopy(network)
    assert copy.deepcopy(runtime) is runtime
    with runtime.record("of the copy"):
        assert_near(twin(draw(0, size)), recorded, "the copy")
    with runtime.edit("of the copy", mask=torch.ones(13, 9)):
        assert_near(twin(draw(1, size)), module(draw(1, size)), "the copy, edited")
