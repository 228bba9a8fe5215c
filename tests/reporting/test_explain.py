"""``explain``: what is sparse, what is dense and why, what it costs; computed by hand where that is possible."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fisedit_compile as fisedit
from fisedit_compile.errors import OptionError
from fisedit_compile.operators import choosing
from fisedit_compile.operators.attention.spec import AttentionCase
from fisedit_compile.operators.convolution.spec import ConvolutionCase, MapCase
from fisedit_compile.operators.products.spec import ProductCase
from fisedit_compile.operators.records import CostTable, Record, Times, machine
from fisedit_compile.options import Options
from fisedit_compile.reporting import measured
from fisedit_compile.reporting.explain import ExplainReport, explain_with, ragged_mask
from fisedit_compile.runtime import Domain
from fisedit_compile.runtime.stats import format_bytes
from support.diffusers_networks import DIFFUSERS

NETWORKS = {network.name: network for network in DIFFUSERS}


class TwoConvolutions(nn.Module):
    """A 3x3 and a 1x1 convolution, and a function in between."""

    def __init__(self, function: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 5, 1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.function(self.first(x)))
        return result


def explained(function: Callable[[Tensor], Tensor] = torch.relu, **options: Any) -> ExplainReport:
    module, x = TwoConvolutions(function).to("meta"), torch.empty(2, 3, 16, 20, device="meta")
    return explain_with(Options(**options), module, x)


def test_counts_of_two_convolutions() -> None:
    report = explained()
    positions = 2 * 16 * 20
    assert report.total_macs == positions * (8 * 3 * 9 + 5 * 8)
    assert report.sparse_mac_fraction == 1.0
    assert report.dense_nodes == []
    assert report.matches["sparsify_conv"] == 2
    assert report.macs_at({Domain(16, 20): 0.25}) == report.total_macs / 4
    # The input of the 3x3 convolution, read around the mask, and the output.
    assert report.bytes_stored == 4 * positions * (3 + 5)


def test_the_users_device_context_is_no_matter() -> None:
    with torch.device("meta"):
        report = fisedit.explain(TwoConvolutions(torch.relu), torch.empty(2, 3, 16, 20))
        text = str(report)
    assert report.dense_nodes == [] and report.sparse_mac_fraction == 1.0
    # Small networks are counted in thousands.
    assert f"{report.total_macs / 1000:.4g} k" in text and text.count("0.000") == 0


def test_costs_of_a_mask() -> None:
    report = explained()
    mask = torch.zeros(16, 20)
    mask[4:8, 5:10] = 1
    cost = report.cost(mask)
    assert cost.density == pytest.approx(20 / 320)
    assert cost.macs == pytest.approx(report.total_macs * 20 / 320)
    # Halo of a 4x5 rectangle: 6x7 - 4x5 positions of 3 channels; the recorded output is copied as a whole.
    assert cost.bytes_loaded == 4 * 2 * (22 * 3 + 320 * 5)
    assert report.cost(torch.zeros(4, 4)).macs == 0
    assert report.cost(torch.ones(4, 4)).macs == report.total_macs


def test_more_mask_costs_more() -> None:
    report = explained()
    costs = [report.cost(density) for density in (0.05, 0.3, 0.7, 1.0)]
    assert [cost.macs for cost in costs] == sorted({cost.macs for cost in costs})
    assert costs[0].density == pytest.approx(0.05, abs=0.01)
    assert report.bytes_loaded(0.05) == costs[0].bytes_loaded


@pytest.mark.parametrize("density", [0.004, 0.1, 0.5, 1.0])
def test_ragged_masks_have_their_density(density: float) -> None:
    mask = ragged_mask(density, Domain(16, 20))
    assert mask.shape == (16, 20) and mask.dtype == torch.bool
    assert int(mask.sum()) == max(1, round(density * 320))
    assert torch.equal(mask, ragged_mask(density, Domain(16, 20)))


def test_a_density_out_of_range() -> None:
    for density in (0.0, -1.0, 1.5):
        with pytest.raises(OptionError, match="density"):
            ragged_mask(density, Domain(4, 4))


def test_dense_operators_have_reasons() -> None:
    report = explained(lambda x: x.cumsum(2))
    (node,) = report.dense_nodes
    assert node.target == "aten.cumsum.default" and node.reason
    assert report.sparse_mac_fraction == 1.0
    text = str(report)
    assert "aten.cumsum.default" in text and node.reason[:20] in text


def test_disabled_passes_make_operators_dense() -> None:
    report = explained(disabled_passes=frozenset({"sparsify_conv"}))
    assert report.sparse_mac_fraction == 0.0
    assert {node.target for node in report.dense_nodes} == {"aten.conv2d.default"}


def test_graphs_that_cannot_be_traced_are_listed() -> None:
    report = explained(lambda x: functional.dropout(x, 0.5, training=True))
    assert report.total_macs == 0 and report.sparse_mac_fraction == 0.0
    (node,) = report.dense_nodes
    assert (node.pass_name, node.target) == ("trace", "the whole graph")
    assert "aten.dropout.default is random" in node.reason
    assert "aten.dropout.default is random" in str(report)


def test_graphs_without_a_picture_are_listed() -> None:
    report = fisedit.explain(nn.Linear(4, 5), torch.randn(3, 4))
    (node,) = report.dense_nodes
    assert "picture" in node.reason
    assert report.cost(0.1).macs == report.total_macs == 60


def test_graph_breaks_give_several_graphs() -> None:
    def broken(x: Tensor) -> Tensor:
        print("", end="")
        return torch.relu(x)

    report = explained(broken)
    assert len(report.graphs) == 3, "before the function, inside it and behind it"
    assert report.total_macs == 2 * 16 * 20 * (8 * 3 * 9 + 5 * 8)
    assert "3, of which 3 traced" in str(report)


def test_a_unet_on_the_meta_device() -> None:
    network = NETWORKS["sd15"]
    inputs = [torch.empty(shape, device="meta") for shape in network.shapes]
    module = network.module().to("meta")
    report = fisedit.explain(module, *inputs)
    assert report.sparse_mac_fraction > 0.9
    assert report.dense_nodes == []
    assert report.bytes_loaded(0.05) < report.bytes_stored
    maps = report.programs[0].report.attention_sites
    assert len(maps) == sum(name.endswith("attn2") for name, _ in module.named_modules()) > 1
    text = str(report)
    for part in (
        "cross-attention that can be stabilised",
        f"{len(maps)}, whose maps take {format_bytes(sum(site.bytes for site in maps))} a call",
        "sparse share",
        "sparsify_attention",
        "An edit call",
        "5 %",
        "stored by a recorded call",
    ):
        assert part in text
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize("how", ["torch.compile", "Module.compile"])
def test_compiled_networks_can_be_explained(how: str) -> None:
    module, x = TwoConvolutions(), torch.randn(2, 3, 16, 20)
    weight = module.first.weight.clone()
    runtime = fisedit.Runtime()
    compiled: Any = module
    if how == "torch.compile":
        compiled = torch.compile(module, backend="fisedit", options={"runtime": runtime})
    else:
        module.compile(backend="fisedit", options={"runtime": runtime})
    with torch.no_grad(), runtime.record("base"):
        compiled(x)
    assert fisedit.explain(compiled, x).total_macs == explained().total_macs
    assert torch.equal(module.first.weight, weight)
    with torch.no_grad(), runtime.edit("base", mask=torch.ones(4, 4)):
        torch.testing.assert_close(compiled(x + 1), module.forward(x + 1))


def measure(operator: str, case: Any, **seconds: float) -> list[Record]:
    """Records of a case on this machine."""
    return [Record(operator, case._asdict(), name, time, machine()) for name, time in seconds.items()]


def test_measured_ways_of_the_networks_convolutions_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = CostTable(tmp_path / "measured.jsonl")
    monkeypatch.setattr(measured, "costs", table)
    module, x = nn.Conv2d(64, 64, 3, padding=1), torch.randn(2, 64, 32, 32)
    report = explain_with(Options(), module, x)
    assert report.measured_convolutions() == {}
    for outputs in (64, 96):
        table.add(
            measure("convolution", ConvolutionCase(2, 32, 32, 64, outputs, "float32", 10, 4), rows=2e-3, tiles=1e-3)
        )
    for channels_last in (False, True):
        case = MapCase(64, 64, "float32", channels_last)
        table.add(measure("convolution of a map", case, direct=5e-3, tiles=4e-3))
    mine = "2x32x32 64->64 float32, about 10 rows, tiles 50% full"
    monkeypatch.setattr(measured, "costs", CostTable(table.path))
    expected: dict[str, Times] = {mine: {"rows": 2e-3, "tiles": 1e-3}}
    expected["whole map, 64->64 float32"] = {"direct": 5e-3, "tiles": 4e-3}
    assert report.measured_convolutions() == expected
    assert "rows 2.00, tiles 1.00" in str(report) and mine in str(report)
    assert "direct 5.00, tiles 4.00" in str(report)


def test_measured_products_and_attention_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Block(nn.Module):
        """Self-attention of a map's tokens."""

        def __init__(self) -> None:
            super().__init__()
            self.inside, self.outside = nn.Linear(64, 192), nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = self.inside(x.flatten(2).transpose(1, 2)).unflatten(2, (3, 4, 16)).permute(2, 0, 3, 1, 4)
            attended = nn.functional.scaled_dot_product_attention(*tokens.unbind(0))
            return self.outside(attended.transpose(1, 2).flatten(2)).transpose(1, 2).unflatten(2, x.shape[2:])

    # What is measured while an edit runs is what the report looks for.
    table = CostTable(tmp_path / "measured.jsonl")
    for module in (measured, choosing):
        monkeypatch.setattr(module, "costs", table)
    network, x, runtime = Block(), torch.randn(2, 64, 16, 16), fisedit.Runtime()
    report = explain_with(Options(), network, x)
    assert report.measured_products() == {} and report.measured_attention() == {}
    compiled = torch.compile(network, backend="fisedit", options={"runtime": runtime})
    mask = torch.zeros(16, 16)
    mask[3:8, 2:9] = 1
    with torch.no_grad():
        with runtime.record("base"):
            compiled(x)
        with runtime.edit("base", mask=mask):
            compiled(x + 1)
    few, whole = (table.entries(name, ProductCase) for name in ("product", "product of a map"))
    assert len(few) >= 2
    cases = [str(case) for case in (*few, *table.entries("attention", AttentionCase))]
    cases += [f"whole map, {case}" for case in whole]
    shown = report.measured_products() | report.measured_attention()
    assert set(shown) == set(cases) and all(case in str(report) for case in cases)
    others = CostTable(tmp_path / "others.jsonl")
    others.add(measure("product", ProductCase(40, 64, 999, "float32"), plain=2e-3, compiled=1e-3))
    others.add(measure("attention", AttentionCase(9, 9, 16, 16, "float32", 8, 9), plain=2e-3, compiled=1e-3))
    monkeypatch.setattr(measured, "costs", others)
    assert report.measured_products() == {} and report.measured_attention() == {}, "of another network"
