"""From a lifted graph to something that can be called: plain FX code, or code made by inductor.

``plain`` calls the sparse operators as Python functions, without the dispatcher, and compiles in milliseconds.
``inductor`` fuses what lies between them and takes minutes for a large network. Every size that depends on the mask is
a symbol there: the number N of rows of each domain and the size M of each stencil's halo. Another mask is therefore
other sizes of the same code.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from fisedit_compile.operators import OPERATORS, choosing
from fisedit_compile.operators.triton.fusion import fuse
from fisedit_compile.passes.common.deferred import copy_graph
from fisedit_compile.passes.common.literals import spell_literals
from fisedit_compile.passes.common.program import GraphInput
from fisedit_compile.private.inductor import compile_with_inductor
from fisedit_compile.runtime.spec import Domain, PlanInput

logger = logging.getLogger(__name__)

aten = torch.ops.aten

#: Takes the graph's inputs in order, returns its outputs as a sequence.
Lowered = Callable[..., Sequence[Any]]

#: The same operators by their Python bindings, which take half the time of a call through an operator overload.
BINDINGS: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: torch.add,
    aten.cat.default: torch.cat,
    aten.div.Tensor: torch.div,
    aten.gelu.default: functional.gelu,
    aten.group_norm.default: torch.group_norm,
    aten.layer_norm.default: torch.layer_norm,
    aten.linear.default: functional.linear,
    aten.mul.Tensor: torch.mul,
    aten.permute.default: torch.permute,
    aten.reshape.default: torch.reshape,
    aten.silu.default: functional.silu,
    aten.split.Tensor: torch.split,
    aten.sub.Tensor: torch.sub,
    aten.transpose.int: torch.transpose,
    aten.unsqueeze.default: torch.unsqueeze,
}


def lower_plain(graph_module: fx.GraphModule) -> Lowered:
    """Python code that calls one operator after the other and drops each intermediate after its last use."""
    lowered = fuse(copy_graph(graph_module))
    faster = {**BINDINGS, **{overload: choosing.lowered(operator) for overload, operator in OPERATORS.items()}}
    for node in lowered.graph.nodes:
        if node.op == "call_function":
            node.target = faster.get(node.target, node.target)
    spell_literals(lowered)
    # The module itself would look its code up at every call.
    fx.GraphModule.recompile(lowered)
    return lowered.forward


def symbol_of(plan_input: PlanInput) -> tuple[str, Hashable]:
    """What the second dimension of a plan tensor counts: rows of a domain, or halo positions of a stencil."""
    if isinstance(plan_input.of, Domain):
        return "rows", plan_input.of
    if plan_input.kind == "halo":
        return "halo", plan_input.of
    return "rows", plan_input.of.target


@dataclass(frozen=True)
class _Variant:
    """Code for inputs of one form, and the sizes it holds for."""

    run: Lowered
    holds: Callable[[Mapping[Hashable, int]], bool]


class InductorGraph:
    """A graph compiled by inductor at its first call; another mask needs no compilation.

    Another compilation happens only when inputs come in another form: a mask for each sample instead of one for all,
    or recorded tensors of another storage type.
    """

    def __init__(self, graph_module: fx.GraphModule, sources: Sequence[GraphInput] | None) -> None:
        """``sources`` tells which inputs come from the mask; None: all sizes are fixed."""
        self._graph_module = graph_module
        kinds = [source.kind for source in sources or ()]
        self._dynamic: dict[int, tuple[str, Hashable]] = {
            position: symbol_of(source.reference)
            for position, source in enumerate(sources or ())
            if isinstance(source.reference, PlanInput)
        }
        self._recorded = [position for position, kind in enumerate(kinds) if kind == "recorded"]
        self._variants: dict[Hashable, list[_Variant]] = {}
        self._lock = threading.Lock()
        self.compilations = 0

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        sizes: dict[Hashable, int] = {}
        samples = []
        for position, symbol in self._dynamic.items():
            shape = inputs[position].shape
            sizes[symbol] = shape[1]
            samples.append(shape[0])
        form = (tuple(samples), tuple((inputs[at].dtype, inputs[at].stride()) for at in self._recorded))
        with self._lock:
            variants = self._variants.setdefault(form, [])
            variant = next((known for known in variants if known.holds(sizes)), None)
            if variant is None:
                variant = self._compile(inputs, sizes)
                variants.append(variant)
        return variant.run(sizes, *inputs)

    def _compile(self, inputs: Sequence[Any], sizes: Mapping[Hashable, int]) -> _Variant:
        started = time.perf_counter()
        # A single row is the only row of its domain: its number never changes.
        dynamic = {at: {1: symbol} for at, symbol in self._dynamic.items() if sizes[symbol] > 1}
        run, holds = compile_with_inductor(copy_graph(self._graph_module), inputs, dynamic)
        self.compilations += 1
        nodes = len(self._graph_module.graph.nodes)
        logger.info("inductor compiled a graph of %d nodes in %.1f s", nodes, time.perf_counter() - started)
        return _Variant(run, holds)


def lower(graph_module: fx.GraphModule, lowering: str, sources: Sequence[GraphInput] | None = None) -> Lowered:
    """Make a lifted graph callable.

    Args:
        graph_module: a functional graph.
        lowering: ``"plain"`` or ``"inductor"``.
        sources: where the inputs of an edit graph come from; None for other graphs, whose sizes are all fixed.
    """
    return InductorGraph(graph_module, sources) if lowering == "inductor" else lower_plain(graph_module)


def valid_rows(index: Tensor) -> Tensor:
    """``valid`` for an index without padding rows: bool, True everywhere, of the shape of ``index``."""
    return torch.ones(index.shape, dtype=torch.bool, device=index.device)
