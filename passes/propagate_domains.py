"""Find which values are spatial, at which resolution, with which dimensions.

Why: every later pass asks this of its operands. Nothing is rewritten here.

Before: no annotations
After:  ``node.meta["spatial"] = Spatial(domain, dims)`` on spatial values (``"spatial_outputs"``, a list, on nodes
        with several outputs), ``node.meta["origin"]`` on every node, and ``node.meta["dense_reason"]`` on operators
        that read a spatial value and stay dense.

Conditions for an input to be spatial:
1. It is a floating tensor of rank 4 with more than one position, and not a parameter; or it is one of the tokens that
   the user says are pictures (tokens.py), for which condition 2 holds.
2. It flows into a convolution, norm or resampling through elementwise and layout operators only; or it has more than
   one row and column, does not flow into the mask of an attention, and no other input flows into one of those, unless
   it has the resolution of one that does. (The tokens of several images are [B, images, tokens, C].)
3. Its batch is that of the first such input.

An operator's output is spatial when its family's inference rule says so. Where a rule gives its reason, behind an
operator that no rule knows, and further on behind values that are not spatial but were made from one, recognise.py
tells. A graph that returns a value about which it cannot tell has no annotations: it stays dense, with the reason.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

from fisedit_compile.config import TOKENS_HINT
from fisedit_compile.passes.domain_graph import (
    data_flow,
    domain_graph,
    is_attention_bias,
    reaches_anchor,
    reads_channels_last,
)
from fisedit_compile.passes.family import Family
from fisedit_compile.passes.ir import reads_spatial, shape_of, spatial_of, unknown
from fisedit_compile.passes.layouts import HEIGHT, NCHW, NHWC, TOKENS, WIDTH, Spatial
from fisedit_compile.passes.program import InputInfo
from fisedit_compile.passes.recognise import Recogniser
from fisedit_compile.passes.report import Report
from fisedit_compile.passes.targets import RESOLUTION_CHANGES, aten
from fisedit_compile.runtime.spec import Domain

NAME = "propagate_domains"
UNKNOWN = "no rule knows this operator"
NO_INPUT = "none of its inputs is a picture or a feature map"
BEHIND = "it reads what a dense operator made of a spatial value"


def find_spatial_inputs(graph: fx.Graph, infos: Sequence[InputInfo], report: Report) -> list[fx.Node]:
    """Annotate the spatial inputs; one of rank 4 or of tokens that is not spatial is reported with its reason."""
    flow = data_flow(graph)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    known: dict[fx.Node, tuple[Spatial, bool]] = {}
    for node, info in zip(placeholders, infos, strict=True):
        value = node.meta.get("val")
        if info.tokens is not None:
            known[node] = (Spatial(info.tokens, TOKENS), True)
            continue
        if info.kind != "user" or not isinstance(value, torch.Tensor) or value.dim() != 4:
            continue
        dims = NHWC if reads_channels_last(flow, node.name) else NCHW
        size = (value.shape[dims.index(name)] for name in (HEIGHT, WIDTH))
        known[node] = (Spatial(Domain(*map(int, size)), dims), reaches_anchor(flow, node.name))
    certain = {s.domain for node, (s, anchored) in known.items() if anchored and node.meta["val"].is_floating_point()}
    found: list[fx.Node] = []
    for node, (spatial, anchored) in known.items():
        domain, batch = spatial.domain, shape_of(node)[0]
        if not node.meta["val"].is_floating_point() or domain.size < 2:
            report.miss(NAME, node, "it is not a floating tensor with more than one position")
        elif not anchored and is_attention_bias(flow, node.name):
            report.miss(NAME, node, "it is the mask of an attention")
        elif not anchored and min(domain.height, domain.width) < 2:
            report.miss(NAME, node, "it is a single row or column and reaches no convolution, norm or resampling")
        elif not anchored and certain and domain not in certain:
            report.miss(NAME, node, "it reaches no convolution, norm or resampling, unlike an input of another size")
        elif found and shape_of(found[0])[0] != batch:
            report.miss(NAME, node, f"its batch is {batch}, not {shape_of(found[0])[0]}")
        else:
            node.meta["spatial"] = spatial
            found.append(node)
    return found


def find_resolutions(derived: Sequence[fx.Node], batch: int, domains: set[Domain]) -> None:
    """Add the resolutions that padding, pooling, resizing, cropping and graphs of which nothing is known lead to, so
    that shapes can be recognised."""
    for node in derived:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.dim() != 4 or value.shape[0] != batch:
            continue
        source = node.args[0] if node.args else None
        cropped = (
            node.target is aten.slice.Tensor
            and isinstance(source, fx.Node)
            and Domain(*shape_of(source)[2:]) in domains
        )
        domain = Domain(*shape_of(node)[2:])
        if (cropped or node.target in RESOLUTION_CHANGES or node.target is unknown) and domain.size > 1:
            domains.add(domain)


def _annotate(
    node: fx.Node, families: Sequence[Family], batch: int, domains: set[Domain], recogniser: Recogniser
) -> None:
    """Annotate a node that reads a spatial value."""
    family = next((family for family in families if family.matches(node.target)), None)
    inferred = family.infer(node) if family is not None else UNKNOWN
    if isinstance(inferred, Spatial) and shape_of(node)[inferred.batch_dim] != batch:
        inferred = f"its batch is not {batch}"
    if isinstance(inferred, list):
        node.meta["spatial_outputs"] = inferred
    elif isinstance(inferred, Spatial):
        node.meta["spatial"] = inferred
        domains.add(inferred.domain)
    else:
        node.meta["dense_reason"] = inferred
        recogniser.recognise(node)


def _no_input(graph: fx.Graph, infos: Sequence[InputInfo]) -> str:
    """Why nothing is spatial, and which inputs the user could declare to be pictures."""
    placeholders = (node.meta.get("val") for node in graph.nodes if node.op == "placeholder")
    tokens = [
        info.name
        for info, value in zip(infos, placeholders, strict=True)
        if info.kind == "user" and isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() == 3
    ]
    hint = f"{TOKENS_HINT} of tokens [B, H * W, C], here of {' or '.join(tokens)}" if tokens else ""
    return NO_INPUT + hint


def _forget(node: fx.Node) -> None:
    for key in ("spatial", "spatial_outputs", "dense_reason"):
        node.meta.pop(key, None)


def _check_outputs(graph: fx.Graph, doubtful: Sequence[fx.Node], report: Report) -> None:
    """Keep the whole graph dense when it returns a value that may be a map or not: it could not be masked."""
    returned = next(iter(reversed(graph.nodes))).all_input_nodes
    for node in doubtful:
        if node not in returned:
            report.miss(NAME, node, f"its shape {list(shape_of(node))} does not tell which dimensions are positions")
            continue
        maker = "an unknown operator" if node.target is unknown else node.target
        report.dense_reason = (
            f"its output {node.name} of shape {list(shape_of(node))} was made by {maker}, and its sizes do not "
            "tell which of its dimensions are positions; another resolution or number of channels may"
        )
        for other in graph.nodes:
            _forget(other)
        return


def propagate_domains(
    graph_module: fx.GraphModule, infos: Sequence[InputInfo], families: Sequence[Family], report: Report
) -> fx.GraphModule:
    """Run the pass in place and return the module."""
    graph = graph_module.graph
    inputs = find_spatial_inputs(graph, infos, report)
    domains = {spatial.domain for node in inputs if (spatial := spatial_of(node))}
    derived = dict.fromkeys(inputs)
    for node in graph.nodes:
        node.meta["origin"] = node.name
        if node.op != "placeholder":
            _forget(node)
        if node.op == "call_function" and any(value in derived for value in node.all_input_nodes):
            derived[node] = None
    batch = shape_of(inputs[0])[0] if inputs else 0
    find_resolutions(list(derived), batch, domains)
    recogniser = Recogniser(derived, batch, domains)
    for node in derived:
        if node in inputs:
            continue
        source = node.args[0] if node.target is operator.getitem else None
        outputs = source.meta.get("spatial_outputs") if isinstance(source, fx.Node) else None
        if outputs is not None:
            node.meta["spatial"] = outputs[node.args[1]]
        elif node.target is not operator.getitem and reads_spatial(node):
            _annotate(node, families, batch, domains, recogniser)
        else:
            node.meta["dense_reason"] = BEHIND
            recogniser.recognise(node)
    if not inputs:
        report.dense_reason = _no_input(graph, infos)
    _check_outputs(graph, recogniser.doubtful, report)
    report.matches[NAME] += len(inputs)
    for source, target, data in domain_graph(graph).edges(data=True):
        report.connections[str(source), str(target), data["kind"]] += 1
    return graph_module
