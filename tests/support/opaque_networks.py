"""Networks that cannot be traced, one for each reason, and what an edit of one is by definition.

The whole network is one operator without a rule. Its oracle is eager PyTorch: the network runs on the recorded inputs
with the active positions of the new ones written in, and what it returns keeps the recorded value outside the active
set. Heights, widths, their products and channels differ from each other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import fisedit_compile as fisedit
from support.harness import compiled
from support.reference import flatten, reduce_mask
from support.tolerances import assert_identical, assert_near

HEIGHT, WIDTH, BATCH = 13, 9, 2


class Untraceable(nn.Module):
    """Two convolutions, a norm and a buffer, and a function of them and the inputs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.first = nn.Conv2d(3, 5, 3, padding=1)
        self.second = nn.Conv2d(5, 4, 3, padding=1)
        self.coarse = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.register_buffer("count", torch.zeros(1))

    def both(self, x: Tensor) -> Tensor:
        """Both convolutions, with something between them."""
        result: Tensor = self.second(functional.gelu(self.first(x)))
        return result

    def forward(self, *arguments: Any) -> Any:
        return self.function(self, *arguments)


@torch.library.custom_op("fisedit_tests::triple_", mutates_args=("x",))
def triple_(x: Tensor) -> None:
    x.mul_(3)


def dropout(net: Untraceable, x: Tensor) -> Tensor:
    result: Tensor = net.second(functional.dropout(net.first(x), 0.5, training=True))
    return result


def unfilled(net: Untraceable, x: Tensor) -> Tensor:
    made = torch.Tensor(x.shape[0], 1, *x.shape[2:])
    made[x[:, :1] > 0] = 2.0
    made[x[:, :1] <= 0] = 3.0
    return net.both(x) * made


def noise(net: Untraceable, x: Tensor) -> Tensor:
    return net.both(x) + torch.rand_like(x[:, :1])


def branches(net: Untraceable, x: Tensor) -> Any:
    return torch.cond(x.sum() > 0, lambda y: net.both(y), lambda y: -net.both(y), (x,))


def checkpointed(net: Untraceable, x: Tensor) -> Any:
    return checkpoint(net.both, x, use_reentrant=False)


def autocast(net: Untraceable, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16):
        return net.both(x)


def mapped(net: Untraceable, x: Tensor) -> Any:
    return torch.vmap(torch.sin)(net.both(x))


def batch_statistics(net: Untraceable, x: Tensor) -> Any:
    return net.norm(net.first(x))


def counted(net: Untraceable, x: Tensor) -> Tensor:
    net.count.add_(1)  # type: ignore[operator]
    return net.both(x) * net.count


def overwritten(net: Untraceable, x: Tensor) -> Tensor:
    x.mul_(0.5)
    return net.both(x)


def custom(net: Untraceable, x: Tensor) -> Tensor:
    y = net.both(x)
    triple_(y)
    return y


def strided(net: Untraceable, x: Tensor) -> Tensor:
    return net.both(x) + (x * 2).transpose(1, 2).as_strided((1,), (1,))


def viewed(net: Untraceable, x: Tensor) -> Any:
    """Views that are right only for the strides the graph was made for."""
    return checkpoint(lambda y: net.both(y.view(y.shape[0], -1).view(y.shape)), x, use_reentrant=False)


#: Networks from one map to one map, by the reason they cannot be traced.
KINDS: dict[str, Callable[..., Any]] = {
    "dropout": dropout,
    "a tensor of which only the size is traced": unfilled,
    "noise": noise,
    "cond": branches,
    "checkpoint": checkpointed,
    "autocast": autocast,
    "vmap": mapped,
    "batch statistics": batch_statistics,
    "buffer": counted,
    "overwritten input": overwritten,
    "custom change": custom,
    "strides": strided,
    "views": viewed,
}


def draw(seed: int, *shape: int) -> Tensor:
    """A picture ``[2, 3, 13, 9]``, or another normal tensor."""
    return torch.randn(shape or (BATCH, 3, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(seed))


def some_mask(samples: int = 1, seed: int = 0) -> Tensor:
    """Booleans ``[samples, 13, 9]``, a fifth of them active."""
    return torch.rand(samples, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed)) < 0.2


def place(shape: Sequence[int]) -> tuple[int, int] | None:
    """The resolution of ``[B, C, h, w]`` or, at the input's, of ``[B, h * w, C]``; None for what is not spatial."""
    if len(shape) == 4:
        return shape[2], shape[3]
    return (HEIGHT, WIDTH) if len(shape) == 3 and shape[1] == HEIGHT * WIDTH else None


def mix(new: Tensor, recorded: Tensor, mask: Tensor) -> Tensor:
    """``new`` in the active set and ``recorded`` elsewhere; ``new`` when it is not spatial."""
    size = place(new.shape)
    if size is None:
        return new
    active = reduce_mask(mask, *size)
    active = active.repeat(new.shape[0] // active.shape[0], 1, 1)
    return torch.where(active[:, None] if new.dim() == 4 else active.flatten(1)[..., None], new, recorded)


class Recorded:
    """A network, compiled, with a recorded call."""

    def __init__(self, function: Callable[..., Any], *inputs: Tensor, storage: Any = None, **options: Any) -> None:
        torch.manual_seed(5)
        self.module = Untraceable(function).requires_grad_(False)
        self.runtime = fisedit.Runtime(storage=storage)
        self.network = compiled(self.module, self.runtime, **options)
        self.inputs = inputs or (draw(1),)
        with self.runtime.record("base"):
            self.outputs = self.call(*self.inputs)

    @torch.no_grad()
    def call(self, *inputs: Tensor, module: nn.Module | None = None) -> tuple[Tensor, ...]:
        """One call with seeded random numbers; of the compiled network, or of ``module``."""
        torch.manual_seed(11)
        return flatten((module or self.network)(*(value.clone() for value in inputs)))

    def edit(self, mask: Tensor | None, *inputs: Tensor, base: str = "base", **options: Any) -> tuple[Tensor, ...]:
        """One call within an edit."""
        with self.runtime.edit(base, mask=mask, **options):
            return self.call(*inputs)

    def twin(self) -> nn.Module:
        """The network as it is now, not compiled."""
        return copy.deepcopy(self.module)

    def check(
        self,
        mask: Tensor,
        *inputs: Tensor,
        base: str = "base",
        recorded: Sequence[Tensor] | None = None,
        before: Sequence[Tensor] | None = None,
        **options: Any,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Edit ``base``, whose inputs were ``before`` and whose outputs ``recorded``, and compare with the definition.

        Returns:
            The inputs and the outputs that the edit, as a base, has.
        """
        recorded = self.outputs if recorded is None else recorded
        mixed = tuple(map(mix, inputs, before or self.inputs, [mask] * len(inputs)))
        expected = self.call(*mixed, module=self.twin())
        outputs = self.edit(mask, *inputs, base=base, **options)
        for number, (output, new, old) in enumerate(zip(outputs, expected, recorded, strict=True)):
            same = assert_near if output.is_floating_point() else assert_identical
            same(output, mix(new, old, mask), f"output {number}")
            kept = mix(torch.zeros_like(output), output, mask)
            assert_identical(kept, mix(torch.zeros_like(old), old, mask), f"output {number} outside the mask")
            assert not torch.equal(output, old), f"output {number}: the edit changed nothing at all"
        return mixed, outputs
