"""A second size is traced as it is, not with symbols in place of sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import fx, nn

from fisedit_compile import backend
from fisedit_compile.pipelines import EditSession
from fisedit_compile.private.dynamo import keep_sizes
from support.tiny_pipelines import tiny_pipeline


class Seen:
    """A backend that runs graphs as they are and counts those with symbols among their inputs."""

    def __init__(self) -> None:
        self.graphs = self.symbolic = 0

    def __call__(self, graph_module: fx.GraphModule, examples: Sequence[Any]) -> Any:
        sizes = [size for value in examples if isinstance(value, torch.Tensor) for size in value.shape]
        self.graphs += 1
        self.symbolic += any(isinstance(size, torch.SymInt) for size in (*sizes, *examples))
        return graph_module


class Network(nn.Module):
    def forward(self, pictures: dict[str, list[torch.Tensor]], step: torch.Tensor) -> torch.Tensor:
        return torch.relu(pictures["main"][0]) * step


@pytest.mark.parametrize("kept", [True, False])
def test_sizes_become_symbols_unless_they_are_kept(kept: bool) -> None:
    seen = Seen()
    compiled = torch.compile(Network(), backend=seen)
    steps = torch.arange(7.0)
    for size in (4, 5, 6):
        # A part of a larger tensor, of which Dynamo looks at both.
        whole = torch.randn(2 * size, 3)
        arguments = {"main": [whole[:size]]}, steps[size]
        if kept:
            keep_sizes(*arguments)
        assert torch.equal(compiled(*arguments), torch.relu(whole[:size]) * steps[size])
    assert (seen.graphs, seen.symbolic) == ((3, 0) if kept else (2, 1))


def test_sessions_keep_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen()
    describe = backend.describe

    def looking(graph_module: fx.GraphModule, examples: Sequence[Any]) -> Any:
        seen(graph_module, examples)
        return describe(graph_module, examples)

    monkeypatch.setattr(backend, "describe", looking)
    session = EditSession(tiny_pipeline(), decoder="sparse")
    for number, (height, width) in enumerate([(16, 24), (24, 16), (32, 32)]):
        session.generate("a red ball", num_inference_steps=2 + number, height=height, width=width)
        # A graph of the network and one of the decoder.
        assert (seen.graphs, seen.symbolic) == (2 * number + 2, 0)
