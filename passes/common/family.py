"""What a family of operators supplies: an inference rule for layouts and a rewrite to rows; and the loop over nodes.

A rule that does not apply returns its reason as a string; the operator then stays dense and ``explain`` prints why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from fisedit_compile.passes.common.ir import RowsBuilder, spatial_of
from fisedit_compile.passes.common.layouts import Spatial
from fisedit_compile.passes.common.meta import DENSE_REASON, SPATIAL_OUTPUTS
from fisedit_compile.passes.common.report import Report

Inferred = Spatial | list[Spatial] | str
Infer = Callable[[fx.Node], Inferred]
Rewrite = Callable[[fx.Node, RowsBuilder], str | None]


@dataclass(frozen=True)
class Family:
    """One family of operators.

    Attributes:
        name: of the pass that rewrites it.
        matches: whether an operator belongs to the family.
        infer: layout of a node's output (a list for several outputs), given that it reads a spatial value.
        rewrite: replaces the node by row operators and returns None, or changes nothing and returns the reason.
    """

    name: str
    matches: Callable[[Any], bool]
    infer: Infer
    rewrite: Rewrite


def is_annotated(node: fx.Node) -> bool:
    """Whether propagate_domains found the node's output, or each of its outputs, spatial."""
    return spatial_of(node) is not None or SPATIAL_OUTPUTS in node.meta


def rewrite_nodes(family: Family, graph: fx.Graph, report: Report) -> None:
    """Rewrite every annotated node of the family to rows, in place.

    A second run finds nothing to do: a rewritten node is gone.
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or not family.matches(node.target):
            continue
        reason = node.meta.get(DENSE_REASON)
        if reason is not None:
            report.miss(family.name, node, reason)
            continue
        if not is_annotated(node) or not any(spatial_of(value) for value in node.all_input_nodes):
            continue
        reason = family.rewrite(node, RowsBuilder(node))
        if reason is None:
            report.match(family.name)
        else:
            node.meta[DENSE_REASON] = reason
            report.miss(family.name, node, reason)
