"""Networks put together at random from everything that moves positions or changes their number.

A network is a graph of operators, as tracing leaves them, so that thousands can be made and compiled in minutes; the
same graph is also a module that ``torch.compile`` takes. Choices come from a seed, or from hypothesis, which shrinks
them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from support.moving_steps import JOINED, STEPS, Choices, Writer


class Seeded:
    """Choices from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def whole(self, least: int, most: int) -> int:
        return self.random.randint(least, most)

    def one(self, values: Sequence[Any]) -> Any:
        return self.random.choice(list(values))


@dataclass
class MovingNetwork:
    """A graph whose first input is the picture ``[1, C, H, W]`` and whose others are its weights.

    ``steps`` says what it does, one entry for each step.
    """

    graph: fx.GraphModule
    shapes: tuple[tuple[int, ...], ...]
    steps: tuple[str, ...]

    @property
    def resolution(self) -> tuple[int, int]:
        """Height and width of the picture."""
        return self.shapes[0][2], self.shapes[0][3]

    def weights(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """Random weights that keep values about as large as they are."""
        found = []
        for number, shape in enumerate(self.shapes[1:]):
            generator = torch.Generator().manual_seed(number)
            fan = max(1, torch.Size(shape[1:]).numel()) if len(shape) > 1 else 4
            found.append((torch.randn(shape, generator=generator, dtype=torch.float64) / fan**0.5).to(dtype))
        return tuple(found)

    def picture(self, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A random picture."""
        generator = torch.Generator().manual_seed(1000 + seed)
        return torch.randn(self.shapes[0], generator=generator, dtype=torch.float64).to(dtype)

    def mask(self, choices: Choices) -> Tensor:
        """Booleans ``[H, W]``: a rectangle, in half of the cases at a border, with some noise in a quarter of them."""
        height, width = self.resolution
        mask = torch.zeros((height, width), dtype=torch.bool)
        rows, columns = choices.whole(1, height - 1), choices.whole(1, width - 1)
        top, left = choices.whole(0, height - rows), choices.whole(0, width - columns)
        top = choices.one((top, top, 0, height - rows))
        left = choices.one((left, left, 0, width - columns))
        mask[top : top + rows, left : left + columns] = True
        if choices.whole(0, 3) == 0:
            mask &= torch.rand(mask.shape, generator=torch.Generator().manual_seed(rows)) < 0.8
            mask[top, left] = True
        return mask

    def module(self) -> nn.Module:
        """The network as a module that takes the picture."""
        return WithWeights(self.graph, self.weights())

    def __str__(self) -> str:
        return f"{self.shapes[0]}: " + "; ".join(self.steps)


class WithWeights(nn.Module):
    """A graph with its weights as buffers."""

    def __init__(self, graph: fx.GraphModule, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.graph_module, self.count = graph, len(weights)
        for number, weight in enumerate(weights):
            self.register_buffer(f"weight_{number}", weight)

    def forward(self, x: Tensor) -> Any:
        return self.graph_module(x, *(getattr(self, f"weight_{number}") for number in range(self.count)))


def draw(choices: Choices, joined: bool = False) -> MovingNetwork:
    """A random network of one or two outputs; ``joined``: with attention and norms, which read the whole map."""
    writer, names = Writer(choices), sorted(STEPS) + (3 * sorted(JOINED) if joined else [])
    x = writer.input("x", 1, choices.whole(2, 4), choices.whole(9, 24), choices.whole(9, 24))
    writer.maps.append(x)
    start = x
    x = writer.convolution(x, (1,))
    for _ in range(choices.whole(2, 7)):
        x = {**STEPS, **JOINED}[choices.one(names)](writer, x)
        writer.maps.append(x)
        if choices.whole(0, 2) == 0:
            x = writer.convolution(x, (1, 1, 2))
            writer.maps.append(x)
    if choices.whole(0, 2) == 0:
        x = writer.fitted(x, writer.size(start))
    outputs = [x]
    if choices.whole(0, 4) == 0:
        outputs.append(writer.pointwise(choices.one(writer.maps)))
    return finished(writer, outputs)


def finished(writer: Writer, outputs: Sequence[fx.Node]) -> MovingNetwork:
    """The network of a written graph."""
    writer.graph.output(tuple(outputs))
    writer.graph.eliminate_dead_code()
    graph = fx.GraphModule(nn.Module(), writer.graph)
    return MovingNetwork(graph, tuple(writer.shapes), tuple(writer.steps))
