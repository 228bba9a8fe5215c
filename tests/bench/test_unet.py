"""A whole benchmark on a tiny network, from the command line; and that a wrong result is no result."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import Tensor, nn
from typer.testing import CliRunner

from fisedit_compile.bench import unet
from fisedit_compile.bench.masks import SHAPES, make_mask
from fisedit_compile.bench.unet import DTYPES, BenchmarkError, Result, Settings, SparseRow, run_unet
from fisedit_compile.cli import bench as command
from fisedit_compile.errors import OptionError
from fisedit_compile.options import LOWERINGS

TINY = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 12,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
}


#: Tests of this module share one compiled network.
KEEPS_DYNAMO = True


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the configuration of a small U-Net."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(TINY))
    return str(folder)


@pytest.fixture(scope="module")
def recorded_bench(tiny: str) -> unet.Bench:
    """A benchmark that has recorded one call."""
    torch.compiler.reset()
    bench = unet.Bench(Settings(model=tiny, calls=1), lambda step: None)
    with torch.no_grad():
        bench.record()
    return bench


def test_the_command_measures_and_writes_all_numbers(tiny: str, tmp_path: Path) -> None:
    torch.compiler.reset()
    output = tmp_path / "numbers.json"
    words = ["unet", "--model", tiny, "--densities", "0.1,1", "--shape", "ragged", "--calls", "2", "--repeats", "2"]
    done = CliRunner().invoke(command.app, [*words, "--device", "cpu", "--output", str(output)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    for row in ("dense, eager", "dense, channels last", "fisedit, 10 %", "fisedit, 100 %"):
        assert row in done.output
    numbers = json.loads(output.read_text())
    assert [row["name"] for row in numbers["dense"]] == ["eager", "channels last"]
    sparse, full = numbers["sparse"]
    assert (sparse["density"], full["density"]) == (0.1, 1.0)
    assert sparse["arithmetic"] > 2.0 and full["arithmetic"] == pytest.approx(1.0)
    best = min(row["seconds"] for row in numbers["dense"])
    assert sparse["speed_up"] == pytest.approx(best / sparse["seconds"])
    assert sparse["achieved"] == pytest.approx(sparse["speed_up"] / sparse["arithmetic"])
    assert 0 < sparse["bytes_loaded"] < numbers["bytes_recorded"]
    assert numbers["sparse_mac_fraction"] > 0.9 and numbers["macs"] > 0
    flops = 2 * numbers["macs"] / sparse["arithmetic"] / sparse["seconds"]
    assert sparse["of_peak"] == pytest.approx(flops / numbers["peak"])
    assert all(row["of_peak"] > 0 for row in numbers["dense"])
    assert numbers["first_call"] > 0 and numbers["first_record"] > 0
    assert 0 <= sparse["deviation"] < unet.AGREEMENT["fp32"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda output, recorded: output + 1, "off by"),
        (lambda output, recorded: recorded, "changed nothing inside the mask"),
        (lambda output, recorded: torch.full_like(output, torch.nan), "off by nan"),
    ],
)
def test_a_wrong_sparse_call_is_no_result(
    recorded_bench: unet.Bench, monkeypatch: pytest.MonkeyPatch, change: Any, reason: str
) -> None:
    compiled, recorded = recorded_bench.compiled, recorded_bench.recorded[0]

    def wrong(*args: Any, **kwargs: Any) -> tuple[Tensor]:
        return (change(compiled(*args, **kwargs)[0], recorded),)

    monkeypatch.setattr(recorded_bench, "compiled", wrong)
    with torch.no_grad(), pytest.raises(BenchmarkError, match=reason):
        recorded_bench.check(make_mask("square", 0.1, 12, 12))


def test_a_change_outside_the_mask_is_no_result(recorded_bench: unet.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, mask, calls = recorded_bench.compiled, make_mask("square", 0.1, 12, 12), []
    (row, column), *_ = (~mask).nonzero().tolist()

    def wrong(*args: Any, **kwargs: Any) -> tuple[Tensor]:
        output = compiled(*args, **kwargs)[0].clone()
        calls.append(output)
        # The first call, of unchanged inputs, is held to a tolerance only.
        output[0, 0, row, column] += 1e-4 if len(calls) > 1 else 0.0
        return (output,)

    with torch.no_grad():
        recorded_bench.check(mask)
        monkeypatch.setattr(recorded_bench, "compiled", wrong)
        with pytest.raises(BenchmarkError, match="changed positions outside the mask"):
            recorded_bench.check(mask)


def test_weights_in_channels_last_order_are_a_copy_and_others_are_shared() -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(5, 2))
    copied = unet._channels_last(network)
    weights, copies = dict(network.named_parameters()), dict(copied.named_parameters())
    assert copies["2.weight"] is weights["2.weight"]
    assert copies["0.weight"].is_contiguous(memory_format=torch.channels_last)
    assert weights["0.weight"].is_contiguous()
    assert torch.equal(copies["0.weight"], weights["0.weight"])


def test_achieved_is_a_share_of_the_arithmetic_and_the_best_dense_counts() -> None:
    row = SparseRow(0.1, 1.0, 1.0, 1.0, 0.0, speed_up=3.0, arithmetic=6.0, of_peak=0.5, bytes_loaded=1, deviation=0.0)
    assert row.achieved == 0.5
    dense = [unet.DenseRow(name, seconds, seconds, seconds, 0.5) for name, seconds in (("a", 2.0), ("b", 1.5))]
    assert Result(Settings(), {}, dense).best_dense.name == "b"


@pytest.mark.parametrize(
    "change", [{"dtype": "fp8"}, {"storage": "int8"}, {"densities": ()}, {"calls": 0}, {"repeats": 0}, {"batch": 0}]
)
def test_impossible_settings_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="expected"):
        run_unet(dataclasses.replace(Settings(), **change))


@pytest.mark.parametrize("text", ["", "0", "1.5", "0.1;0.2", "nan", "0.1,"])
def test_densities_are_numbers_between_zero_and_one(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="expected numbers above 0 and at most 1"):
        command.parse_densities(text)


def test_choices_of_the_command_line_are_those_of_the_code() -> None:
    assert tuple(shape.value for shape in command.Shape) == SHAPES
    assert {dtype.value for dtype in command.DataType} == set(DTYPES)
    assert tuple(lowering.value for lowering in command.Lowering) == LOWERINGS
