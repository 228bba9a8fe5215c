"""What flows where in a network: its resolutions, what stays dense, and the operators in between, as a graph to draw.

The graph is a ``networkx.DiGraph`` of plain values, so that it can be written as JSON and read elsewhere. Vertices are

* resolutions, named by their size (``"64x64"``), and by their place, where positions were moved;
* ``"dense"``: the operators on maps that run densely;
* ``"not spatial"``: what has no positions, such as embeddings of timesteps and prompts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import networkx

from fisedit_compile.errors import OptionError
from fisedit_compile.passes.common.report import Report
from fisedit_compile.passes.domains.geometry.domain_graph import NOT_SPATIAL
from fisedit_compile.reporting.flow_drawing import draw
from fisedit_compile.runtime.spec import Domain

DENSE = "dense"
#: What an edge is that nobody else says.
ENDS = "ends locality"


def flow_graph(reports: Sequence[Report]) -> networkx.DiGraph:
    """Put the graphs of the passes together.

    Args:
        reports: one for each graph of a network; the vertices of several are named ``"graph 0: 64x64"``.

    Returns:
        The graph. Vertices carry ``kind`` (``"domain"``, ``"dense"`` or ``"not spatial"``), ``graph`` (the number of
        the report), for domains ``height``, ``width`` and ``place`` (``"the map"`` or ``"moved"``), and ``dense_macs``:
        the multiply-accumulates of operators that read no resolution. Edges carry ``values`` (how many values flow),
        ``operators`` and ``kinds`` (how many of each), ``sparse_macs`` and ``dense_macs``: the multiply-accumulates of
        these operators in a dense call, of those that edits compute by rows and of those that they compute densely.
    """
    found = networkx.DiGraph()
    for number, report in enumerate(reports):
        _add(found, report, number, f"graph {number}: " if len(reports) > 1 else "")
    return found


def _add(found: networkx.DiGraph, report: Report, number: int, prefix: str) -> None:
    costs = {count.node: count for count in report.mac_counts}
    dense = {miss.node for miss in report.dense_nodes}
    counted = set()

    def vertex(value: Domain | str) -> str:
        name = f"{prefix}{value}"
        if name not in found:
            found.add_node(name, kind=DENSE if value == DENSE else NOT_SPATIAL, graph=number, dense_macs=0)
            if isinstance(value, Domain):
                place = "the map" if value.cover.whole else "moved"
                found.nodes[name].update(kind="domain", height=value.height, width=value.width, place=place)
        return name

    for source, target, data in report.flow.edges(data=True):
        cost = costs.get(data["node"]) if data["first"] else None
        counted.add(data["node"])
        if data["kind"] == ENDS or data["node"] in dense:
            _flow(found, vertex(source), vertex(DENSE), data, 0, 0 if cost is None else cost.macs)
            _flow(found, vertex(DENSE), vertex(target), data, 0, 0)
        else:
            on_rows = cost is not None and cost.domain is not None
            macs = 0 if cost is None else cost.macs
            _flow(found, vertex(source), vertex(target), data, macs if on_rows else 0, 0 if on_rows else macs)
    rest = sum(cost.macs for node, cost in costs.items() if node not in counted)
    if rest or not report.flow:
        found.nodes[vertex(NOT_SPATIAL if report.flow else DENSE)]["dense_macs"] += rest


def _flow(
    found: networkx.DiGraph, source: str, target: str, data: dict[str, Any], sparse_macs: int, dense_macs: int
) -> None:
    """Add one operator to the edge between two vertices."""
    if not found.has_edge(source, target):
        found.add_edge(source, target, values=0, operators={}, kinds={}, sparse_macs=0, dense_macs=0)
    edge = found.edges[source, target]
    edge["values"] += 1
    edge["operators"] = dict(Counter(edge["operators"]) + Counter([_short(data["operator"])]))
    edge["kinds"] = dict(Counter(edge["kinds"]) + Counter([data["kind"]]))
    edge["sparse_macs"] += sparse_macs
    edge["dense_macs"] += dense_macs


def _short(operator: str) -> str:
    """``conv2d`` of ``aten.conv2d.default``, ``getitem`` of Python's own."""
    parts = operator.split(".")
    if len(parts) == 3 and parts[0] == "aten":
        return parts[1]
    return operator.removeprefix("<built-in function ").removesuffix(">")


def as_json(graph: networkx.DiGraph) -> str:
    """The graph as node-link data, which ``networkx.node_link_graph(json.loads(text), edges="edges")`` reads."""
    return json.dumps(networkx.node_link_data(graph, edges="edges"), indent=2) + "\n"


def as_dot(graph: networkx.DiGraph) -> str:
    """The graph in the language of Graphviz."""
    lines = ["digraph flow {", "  node [shape=box];"]
    for name, data in graph.nodes(data=True):
        filled = "" if data["kind"] == "domain" else ", style=dashed"
        lines.append(f"  {_quoted(name)} [label={_quoted(name)}{filled}];")
    for source, target, data in graph.edges(data=True):
        operators = ", ".join(f"{count} {name}" for name, count in sorted(data["operators"].items()))
        macs = f"{data['sparse_macs']} sparse, {data['dense_macs']} dense"
        label = f"{data['values']} values: {operators}\\n{macs}"
        lines.append(f"  {_quoted(source)} -> {_quoted(target)} [label={_quoted(label)}];")
    return "\n".join([*lines, "}", ""])


def _quoted(text: str) -> str:
    """A text as Graphviz reads it; a backslash in front of an n is a new line there."""
    return '"' + text.replace('"', '\\"') + '"'


WRITERS: dict[str, Callable[[networkx.DiGraph], str]] = {".svg": draw, ".dot": as_dot, ".json": as_json}


def check_ending(path: Path) -> None:
    """Find out before a network is traced whether its graph can be written.

    Raises:
        OptionError: the file has another ending than ``.svg``, ``.dot`` or ``.json``.
    """
    if path.suffix.lower() not in WRITERS:
        raise OptionError(f"cannot write a graph to {path}; expected a file ending in one of {', '.join(WRITERS)}")


def write_graph(graph: networkx.DiGraph, path: Path) -> None:
    """Write a graph as a drawing, for Graphviz, or as JSON; the file's ending decides.

    Raises:
        OptionError: it has another ending.
    """
    check_ending(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(WRITERS[path.suffix.lower()](graph), encoding="utf-8")
