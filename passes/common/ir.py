"""Marker nodes of the edit graph before it is lowered, and the helpers every pass uses.

Markers are ordinary ``call_function`` nodes whose targets are the functions below. They exist between passes only:
``lower_conversions``, ``insert_cache_ops`` and ``lift_cache_io`` replace all of them and ``verify`` checks that.

    to_rows(map)                     the active rows [B, N, *C] of a spatial value
    to_map(rows)                     the recorded map of ``meta["origin"]`` with the rows written in
    recorded(origin, transform)      a tensor of the recorded call: the value ``origin`` seen through ``transform``
    load(site), store(value, site)   what recorded tensors become once their cache sites are known
    update(recorded, new)            what a saved edit stores in place of a recorded tensor
    plan(kind, of)                   a tensor made from the mask; ``meta["plan_input"]`` is its specification
    unknown(*inputs)                 an output of a graph of which only inputs and outputs are known

``meta["likely_rows"]`` of what ``RowsBuilder.replace`` was given says how many rows it is likely to have, all samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import fx

from fisedit_compile.errors import GraphError
from fisedit_compile.passes.common.layouts import Spatial
from fisedit_compile.passes.common.meta import LIKELY_ROWS, MODULE_PATH, ORIGIN, PLAN_INPUT, PROVENANCE, SPATIAL, VALUE
from fisedit_compile.runtime.spec import Domain, PlanInput, PlanKind, Stencil

Transform = Literal["map", "rows", "norm_center", "norm_partials", "norm_totals"]
"""How a recorded value is kept; passes/README.md has what each one stores."""


def _marker(name: str) -> Callable[..., Any]:
    def run(*args: object, **kwargs: object) -> None:
        raise GraphError(f"marker node {name} was executed; lower the graph first")

    run.__name__ = run.__qualname__ = name
    run.__module__ = __name__
    return run


to_rows = _marker("to_rows")
to_map = _marker("to_map")
recorded = _marker("recorded")
update = _marker("update")
plan = _marker("plan")
load = _marker("load")
store = _marker("store")
unknown = _marker("unknown")
#: Of the masks that edits are likely to have, for what is chosen before the mask is known.
TYPICAL_DENSITY = 0.08
MARKERS = (to_rows, to_map, recorded, update, plan, load, store, unknown)


def spatial_of(node: object) -> Spatial | None:
    """The spatial annotation of a node, or None for anything else."""
    return node.meta.get(SPATIAL) if isinstance(node, fx.Node) else None


def origin_of(node: fx.Node) -> str:
    """Name of the node of the dense graph whose value this node stands for."""
    return str(node.meta.get(ORIGIN, node.name))


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Static shape of a tensor node.

    Raises:
        GraphError: the node carries no tensor value.
    """
    value = node.meta.get(VALUE)
    if not isinstance(value, torch.Tensor):
        raise GraphError(f"node {node.name} carries no tensor value")
    return tuple(int(size) for size in value.shape)


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """All input nodes, those inside lists included."""
    return list(node.all_input_nodes)


def reads_spatial(node: fx.Node) -> bool:
    """Whether any input of the node is spatial."""
    return any(spatial_of(value) is not None for value in node.all_input_nodes)


def copy_provenance(source: fx.Node, target: fx.Node) -> None:
    """Carry over what names the site of a node: module stack, stack trace."""
    for key in PROVENANCE:
        if key in source.meta:
            target.meta[key] = source.meta[key]


