"""The graph of resolutions: which values flow where, which operators connect two resolutions, which end locality."""

from __future__ import annotations

import operator

import networkx
import torch
from torch import fx

from fisedit_compile.passes.common.arguments import read_arguments
from fisedit_compile.passes.common.ir import shape_of, spatial_of
from fisedit_compile.passes.common.meta import DENSE_REASON, SPATIAL_OUTPUTS, VALUE
from fisedit_compile.passes.common.reading.permutations import permutation
from fisedit_compile.passes.common.report import Connection
from fisedit_compile.passes.common.targets import (
    ANCHORS,
    ATTENTIONS,
    CONVOLUTIONS,
    GROUP_NORMS,
    LAST_DIMENSION_NORMS,
    LAYOUTS,
    PERMUTES,
    RESAMPLINGS,
    RESHAPES,
    aten,
    is_elementwise,
)
from fisedit_compile.runtime.spec import Domain

NOT_SPATIAL = "not spatial"
#: Operators of channels, where these are the last dimension.
LAST_DIMENSION = LAST_DIMENSION_NORMS | {aten.linear.default}


def data_flow(graph: fx.Graph) -> networkx.DiGraph:
    """One vertex for each node (by name, with attribute ``node``), one edge for each use."""
    flow = networkx.DiGraph()
    for node in graph.nodes:
        flow.add_node(node.name, node=node)
        flow.add_edges_from((source.name, node.name) for source in node.all_input_nodes)
    return flow


def _local_descendants(flow: networkx.DiGraph, name: str) -> list[tuple[fx.Node, fx.Node]]:
    """Uses (reader, value) of an input behind elementwise and layout operators only."""

    def carries(vertex: str) -> bool:
        node = flow.nodes[vertex]["node"]
        return vertex == name or (
            node.op == "call_function"
            and (is_elementwise(node.target) or node.target in LAYOUTS or node.target is operator.getitem)
        )

    local = networkx.subgraph_view(flow, filter_node=carries)
    values = [name, *networkx.descendants(local, name)]
    return [(flow.nodes[reader]["node"], flow.nodes[value]["node"]) for value in values for reader in flow[value]]


def reaches_anchor(flow: networkx.DiGraph, name: str) -> bool:
    """Whether an input flows into a convolution, norm or resampling through elementwise and layout operators only."""
    return any(reader.target in ANCHORS for reader, _ in _local_descendants(flow, name))


def is_attention_bias(flow: networkx.DiGraph, name: str) -> bool:
    """Whether an input flows into the mask of an attention through elementwise and layout operators only."""
    return any(
        reader.target in ATTENTIONS and read_arguments(reader)["attn_mask"] is value
        for reader, value in _local_descendants(flow, name)
    )


def _reads_last_dimension(node: fx.Node, value: fx.Node) -> bool:
    """Whether an operator takes the last dimension of ``value``, and no other, for channels."""
    if node.target not in LAST_DIMENSION or node.args[0] is not value:
        return False
    return node.target is aten.linear.default or len(read_arguments(node)["normalized_shape"]) == 1


def _merges_rows_and_columns(node: fx.Node, value: fx.Node) -> bool:
    """Whether a reshape makes tokens ``[B, H * W, C]`` of ``[B, H, W, C]``."""
    if node.target not in RESHAPES:
        return False
    batch, height, width, channels = shape_of(value)
    return shape_of(node) == (batch, height * width, channels)


def _has_four_dimensions(node: fx.Node) -> bool:
    value = node.meta.get(VALUE)
    return isinstance(value, torch.Tensor) and value.dim() == 4


def reads_channels_last(flow: networkx.DiGraph, name: str) -> bool:
    """Whether a rank-4 input is ``[B, H, W, C]``.

    What tells are the convolutions, norms and resamplings that it reaches through elementwise operators, permutations,
    linear layers and norms over the last dimension: they read ``[B, C, H, W]``. Where there are none, it is, if one of
    those linear layers or norms reads its last dimension, or if its rows and columns are merged to tokens.
    """
    stack: list[tuple[str, tuple[int, ...]]] = [(name, (0, 1, 2, 3))]
    seen: set[tuple[str, tuple[int, ...]]] = set()
    anchored: set[tuple[int, ...]] = set()
    last_is_channels = False
    while stack:
        vertex, order = stack.pop()
        if (vertex, order) in seen:
            continue
        seen.add((vertex, order))
        value = flow.nodes[vertex]["node"]
        for reader in (flow.nodes[successor]["node"] for successor in flow[vertex]):
            if reader.target in ANCHORS:
                anchored.add(order)
            elif reader.target in PERMUTES:
                moved = permutation(reader, 4)
                stack.append((reader.name, tuple(order[dim] for dim in moved)))
            elif is_elementwise(reader.target):
                # Broadcasting may add dimensions in front.
                if _has_four_dimensions(reader):
                    stack.append((reader.name, order))
            elif _reads_last_dimension(reader, value):
                last_is_channels |= order == (0, 1, 2, 3)
                stack.append((reader.name, order))
            else:
                last_is_channels |= order == (0, 1, 2, 3) and _merges_rows_and_columns(reader, value)
    if anchored:
        return (0, 1, 2, 3) not in anchored and (0, 3, 1, 2) in anchored
    return last_is_channels


def connection_kind(node: fx.Node) -> Connection:
    """How a node connects the resolutions of its inputs with that of its output."""
    if DENSE_REASON in node.meta or spatial_of(node) is None and SPATIAL_OUTPUTS not in node.meta:
        return "ends locality"
    if node.target in CONVOLUTIONS or node.target in RESAMPLINGS:
        return "stencil"
    if node.target in ATTENTIONS:
        return "attention"
    if node.target in GROUP_NORMS:
        return "statistics"
    return "rows"


def domain_graph(graph: fx.Graph) -> networkx.MultiDiGraph:
    """Vertices are resolutions, and ``NOT_SPATIAL`` for all other values; an edge is an operator that reads one.

    An edge carries ``node`` and ``operator``, the names of the operator's node and of what it computes, ``kind``, and
    ``first``: of the edges of one node, one is the first. The graph must carry the annotations of propagate_domains.
    """
    domains = networkx.MultiDiGraph()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        outputs = [spatial_of(node), *node.meta.get(SPATIAL_OUTPUTS, ())]
        target: Domain | str = next((spatial.domain for spatial in outputs if spatial), NOT_SPATIAL)
        sources = dict.fromkeys(spatial.domain for value in node.all_input_nodes if (spatial := spatial_of(value)))
        for number, source in enumerate(sources):
            kind = connection_kind(node)
            # Only reshapes to patches and back lead from rows to rows of another resolution.
            moved = kind == "rows" and isinstance(target, Domain) and source != target
            kind = "stencil" if moved else kind
            domains.add_edge(source, target, node=node.name, operator=str(node.target), kind=kind, first=number == 0)
    return domains
