"""Do not repeat, call after call, what depends only on the step or only on the prompt.

Why: an edited call has the timestep of its recorded call, so what follows from the timestep alone was computed before;
and all calls of an edit have the same prompt, whose keys and values each cross-attention would compute again. With few
active positions this is a tenth of the arithmetic, and more of the weights that are read.

Before: ``t = linear(silu(embedding(timestep)), w)``; ``k = linear(prompt, v)``
After:  ``t = load("t:value")``, and ``store(t, "t:value")`` in the record graph;
        ``k`` is marked: it becomes output ``i`` of a graph of its own, whose result the executable keeps for as long as
        the prompt is the same

Conditions:
1. The node is a deterministic operator; all it depends on are parameters and constants, and, besides these, scalar
   inputs only (``step``) or other inputs that are not spatial only (``prompt``).
2. Something that is not of its kind reads it.
3. ``step``: the dense graph computes it under the same name, and it takes few bytes.
"""

from __future__ import annotations

import torch
from torch import fx

from fisedit_compile.passes.caching.hoist_parameters import constant_nodes, is_repeatable
from fisedit_compile.passes.caching.insert_cache_ops import add_store
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.ir import eliminate_dead_code, load, spatial_of
from fisedit_compile.passes.common.meta import INVARIANT, MODULE_PATH, ORIGIN, VALUE
from fisedit_compile.runtime.spec import Site

NAME = "hoist_invariants"
# Values of a step are embeddings, a few kilobytes; recording more would cost more than it saves.
STEP_BYTES = 1 << 20


def _dependents(graph: fx.Graph, sources: set[fx.Node], constant: set[fx.Node], known: set[fx.Node]) -> set[fx.Node]:
    """Operators among ``known`` that depend on some of the sources and, besides them, on constants only."""
    found = set(sources)
    for node in graph.nodes:
        if node in known and is_repeatable(node) and any(value in found for value in node.all_input_nodes):
            if all(value in found or value in constant for value in node.all_input_nodes):
                found.add(node)
    return found - sources


def _border(nodes: set[fx.Node], graph: fx.Graph) -> list[fx.Node]:
    """Nodes of a set that a node outside of it reads, in the order of the graph."""
    return [node for node in graph.nodes if node in nodes and any(user not in nodes for user in node.users)]


def _record_step(node: fx.Node, origin: fx.Node, compilation: Compilation) -> None:
    """Let the record graph store what ``origin`` computes, and the edit graph load it in place of ``node``."""
    value = node.meta[VALUE]
    if value.nbytes > STEP_BYTES:
        compilation.report.miss(NAME, node, f"it takes {value.nbytes} bytes")
        return
    path = origin.meta.get(MODULE_PATH)
    name = ":".join([*([path] if path else []), origin.name, "value"])
    add_store(compilation.module("record").graph, origin, name)
    site = Site(name, "value", None, (), 0, tuple(map(int, value.shape)), value.dtype, lossless=True)
    compilation.sites += (site,)
    with node.graph.inserting_before(node):
        loaded = node.graph.call_function(load, (name,))
    loaded.meta.update({VALUE: value, ORIGIN: origin.name})
    node.replace_all_uses_with(loaded)
    compilation.report.match(NAME)


def hoist_invariants(compilation: Compilation) -> None:
    """Run the pass on the edit and the record graph; what is marked has ``meta["invariant"]``."""
    edit_module, record_module = compilation.edit, compilation.module("record")
    edit, record, infos, report = edit_module.graph, record_module.graph, compilation.inputs, compilation.report
    placeholders = [node for node in edit.nodes if node.op == "placeholder"]
    kinds = dict(zip(placeholders, (info.kind for info in infos), strict=True))
    constant = constant_nodes(edit, infos)
    tensors = {node for node in edit.nodes if isinstance(node.meta.get(VALUE), torch.Tensor | tuple | list)}
    dense = {node.name: node for node in record.nodes if node.op == "call_function"}
    same = {node for node in tensors if node.name in dense and dense[node.name].target is node.target}
    steps = {node for node, kind in kinds.items() if kind == "scalar"}
    for node in _border(_dependents(edit, steps, constant, same), edit):
        _record_step(node, dense[node.name], compilation)
    prompts = {node for node, kind in kinds.items() if kind == "user" and spatial_of(node) is None}
    for number, node in enumerate(_border(_dependents(edit, prompts, constant, tensors), edit)):
        node.meta[INVARIANT] = number
        report.match(NAME)
    eliminate_dead_code(edit)
    for graph_module in (edit_module, record_module):
        graph_module.recompile()
