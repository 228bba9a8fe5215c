"""Find which values are spatial, at which resolution, with which dimensions.

Why: every later pass asks this of its operands. Nothing is rewritten here.

Before: no annotations
After:  ``node.meta["spatial"] = Spatial(domain, dims)`` on spatial values (``"spatial_outputs"``, a list, on nodes
        with several outputs), ``node.meta["origin"]`` on every node, and ``node.meta["dense_reason"]`` on operators
        that read a spatial value and stay dense.

Conditions for an input to be spatial:
1. It is a floating tensor of rank 4, not a parameter, with more than one row and more than one column.
2. It flows into a convolution, norm or resampling through elementwise and layout operators only.
3. Its batch is that of the first such input.

An operator's output is spatial when its family's inference rule says so. Behind an operator that no rule knows, and
where a rule gives its reason, the output is spatial when its shape shows it beyond doubt.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from fisedit_compile.passes.domain_graph import data_flow, domain_graph, reaches_anchor
from fisedit_compile.passes.family import Family
from fisedit_compile.passes.ir import reads_spatial, shape_of
from fisedit_compile.passes.layouts import NCHW, Spatial, recognise_layout
from fisedit_compile.passes.program import InputInfo
from fisedit_compile.passes.report import Report
from fisedit_compile.runtime.spec import Domain
from torch import fx

NAME = "propagate_domains"
UNKNOWN = "no rule knows this operator"


def find_spatial_inputs(graph: fx.Graph, infos: Sequence[InputInfo], report: Report) -> list[fx.Node]:
    """The spatial inputs; a rank-4 input that is not spatial is reported with its reason."""
    flow = data_flow(graph)
    found: list[fx.Node] = []
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, info in zip(placeholders, infos, strict=True):
        value = node.meta.get("val")
        if info.kind != "user" or not isinstance(value, torch.Tensor) or value.dim() != 4:
            continue
        if not value.is_floating_point() or value.shape[2] < 2 or value.shape[3] < 2:
            report.miss(NAME, node, "it is not a floating tensor with more than one row and column")
        elif not reaches_anchor(flow, node.name):
            report.miss(NAME, node, "it reaches no convolution, norm or resampling as a map")
        elif found and shape_of(found[0])[0] != value.shape[0]:
            report.miss(NAME, node, f"its batch is {value.shape[0]}, not {shape_of(found[0])[0]}")
        else:
            found.append(node)
    return found


def _annotate(node: fx.Node, families: Sequence[Family], batch: int, domains: set[Domain]) -> None:
    family = next((family for family in families if family.matches(node.target)), None)
    inferred = family.infer(node) if family is not None else UNKNOWN
    if isinstance(inferred, Spatial) and shape_of(node)[inferred.batch_dim] != batch:
        inferred = f"its batch is not {batch}"
    if isinstance(inferred, list):
        node.meta["spatial_outputs"] = inferred
        return
    if isinstance(inferred, Spatial):
        node.meta["spatial"] = inferred
        domains.add(inferred.domain)
        return
    node.meta["dense_reason"] = inferred
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and (layout := recognise_layout(shape_of(node), batch, domains)):
        node.meta["spatial"] = layout


def propagate_domains(
    graph_module: fx.GraphModule, infos: Sequence[InputInfo], families: Sequence[Family], report: Report
) -> fx.GraphModule:
    """Run the pass in place and return the module."""
    graph = graph_module.graph
    inputs = find_spatial_inputs(graph, infos, report)
    domains: set[Domain] = set()
    for node in inputs:
        domain = Domain(*shape_of(node)[2:])
        domains.add(domain)
        node.meta["spatial"] = Spatial(domain, NCHW)
    for node in graph.nodes:
        node.meta["origin"] = node.name
        if node.op != "call_function" or not inputs:
            continue
        batch = shape_of(inputs[0])[0]
        if node.target is operator.getitem:
            source, number = node.args
            outputs = source.meta.get("spatial_outputs")
            if outputs is not None:
                node.meta["spatial"] = outputs[number]
            elif "dense_reason" in source.meta and isinstance(node.meta.get("val"), torch.Tensor):
                if layout := recognise_layout(shape_of(node), batch, domains):
                    node.meta["spatial"] = layout
        elif reads_spatial(node):
            _annotate(node, families, batch, domains)
    report.matches[NAME] += len(inputs)
    for source, target, data in domain_graph(graph).edges(data=True):
        report.connections[str(source), str(target), data["kind"]] += 1
    return graph_module
