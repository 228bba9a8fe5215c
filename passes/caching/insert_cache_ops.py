"""Decide what a recorded call stores; put store nodes into the record graph and load nodes into the edit graph.

Why: the edit graph names recorded values by their origin; here each distinct pair of origin and transform becomes one
cache site, so that nothing is stored twice and nothing that no edit needs is stored.

Before: edit: ``h = recorded("conv2d_input", "rows")``, ``p = recorded("x", "norm_partials", 32)``
After:  edit: ``h = load("conv2d_input:rows")``, ``p = load("x:norm_partials:32")``
        record: ``store(contiguous_rows(flatten(permute(conv2d_input, ...))), "conv2d_input:rows")``,
        ``store(getitem(norm_record(x as [B, S, C], 32), 1), "x:norm_partials:32")``; what is stored is computed right
        behind the value, while that is in the caches, and so that it need not be kept until the end of the call

Conditions:
1. Every tensor output of the graph is a site ``output:i``; it also serves as the recorded map of its value.
2. Transforms: ``map`` (as it is), ``rows`` ([B, S, *C], contiguous), ``norm_center`` [B, G], ``norm_partials``
   [B, S, 2, G] and ``norm_totals`` [B, 2, G].
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from fisedit_compile.errors import GraphError
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.ir import (
    RowsBuilder,
    Transform,
    eliminate_dead_code,
    load,
    recorded,
    shape_of,
    spatial_of,
    store,
)
from fisedit_compile.passes.common.layouts import Spatial
from fisedit_compile.passes.common.meta import MODULE_PATH, ORIGIN, VALUE
from fisedit_compile.passes.common.targets import aten
from fisedit_compile.passes.sparsify.lower_conversions import flatten_space
from fisedit_compile.runtime.spec import Site

NAME = "insert_cache_ops"
NORM_OUTPUTS: tuple[Transform, ...] = ("norm_center", "norm_partials", "norm_totals")


def add_store(graph: fx.Graph, value: fx.Node, name: str) -> None:
    """Let a record graph store a value at the site ``name``."""
    with graph.inserting_before(next(iter(reversed(graph.nodes)))):
        graph.call_function(store, (value, name))


@dataclass
class _Recorder:
    """Adds stores to the record graph."""

    graph: fx.Graph
    values: dict[str, fx.Node]
    sites: dict[str, Site] = field(default_factory=dict)
    norms: dict[tuple[str, int], fx.Node] = field(default_factory=dict)

    def add(self, name: str, value: fx.Node, site: Site) -> None:
        add_store(self.graph, value, name)
        self.sites[name] = site

    def site(self, origin: str, transform: Transform, parameters: tuple[int, ...]) -> str:
        """Name of the site of a transform of the value ``origin``; it is added when it is new."""
        value = self.values[origin]
        path = value.meta.get(MODULE_PATH)
        name = ":".join([*([path] if path else []), origin, transform, *map(str, parameters)])
        if name in self.sites:
            return name
        spatial = spatial_of(value)
        if spatial is None:
            raise GraphError(f"the value {origin} to be recorded is not spatial")
        builder = RowsBuilder(_behind(value))
        shape, dtype = shape_of(value), value.meta[VALUE].dtype
        if transform == "map":
            self.add(
                name, value, Site(name, "spatial", spatial.domain, spatial.order, spatial.space_rank, shape, dtype)
            )
            return name
        channels = tuple(shape[dim] for dim in spatial.channel_dims)
        flat = (shape[spatial.batch_dim], spatial.domain.size, *channels)
        if transform == "rows":
            # The former gives what is contiguous already as it is, the latter copies fast.
            ready = value.meta[VALUE].permute(spatial.order).is_contiguous()
            contiguous = aten.contiguous.default if ready else torch.ops.fisedit.contiguous_rows.default
            rows = builder.call(contiguous, flatten_space(builder, value, spatial))
            self.add(name, rows, _rows_site(name, spatial, flat, dtype))
            return name
        groups = parameters[0]
        if (origin, groups) not in self.norms:
            rows = flatten_space(builder, value, spatial)
            self.norms[origin, groups] = builder.call(torch.ops.fisedit.norm_record.default, rows, groups)
        statistics = self.norms[origin, groups]
        tensor = RowsBuilder(_behind(statistics)).call(operator.getitem, statistics, NORM_OUTPUTS.index(transform))
        if transform == "norm_partials":
            site = _rows_site(name, spatial, (*flat[:2], 2, groups), torch.float32)
            self.add(name, tensor, replace(site, lossless=True))
        else:
            size = (flat[0], groups) if transform == "norm_center" else (flat[0], 2, groups)
            self.add(name, tensor, Site(name, "value", None, (), 0, size, torch.float32))
        return name


def _behind(value: fx.Node) -> fx.Node:
    """The node in front of which whatever reads ``value`` only may stand: behind it, and behind all placeholders."""
    node = value.next
    while node.op == "placeholder":
        node = node.next
    return node


def _rows_site(name: str, spatial: Spatial, shape: tuple[int, ...], dtype: torch.dtype) -> Site:
    return Site(name, "spatial", spatial.domain, tuple(range(len(shape))), 1, shape, dtype)


def insert_cache_ops(compilation: Compilation) -> None:
    """Run the pass on the edit and the record graph; ``sites`` are in the order of their stores."""
    edit, record = compilation.edit, compilation.module("record")
    # What nobody reads must not be stored.
    eliminate_dead_code(edit.graph)
    recorder = _Recorder(record.graph, {str(node.meta.get(ORIGIN, node.name)): node for node in record.graph.nodes})
    outputs: dict[str, str] = {}
    output = next(iter(reversed(record.graph.nodes)))
    for number, value in enumerate(output.args[0]):
        if not isinstance(value, fx.Node):
            continue
        name, spatial = f"output:{number}", spatial_of(value)
        shape, dtype = shape_of(value), value.meta[VALUE].dtype
        if spatial is None:
            site = Site(name, "value", None, (), 0, shape, dtype)
        else:
            site = Site(name, "spatial", spatial.domain, spatial.order, spatial.space_rank, shape, dtype, lossless=True)
        recorder.add(name, value, site)
        outputs.setdefault(str(value.meta.get(ORIGIN, value.name)), name)
    for node in list(edit.graph.nodes):
        if node.target is not recorded:
            continue
        origin, transform, *parameters = node.args
        if transform == "map" and origin in outputs:
            name = outputs[origin]
        else:
            name = recorder.site(origin, transform, tuple(parameters))
        node.target, node.args = load, (name,)
        compilation.report.match(NAME)
    for graph_module in (edit, record):
        graph_module.recompile()
    compilation.sites = tuple(recorder.sites.values())
