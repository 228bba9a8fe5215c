"""The graph of what flows where: vertices, edges and costs counted by hand, and the files it is written to."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import networkx
import pytest
import torch
from torch import Tensor, nn

import fisedit_compile as fisedit
from fisedit_compile.cli import explain as command
from fisedit_compile.errors import OptionError
from fisedit_compile.options import Options
from fisedit_compile.reporting.explain import ExplainReport, explain_with
from fisedit_compile.reporting.flow import as_dot, as_json, write_graph


class Levels(nn.Module):
    """Down to a coarser map and up again, beside an embedding; ``sort`` is known to no rule, ``mean`` ends the map."""

    def __init__(self, sorting: bool = False) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.inner = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 3, 2, stride=2)
        self.embedding = nn.Linear(4, 8)
        self.sorting = sorting

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        y = self.down(x) + self.embedding(time)[:, :, None, None]
        y = self.inner(torch.relu(y))
        if self.sorting:
            y = y.sort(dim=1).values
        return self.up(y), y.mean((2, 3))


def explained(sorting: bool = False, **options: Any) -> ExplainReport:
    inputs = torch.empty(1, 3, 16, 20, device="meta"), torch.empty(1, 4, device="meta")
    return explain_with(Options(**options), Levels(sorting).to("meta"), *inputs)


@pytest.fixture(scope="module")
def graph() -> networkx.DiGraph:
    return explained().graph


def test_vertices_are_resolutions_and_what_has_none(graph: networkx.DiGraph) -> None:
    kinds = {name: data["kind"] for name, data in graph.nodes(data=True)}
    assert kinds == {"16x20": "domain", "8x10": "domain", "dense": "dense", "not spatial": "not spatial"}
    fine = graph.nodes["16x20"]
    assert (fine["height"], fine["width"], fine["place"], fine["graph"]) == (16, 20, "the map", 0)


def test_edges_count_values_and_multiply_accumulates(graph: networkx.DiGraph) -> None:
    down, up = graph.edges["16x20", "8x10"], graph.edges["8x10", "16x20"]
    assert (down["values"], down["operators"], down["kinds"]) == (1, {"conv2d": 1}, {"stencil": 1})
    assert (down["sparse_macs"], down["dense_macs"]) == (8 * 10 * 8 * 3 * 9, 0)
    assert up["operators"] == {"conv_transpose2d": 1} and up["sparse_macs"] == 8 * 10 * 8 * 3 * 4
    here = graph.edges["8x10", "8x10"]
    assert here["operators"] == {"add": 1, "relu": 1, "conv2d": 1} and here["kinds"] == {"rows": 2, "stencil": 1}
    assert here["sparse_macs"] == 8 * 10 * 8 * 8


def test_what_ends_the_map_is_dense_and_leads_to_what_has_no_positions(graph: networkx.DiGraph) -> None:
    assert graph.edges["8x10", "dense"]["operators"] == {"mean": 1}
    assert graph.edges["dense", "not spatial"]["kinds"] == {"ends locality": 1}
    assert not graph.has_edge("8x10", "not spatial")


def test_all_arithmetic_of_the_report_is_in_the_graph(graph: networkx.DiGraph) -> None:
    report = explained()
    assert sum(data["sparse_macs"] for _, _, data in graph.edges(data=True)) == report.sparse_macs
    dense = sum(data["dense_macs"] for _, _, data in graph.edges(data=True))
    # The embedding reads no map.
    assert graph.nodes["not spatial"]["dense_macs"] == 4 * 8
    assert dense + 4 * 8 == report.total_macs - report.sparse_macs


def test_operators_without_a_rule_lead_through_what_stays_dense() -> None:
    graph = explained(sorting=True).graph
    assert graph.edges["8x10", "dense"]["operators"]["sort"] == 1
    assert graph.has_edge("dense", "8x10") or graph.has_edge("dense", "not spatial")


def test_disabled_passes_leave_their_arithmetic_dense() -> None:
    report = explained(disabled_passes=frozenset({"sparsify_conv"}))
    graph = report.graph
    assert graph.edges["16x20", "dense"]["operators"] == {"conv2d": 1}
    assert graph.edges["16x20", "dense"]["dense_macs"] == 8 * 10 * 8 * 3 * 9
    assert all(data["sparse_macs"] == 0 for _, _, data in graph.edges(data=True)) and report.sparse_macs == 0


def test_places_of_moved_positions_are_vertices_of_their_own() -> None:
    class Flipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.convolution(x.flip(3))
            return result

    graph = fisedit.explain(Flipped().to("meta"), torch.empty(1, 3, 6, 8, device="meta")).graph
    assert {data["place"] for _, data in graph.nodes(data=True) if data["kind"] == "domain"} == {"the map", "moved"}


def test_a_network_without_a_picture_is_one_dense_vertex() -> None:
    graph = fisedit.explain(nn.Linear(3, 4).to("meta"), torch.empty(2, 3, device="meta")).graph
    assert dict(graph.nodes(data=True)) == {"dense": {"kind": "dense", "graph": 0, "dense_macs": 2 * 3 * 4}}


def test_json_is_node_link_data(graph: networkx.DiGraph) -> None:
    read = networkx.node_link_graph(json.loads(as_json(graph)), edges="edges")
    assert dict(read.nodes(data=True)) == dict(graph.nodes(data=True))
    assert {edge: read.edges[edge] for edge in read.edges} == {edge: graph.edges[edge] for edge in graph.edges}


def test_dot_has_a_line_for_each_vertex_and_edge(graph: networkx.DiGraph) -> None:
    lines = as_dot(graph).splitlines()
    assert lines[0] == "digraph flow {" and lines[-1] == "}"
    assert sum(" -> " in line for line in lines) == graph.number_of_edges()
    label = f"1 values: 1 conv2d\\n{8 * 10 * 8 * 3 * 9} sparse, 0 dense"
    assert f'  "16x20" -> "8x10" [label="{label}"];' in lines
    assert '  "16x20" [label="16x20"];' in lines and '  "dense" [label="dense", style=dashed];' in lines


def test_the_drawing_shows_every_vertex_and_edge(graph: networkx.DiGraph, tmp_path: Path) -> None:
    path = tmp_path / "new" / "flow.svg"
    explained().write_graph(path)
    space = "{http://www.w3.org/2000/svg}"
    root = ElementTree.parse(path).getroot()
    assert len(root.findall(f"{space}rect")) == graph.number_of_nodes()
    between = [edge for edge in graph.edges if edge[0] != edge[1]]
    assert len(root.findall(f"{space}path")) == len(between)
    texts = [element.text for element in root.findall(f"{space}text")]
    assert {"16x20", "8x10", "1 conv2d", "3 values stay here"} <= set(texts)
    # Boxes do not lie on each other.
    boxes = [[int(box.get(name, "")) for name in ("x", "y", "width", "height")] for box in root.findall(f"{space}rect")]
    for number, (x, y, width, height) in enumerate(boxes):
        for other_x, other_y, _, _ in boxes[:number]:
            assert abs(x - other_x) >= width or abs(y - other_y) >= height


def test_graphs_of_a_broken_network_have_names_of_their_own() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.convolution(x)
            torch._dynamo.graph_break()
            result: Tensor = self.convolution(x)
            return result

    graph = fisedit.explain(Broken().to("meta"), torch.empty(1, 3, 6, 8, device="meta")).graph
    assert {"graph 0: 6x8", "graph 1: 6x8"} <= set(graph)


def test_other_endings_are_refused_before_anything_is_traced(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"ending in one of \.svg, \.dot, \.json"):
        write_graph(networkx.DiGraph(), tmp_path / "flow.png")
    with pytest.raises(OptionError, match=r"flow\.png"):
        command.explain(graph=tmp_path / "flow.png")
