"""Dense steps whose attention to the words of a prompt is that of the recorded run.

Why: the mask of an edit is found from how its first steps, which run densely, move away from the recorded ones. A new
word also draws attention away from all others, which moves what nobody asked to change. So the words that both prompts
share keep the attention that they had (FISEdit, arXiv 2305.17423, section 4.1; Prompt-to-Prompt, arXiv 2208.01626,
section 3): in each map of attention probabilities, the columns of shared words are the recorded ones. As there, rows
are not brought to the sum of one again.

Before: ``y = scaled_dot_product_attention(q, k, v)``                   in the record graph
After:  ``m = softmax(scale * q @ k.T)``
        record_maps:      ``y`` as before; ``m`` is stored
        stabilised_save:  ``u = where(alignment >= 0, gather(recorded m, alignment), m)``; ``y = u @ v``; ``u`` is
                          stored
        stabilised:       the same, and nothing is stored
where ``alignment`` ``[B, tokens]`` (int64) is an input: the recorded token for each new one, -1 where there is none.

Conditions, looked at for each attention whose query is spatial and does not stay within a position:
1. It is cross-attention: keys and values are not spatial, and nothing that they are made from is.
2. It has no mask, no dropout, is not causal, and keys have as many heads as queries, and the batch of these.
3. The keys of all such attention that have one number of tokens are made from the same inputs: of the tokens of two
   inputs, an alignment would not tell which it means.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, fx

from fisedit_compile.errors import GraphError
from fisedit_compile.passes.common.arguments import read_arguments
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.deferred import DeferredModule, copy_graph
from fisedit_compile.passes.common.ir import insert_call, origin_of, shape_of, spatial_of
from fisedit_compile.passes.common.meta import MODULE_PATH, VALUE
from fisedit_compile.passes.common.program import Stabilisation, StabilisedGraphs
from fisedit_compile.passes.common.reading.attentions import is_within
from fisedit_compile.passes.common.targets import ATTENTIONS, aten
from fisedit_compile.runtime.base import ATTENTION_PREFIX
from fisedit_compile.runtime.spec import Site

NAME = "stabilise"


def _derived(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that are made from spatial values, these included."""
    derived: set[fx.Node] = set()
    for node in graph.nodes:
        if spatial_of(node) is not None or any(source in derived for source in node.all_input_nodes):
            derived.add(node)
    return derived


def _refusal(node: fx.Node, derived: set[fx.Node]) -> str | None:
    """Why the maps of an attention from positions to something else cannot be kept, if so (conditions 1 and 2)."""
    given = read_arguments(node)
    query, key, value = (given[name] for name in ("query", "key", "value"))
    if key in derived or value in derived:
        return "its keys are no words alone: they are made from the picture, or joined with positions of it"
    if given["attn_mask"] is not None:
        return "it has a mask"
    if given["dropout_p"] or given["is_causal"] or given.get("enable_gqa"):
        return "it has dropout, is causal or groups its queries"
    if shape_of(key)[:-2] != shape_of(query)[:-2] or shape_of(value)[:-2] != shape_of(query)[:-2]:
        return "keys have another batch or number of heads than queries"
    return None


def _sources(node: fx.Node, tokens: int) -> frozenset[fx.Node]:
    """The inputs with so many tokens that a value is made from."""
    found, seen, stack = set(), {node}, [node]
    while stack:
        value = stack.pop()
        given = value.meta.get(VALUE) if value.op == "placeholder" else None
        if isinstance(given, Tensor) and tokens in given.shape[1:-1]:
            found.add(value)
        fresh = set(value.all_input_nodes) - seen
        seen |= fresh
        stack.extend(fresh)
    return frozenset(found)


def _tokens(node: fx.Node) -> int:
    return shape_of(read_arguments(node)["key"])[-2]


def _find(compilation: Compilation) -> list[fx.Node]:
    """The cross-attention of the record graph whose maps can be kept."""
    graph, report = compilation.module("record").graph, compilation.report
    derived = _derived(graph)
    found = []
    for node in graph.nodes:
        if node.target not in ATTENTIONS:
            continue
        given = read_arguments(node)
        spatial = [spatial_of(given[name]) is not None for name in ("query", "key", "value")]
        if spatial != [True, False, False] or is_within(node):
            continue  # It is no cross-attention.
        reason = _refusal(node, derived)
        if reason is None:
            found.append(node)
        else:
            report.miss(NAME, node, reason)
    sources: dict[int, set[frozenset[fx.Node]]] = {}
    for node in found:
        sources.setdefault(_tokens(node), set()).add(_sources(read_arguments(node)["key"], _tokens(node)))
    for node in found:
        if len(sources[_tokens(node)]) > 1:
            report.miss(NAME, node, f"the keys of several attentions are {_tokens(node)} tokens of different inputs")
    return [node for node in found if len(sources[_tokens(node)]) == 1]


def _maps(node: fx.Node) -> fx.Node:
    """The attention probabilities of an attention, ``[..., positions, tokens]``, in the type of its query."""
    given = read_arguments(node)
    query, key = given["query"], given["key"]
    dtype = query.meta[VALUE].dtype
    scale = shape_of(query)[-1] ** -0.5 if given["scale"] is None else given["scale"]
    keys = insert_call(node, aten.transpose.int, key, -1, -2)
    scores = insert_call(node, aten.matmul.default, insert_call(node, aten.mul.Scalar, query, scale), keys)
    maps = insert_call(node, aten.softmax.int, scores, -1, torch.promote_types(dtype, torch.float32))
    return insert_call(node, aten.to.dtype, maps, dtype)


