"""How a value lies in memory is no part of what a network is: neither at its inputs nor where its graphs meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fisedit_compile as fisedit
from fisedit_compile.private.dynamo import dynamo_limits
from support.harness import compiled
from support.tolerances import assert_identical, assert_near

SIZE = (13, 9)
# The stride of a dimension of one element can be any.
BATCH = 1
MASK = torch.zeros(SIZE, dtype=torch.bool)
MASK[3:8, 2:7] = True


class Network(nn.Module):
    """A convolution, a linear layer and a function of them."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
            self.linear = nn.Linear(4, 4).requires_grad_(False)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def untraceable(x: Tensor) -> Tensor:
    """The same, in a graph that cannot be traced."""
    return functional.dropout(x, 1e-9, training=True)


def broken_off(net: Network, x: Tensor) -> Tensor:
    h = net.conv(x)
    torch._dynamo.graph_break()
    return untraceable(net.conv(h))


def viewed(net: Network, x: Tensor) -> Tensor:
    h = net.conv(x)
    torch._dynamo.graph_break()
    return untraceable(net.conv(h.reshape(h.shape[0], -1, *h.shape[2:])) + h.flatten(2).sum(2)[:, :, None, None] * 0)


def contiguous(net: Network, x: Tensor) -> Tensor:
    result: Tensor = net.conv(x.contiguous()) * 2
    return result.contiguous()


def channels_last(net: Network, x: Tensor) -> Tensor:
    result: Tensor = net.conv(x.to(memory_format=torch.channels_last))
    return result


def as_tokens(net: Network, x: Tensor) -> Tensor:
    tokens = net.linear(x.flatten(2).transpose(1, 2))
    return net.conv(tokens.transpose(1, 2).reshape(x.shape)) + x


FUNCTIONS = [broken_off, viewed, contiguous, channels_last, as_tokens]
FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "columns first": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "with gaps": lambda x: torch.stack([x, x], 2)[:, :, 0],
}


def picture(seed: int, batch: int) -> Tensor:
    return torch.randn(batch, 4, *SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
@torch.no_grad()
def test_an_edit_may_give_its_inputs_in_another_format(function: Any, form: str) -> None:
    module, runtime = Network(function), fisedit.Runtime()
    network, reform = compiled(module, runtime), FORMATS[form]
    with runtime.record("base"):
        recorded = network(picture(0, BATCH))
    with runtime.edit("base", mask=MASK, save_as="saved"):
        edited = network(reform(picture(1, BATCH)))
    with runtime.edit("base"):
        assert_near(network(reform(picture(1, BATCH))), module(picture(1, BATCH)), "no mask")
    with runtime.edit("saved", mask=MASK):
        assert_near(network(picture(1, BATCH)), edited, "as before")
    assert_identical(edited[..., ~MASK], recorded[..., ~MASK], "outside the mask")
    assert_near(edited[..., 5:6, 4:5], module(picture(1, BATCH))[..., 5:6, 4:5], "inside the mask")


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_edits_hand_over_what_dense_calls_do(batch: int) -> None:
    """No graph is compiled anew because the one before it ran sparsely."""
    module, runtime = Network(broken_off), fisedit.Runtime()
    network = compiled(module, runtime)
    with runtime.record("base"):
        strides = network(picture(0, batch)).stride()
    with dynamo_limits(1):
        for mask in (MASK, torch.zeros(SIZE), torch.ones(SIZE)):
            with runtime.edit("base", mask=mask):
                assert network(picture(1, batch)).stride() == strides
