"""Networks that Dynamo traces once, for all compilations of them with other options.

Most of the time that a compilation takes is Dynamo's, and its graph depends on the network alone. So a network is
compiled as users do only once in a process; its graph is kept and compiled again without Dynamo. What only Dynamo sees
(guards, breaks, what a call leaves changed) is not tested by the later ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fisedit_compile.backend import fisedit
from support.networks import Network
from support.reference import flatten

Key = tuple[Network, torch.dtype]


@dataclass(frozen=True)
class Input:
    """An input of the network, by its place."""

    place: int


@dataclass(frozen=True)
class Captured:
    """The graph of a network, and how it is called.

    Attributes:
        graph: as Dynamo made it.
        examples: its example inputs.
        given: what it is called with: the network's own tensors, and its inputs.
        outputs: which of the graph's outputs are the network's.
    """

    graph: fx.GraphModule
    examples: Sequence[Any]
    given: Sequence[Tensor | Input]
    outputs: Sequence[int]

    def compiled(self, options: dict[str, Any]) -> Callable[..., tuple[Tensor, ...]]:
        """The network, compiled with options."""
        run = fisedit(_copy(self.graph), self.examples, options=options)

        def call(*inputs: Any) -> tuple[Tensor, ...]:
            results = run(*(inputs[one.place] if isinstance(one, Input) else one for one in self.given))
            return tuple(results[number] for number in self.outputs)

        return call


_CAPTURED: dict[Key, Captured] = {}


def compiled_once(network: Network, dtype: torch.dtype, device: str, options: dict[str, Any]) -> Callable[..., Any]:
    """A network compiled with options: by ``torch.compile`` where it was not called before, else from its graph.

    A network of several graphs, or whose graph takes or returns other things than tensors, is always compiled anew.
    """
    known = _CAPTURED.get((network, dtype))
    if known is not None:
        return known.compiled(options)
    graphs: list[tuple[fx.GraphModule, Sequence[Any]]] = []
    calls: list[tuple[Sequence[Any], Sequence[Any]]] = []

    def keep(graph: fx.GraphModule, examples: Sequence[Any], *, options: dict[str, Any]) -> Callable[..., Any]:
        graphs.append((_copy(graph), list(examples)))
        run = fisedit(graph, examples, options=options)

        def noted(*arguments: Any) -> Any:
            results = run(*arguments)
            calls.append((arguments, results))
            return results

        return noted

    module = torch.compile(network.module(dtype).to(device), backend=keep, options=options)

    def call(*inputs: Any) -> Any:
        calls.clear()
        outputs = module(*inputs)
        if len(graphs) == len(calls) == 1 and (network, dtype) not in _CAPTURED:
            found = _captured(*graphs[0], *calls[0], inputs, flatten(outputs))
            if found is not None:
                _CAPTURED[network, dtype] = found
        return outputs

    return call


def _captured(
    graph: fx.GraphModule,
    examples: Sequence[Any],
    arguments: Sequence[Any],
    results: Sequence[Any],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
) -> Captured | None:
    """What a call tells of a graph; None where it does not tell which values are which."""
    places = {id(value): Input(place) for place, value in enumerate(inputs)}
    given = [places.get(id(argument), argument) for argument in arguments]
    numbers = {id(result): number for number, result in enumerate(results)}
    found = [numbers.get(id(output)) for output in outputs]
    if None in found or not all(isinstance(one, Tensor | Input) for one in given):
        return None
    return Captured(graph, examples, given, [number for number in found if number is not None])


def _copy(graph: fx.GraphModule) -> fx.GraphModule:
    """A graph to work on, with what Dynamo noted at its nodes."""
    return fx.GraphModule(graph, copy.deepcopy(graph.graph))