def _with_recorded(node: fx.Node, maps: fx.Node, recorded: fx.Node, alignment: fx.Node) -> fx.Node:
    """The maps of an attention with the recorded columns of the tokens that are aligned."""
    shape = list(shape_of(maps))
    columns = insert_call(node, aten.reshape.default, alignment, [shape[0], *[1] * (len(shape) - 2), shape[-1]])
    index = insert_call(node, aten.expand.default, insert_call(node, aten.clamp.default, columns, 0), shape)
    shared = insert_call(node, aten.gather.default, recorded, -1, index)
    return insert_call(node, aten.where.self, insert_call(node, aten.ge.Scalar, columns, 0), shared, maps)


def _laid_out_as(node: fx.Node, value: fx.Node) -> fx.Node:
    """A value whose dimensions lie in memory in the order of those of a node, which a later view relies on."""
    strides = node.meta[VALUE].stride()
    order = sorted(range(len(strides)), key=lambda dim: -strides[dim])
    if order == sorted(order):
        return value
    copied = insert_call(node, aten.contiguous.default, insert_call(node, aten.permute.default, value, order))
    return insert_call(node, aten.permute.default, copied, [order.index(dim) for dim in range(len(order))])


def _nodes(graph_module: fx.GraphModule, names: Sequence[str]) -> list[fx.Node]:
    found = {node.name: node for node in graph_module.graph.nodes}
    return [found[name] for name in names]


def _return_too(graph_module: fx.GraphModule, values: Sequence[fx.Node]) -> None:
    output = next(iter(reversed(graph_module.graph.nodes)))
    output.args = ((*output.args[0], *values),)
    graph_module.graph.eliminate_dead_code()


def _record_maps(record: fx.GraphModule, names: Sequence[str]) -> DeferredModule:
    """The record graph that also stores the maps of the attentions of these names."""
    copy = copy_graph(record, "RecordMaps")
    _return_too(copy, [_maps(node) for node in _nodes(copy, names)])
    return copy


def _add_input(graph: fx.Graph, name: str, value: Tensor) -> fx.Node:
    """One more input of a graph, behind all others."""
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    node.meta[VALUE] = value
    return node


def _stabilised_save(record: fx.GraphModule, names: Sequence[str], tokens: Sequence[int]) -> DeferredModule:
    """The record graph with stabilised attentions, whose maps it stores as well. Behind its own inputs it takes the
    alignment for each number of tokens, and the recorded maps of each attention."""
    copy = copy_graph(record, "StabilisedSave")
    nodes = _nodes(copy, names)
    batch = {_tokens(node): read_arguments(node)["query"].meta[VALUE] for node in nodes}
    alignments = {
        count: _add_input(copy.graph, f"alignment_{count}", batch[count].new_empty((len(batch[count]), count)).long())
        for count in tokens
    }
    used = []
    for number, node in enumerate(nodes):
        maps = _maps(node)
        recorded = _add_input(copy.graph, f"recorded_maps_{number}", maps.meta[VALUE])
        used.append(_with_recorded(node, maps, recorded, alignments[_tokens(node)]))
        attended = _laid_out_as(node, insert_call(node, aten.matmul.default, used[-1], read_arguments(node)["value"]))
        attended.meta.update(node.meta)
        node.replace_all_uses_with(attended)
        copy.graph.erase_node(node)
    _return_too(copy, used)
    return copy


def _site(node: fx.Node) -> Site:
    """What keeps the maps of an attention."""
    query = read_arguments(node)["query"]
    path = node.meta.get(MODULE_PATH)
    name = ATTENTION_PREFIX + ":".join([*([path] if path else []), origin_of(node)])
    return Site(name, "value", None, (), 0, (*shape_of(query)[:-1], _tokens(node)), query.meta[VALUE].dtype)


def _make(record: fx.GraphModule, names: Sequence[str], tokens: Sequence[int], outputs: int) -> StabilisedGraphs:
    """The graphs, checked as ``verify`` checks those that always are made.

    Args:
        record: the lifted record graph.
        names: of its attentions.
        tokens: the numbers of their tokens.
        outputs: how many there are in front of what it stores.

    Raises:
        GraphError: a graph is broken.
    """
    keeping, saving = _record_maps(record, names), _stabilised_save(record, names, tokens)
    made = StabilisedGraphs(
        record_maps=keeping, stabilised=copy_graph(saving, "Stabilised", outputs), stabilised_save=saving
    )
    stored = _count_outputs(record) + len(names)
    if [_count_outputs(graph) for graph in (keeping, saving, made.stabilised)] != [stored, stored, outputs]:
        raise GraphError("a graph with recorded attention misses an output or an attention map")
    for graph_module in (keeping, saving, made.stabilised):
        try:
            graph_module.graph.lint()
        except RuntimeError as error:
            raise GraphError(f"a graph with recorded attention is broken: {error}") from error
    return made


def _count_outputs(graph_module: fx.GraphModule) -> int:
    return len(next(iter(reversed(graph_module.graph.nodes))).args[0])


def stabilise(compilation: Compilation) -> None:
    """Run the pass on the lifted record graph, which stays as it is: makes ``compilation.stabilisation``."""
    found = _find(compilation)
    if not found:
        return
    record, names = compilation.module("record"), [node.name for node in found]
    tokens = tuple(sorted({_tokens(node) for node in found}))
    outputs = _count_outputs(record) - len(compilation.sites)
    sites = tuple(_site(node) for node in found)
    compilation.report.matches[NAME] += len(found)
    compilation.report.attention_sites = sites
    compilation.stabilisation = Stabilisation(
        sites=sites, tokens=tokens, make=partial(_make, record, names, tokens, outputs)
    )