def insert_call(before: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Insert a call before a node whose place it takes: with a value, and with what names the node's site."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args, kwargs)
    copy_provenance(before, node)
    if MODULE_PATH in before.meta:
        node.meta[MODULE_PATH] = before.meta[MODULE_PATH]
    values, keywords = fx.node.map_arg((args, kwargs), lambda value: value.meta[VALUE])
    with torch.no_grad():
        node.meta[VALUE] = target(*values, **keywords)
    return node


def likely_rows(domain: Domain) -> int:
    """How many rows of a sample an edit is likely to compute at a resolution."""
    return max(1, round(TYPICAL_DENSITY * domain.size))


class RowsBuilder:
    """Inserts row operations before a node and finally replaces the node by them."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node
        self.graph = node.graph

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call before the node."""
        with self.graph.inserting_before(self.node):
            node = self.graph.call_function(target, args, kwargs)
        copy_provenance(self.node, node)
        return node

    def rows(self, value: fx.Node) -> fx.Node:
        """The active rows of a spatial value: ``[B, N, *C]``."""
        if value.target is to_map:
            rows = value.args[0]
            assert isinstance(rows, fx.Node)
            return rows
        return self.call(to_rows, value)

    def plan(self, kind: PlanKind, of: Domain | Stencil) -> fx.Node:
        """A tensor made from the mask."""
        label = str(of) if isinstance(of, Domain) else f"{of.kind}:{of.source}->{of.target}"
        node = self.call(plan, kind, label)
        node.meta[PLAN_INPUT] = PlanInput(kind, of)
        return node

    def recorded(self, value: fx.Node, transform: Transform, *parameters: int) -> fx.Node:
        """A tensor of the recorded call: ``value`` seen through ``transform``."""
        return self.call(recorded, origin_of(value), transform, *parameters)

    def recorded_rows(self, value: fx.Node, rows: fx.Node) -> fx.Node:
        """The recorded map ``[B, S, *C]`` of ``value``; a saved edit writes ``rows`` into it."""
        node = self.recorded(value, "rows")
        self.call(update, node, rows)
        return node

    def taps(self, value: fx.Node, stencil: Stencil, fill: float) -> fx.Node:
        """What each target position reads, ``[B, N_target, K, *C]``; positions outside the map read ``fill``."""
        rows = self.rows(value)
        return self.call(
            torch.ops.fisedit.gather_taps.default,
            rows,
            self.recorded_rows(value, rows),
            self.plan("halo", stencil),
            self.plan("table", stencil),
            fill,
        )

    def dense_rows(self, value: fx.Node, spatial: Spatial, sizes: Sequence[int]) -> fx.Node | str:
        """Bring a value that is not spatial into the shape that broadcasts with rows of ``spatial``.

        ``sizes`` is the logical shape of the value the rows belong to. Returns a node ``[b, 1 or N, *C]``, or a
        reason why it cannot be done.
        """
        shape = shape_of(value)
        if len(shape) > len(sizes):
            return f"an operand of rank {len(shape)} broadcasts beyond rank {len(sizes)}"
        if all(size == 1 for size in shape) and len(shape) <= 1:
            return value
        padded = (1,) * (len(sizes) - len(shape)) + shape
        space = [padded[dim] for dim in spatial.space_dims]
        order = spatial.order
        channels = [padded[dim] for dim in spatial.channel_dims]
        batch = padded[spatial.batch_dim]
        moved = [dim for dim in order if padded[dim] != 1]
        node = value
        if all(size == 1 for size in space):
            if moved != sorted(moved):
                node = self.call(torch.ops.aten.reshape.default, node, list(padded))
                node = self.call(torch.ops.aten.permute.default, node, list(order))
            return self.call(torch.ops.aten.reshape.default, node, [batch, 1, *channels])
        full = [sizes[dim] if dim in spatial.space_dims else padded[dim] for dim in range(len(sizes))]
        full[spatial.batch_dim] = sizes[spatial.batch_dim]
        if full != list(shape):
            node = self.call(torch.ops.aten.expand.default, node, full)
        if list(order) != list(range(len(order))):
            node = self.call(torch.ops.aten.permute.default, node, list(order))
        if spatial.space_rank == 2:
            node = self.call(torch.ops.aten.flatten.using_ints, node, 1, 2)
        return self.call(torch.ops.fisedit.gather_rows.default, node, self.plan("index", spatial.domain))

    def replace(self, rows: fx.Node, node: fx.Node | None = None) -> None:
        """Let ``to_map(rows)`` stand for the node from now on, and erase it."""
        node = node or self.node
        spatial = node.meta[SPATIAL]
        rows.meta[LIKELY_ROWS] = shape_of(node)[spatial.batch_dim] * likely_rows(spatial.domain)
        with self.graph.inserting_before(node):
            value = self.graph.call_function(to_map, (rows,))
        copy_provenance(node, value)
        value.meta.update({VALUE: node.meta[VALUE], SPATIAL: node.meta[SPATIAL], ORIGIN: origin_of(node)})
        node.replace_all_uses_with(value)
        self.graph.erase_node(node)


def eliminate_dead_code(graph: fx.Graph) -> None:
    """Erase nodes without users; an ``update`` dies with the last reader of what it updates."""
    for node in reversed(list(graph.nodes)):
        if node.op in ("placeholder", "output"):
            continue
        if node.target is update:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            if all(user.target is update for user in source.users):
                graph.erase_node(node)
        elif not node.users:
            graph.erase_node(node)
