"""Builds FX graphs of ATen calls by hand, for tests of single passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

STACK = {"layer": ("layer", nn.Module)}


class Builder:
    """Builds a graph call by call; values are computed on the meta device."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.shapes: list[tuple[tuple[int, ...], torch.dtype]] = []

    def input(self, *shape: int, dtype: torch.dtype = torch.float32) -> fx.Node:
        node = self.graph.placeholder(f"input_{len(self.shapes)}")
        node.meta["val"] = torch.zeros(shape, dtype=dtype, device="meta")
        self.shapes.append((shape, dtype))
        return node

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        values = fx.node.map_arg(args, lambda value: value.meta["val"])
        node.meta["val"] = target(*values, **kwargs)
        node.meta["nn_module_stack"] = STACK
        return node

    def finish(self, *outputs: fx.Node) -> fx.GraphModule:
        self.graph.output(outputs)
        return fx.GraphModule(nn.Module(), self.graph)

    def tensors(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(shape, generator=generator).to(dtype) for shape, dtype in self.shapes]
