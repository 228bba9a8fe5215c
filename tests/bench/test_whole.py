"""Benchmarks of whole edits and of single passes: how numbers are put together, and the commands on the small model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from typer.testing import CliRunner

from fisedit_compile.bench import ablation, edit, pipelines
from fisedit_compile.bench.masks import SHAPES
from fisedit_compile.bench.unet import DTYPES, BenchmarkError
from fisedit_compile.cli import bench as command
from fisedit_compile.cli import options
from fisedit_compile.errors import OptionError
from fisedit_compile.passes.manager import OPTIONAL
from fisedit_compile.pipelines.decoding.decoding import DECODERS
from fisedit_compile.pipelines.picture import Picture
from fisedit_compile.runtime.tiers import TIERS


def result(**changes: Any) -> edit.Result:
    return edit.Result(dataclasses.replace(edit.Settings(), **changes), {})


def test_steps_are_scaled_and_other_stages_are_not() -> None:
    found = result(steps=50, timed_steps=5)
    dense = {"text": 1.0, "prepare": 0.5, "dense steps": 30.0, "decode": 14.0}
    user = {"text": 1.0, "prepare": 0.5, "set-up": 2.0, "dense steps": 0.0, "sparse steps": 5.0, "decode": 2.0}
    edit._compose(found, {edit.DENSE: dense, edit.USER: user}, finding=6.0, dense_steps=1.0)
    assert found.seconds[edit.DENSE]["total"] == pytest.approx(315.5)
    assert found.seconds[edit.USER]["total"] == pytest.approx(55.5)
    automatic = found.seconds[edit.AUTOMATIC]
    assert found.dense_steps == 1 and automatic["sparse steps"] == pytest.approx(50.0)
    assert automatic["mask"] == pytest.approx(6.0) and automatic["total"] == pytest.approx(61.5)
    assert found.speed_up(edit.USER) == pytest.approx(315.5 / 55.5)
    assert found.speed_up(edit.USER, "decode") == 7.0 and found.speed_up(edit.DENSE, "sparse steps") is None
    assert found.as_dict()["speed_up"][edit.DENSE] == 1.0


@pytest.mark.parametrize(
    "change",
    [{"dtype": "fp8"}, {"storage": "int8"}, {"decoder": "none"}, {"timed_steps": 1}, {"steps": 3}, {"repeats": 0}],
)
def test_impossible_settings_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="expected"):
        edit.run_edit(dataclasses.replace(edit.Settings(), **change))


@pytest.mark.parametrize("where", ["outside", "nowhere"])
def test_a_wrong_edit_is_no_result(where: str) -> None:
    pixels, mask = torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 0, 0] = True
    changed = pixels.clone()
    changed[0, 0, 3, 3] = 1.0 if where == "outside" else 0.0
    given: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(Picture))
    base, edited = Picture(**{**given, "pixels": pixels}), Picture(**{**given, "pixels": changed, "pixel_mask": mask})
    with pytest.raises(BenchmarkError, match="outside its mask" if where == "outside" else "nothing inside"):
        edit._check(base, edited)


def test_the_autoencoder_is_the_public_one() -> None:
    with torch.device("meta"):
        autoencoder = AutoencoderKL(**pipelines.AUTOENCODER)
    assert sum(parameter.numel() for parameter in autoencoder.parameters()) == 83_653_863


def test_pipelines_of_unknown_models() -> None:
    with pytest.raises(OptionError, match="sd15, sd21, sdxl, scenes"):
        pipelines.build_pipeline("sd99")


def test_every_stage_of_the_ablation_adds_something() -> None:
    disabled = [set(stage.disabled) for stage in ablation.STAGES]
    assert all(names <= set(OPTIONAL) for names in disabled) and disabled[-1] == set()
    assert all(after <= before for before, after in zip(disabled, disabled[1:], strict=False))
    assert len({(stage.disabled, stage.convolution) for stage in ablation.STAGES}) == len(ablation.STAGES)
    beside = [0, 1, *(stage.published for stage in ablation.STAGES if stage.published is not None)]
    assert beside == list(range(len(ablation.PUBLISHED)))


@pytest.mark.parametrize("change", [{"dtype": "fp8"}, {"calls": 0}, {"repeats": 0}, {"batch": 0}])
def test_impossible_ablations_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="expected"):
        ablation.run_ablation(dataclasses.replace(ablation.Settings(), **change))


def test_choices_of_the_command_line_are_those_of_the_code() -> None:
    assert tuple(shape.value for shape in options.MaskShape) == SHAPES
    assert {dtype.value for dtype in options.ShortType} == set(DTYPES)
    assert tuple(decoder.value for decoder in options.Decoder) == DECODERS
    assert tuple(decoder.value for decoder in options.BenchmarkDecoder) == (*DECODERS, edit.TINY)
    assert tuple(tier.value for tier in options.Tier) == TIERS


@pytest.mark.parametrize("name", ["edit", "ablation"])
def test_densities_out_of_range_are_refused(name: str) -> None:
    done = CliRunner().invoke(command.app, [name, "--density", "1.5"])
    assert done.exit_code == 2 and "density" in done.output


def test_the_edit_command(tmp_path: Path) -> None:
    words = ["edit", "--model", "scenes", "--steps", "10", "--timed-steps", "2", "--repeats", "1", "--device", "cpu"]
    output = tmp_path / "numbers.json"
    done = CliRunner().invoke(command.app, [*words, "--output", str(output)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    told = " ".join(done.output.split())
    assert "2 steps were run and timed; U-Net steps are extrapolated to 10" in told
    numbers = json.loads(output.read_text())
    assert numbers["seconds"].keys() == {edit.DENSE, edit.USER, edit.AUTOMATIC}
    assert numbers["decoder"] == "sparse" and numbers["decoder_bytes"] > 0 and numbers["dense_steps"] == 0.5
    for stages in numbers["seconds"].values():
        assert stages["total"] == pytest.approx(sum(value for name, value in stages.items() if name != "total"))
        assert min(stages.values()) >= 0 and stages["decode"] > 0 and stages["text"] > 0


@pytest.fixture
def small_unet(tmp_path: Path) -> str:
    """The folder of a U-Net of one resolution."""
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
    )
    unet.save_config(tmp_path)
    return str(tmp_path)


def test_the_ablation_command(small_unet: str, tmp_path: Path) -> None:
    words = ["ablation", "--model", small_unet, "--size", "128", "--calls", "1", "--repeats", "1", "--device", "cpu"]
    output = tmp_path / "numbers.json"
    done = CliRunner().invoke(command.app, [*words, "--output", str(output)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    rows = json.loads(output.read_text())["rows"]
    assert [row["name"] for row in rows] == ["dense", "dense, compiled", *(stage.name for stage in ablation.STAGES)]
    shares = [row["on_rows"] for row in rows]
    assert shares[:2] == [0, 0] and 0 < shares[2] < shares[3] == shares[4] < shares[5] <= 1
    assert rows[0]["ratio"] == 1 and all(row["ratio"] > 0 and row["seconds"] > 0 for row in rows)
    lines = {
        row["name"]: line for row in rows for line in done.output.splitlines() if line.startswith(row["name"] + " ")
    }
    for name, published in zip(lines, ("1.83", "2.73", None, "3.17", "3.61", "8.13"), strict=True):
        assert published is None or published in lines[name]
    assert "it/s" in done.output and "4.4x" in lines["+ attention (all)"] and "FISEdit" in done.output


def test_the_ablation_beside_another_compiler(monkeypatch: pytest.MonkeyPatch, small_unet: str) -> None:
    compiled: list[object] = []

    def spied(model: Any, backend: Any = "inductor", **given: Any) -> Any:
        compiled.append(backend)
        return compile_it(model, backend="eager" if backend == "inductor" else backend, **given)

    compile_it = torch.compile
    monkeypatch.setattr(torch, "compile", spied)
    monkeypatch.setattr(ablation, "STAGES", ablation.STAGES[-1:])
    settings = ablation.Settings(model=small_unet, size=64, calls=1, repeats=1, inductor=True, density=0.3)
    rows = ablation.run_ablation(settings).rows
    assert [row.name for row in rows] == ["dense", "dense, inductor", "+ attention (all)"]
    assert compiled[:2] == ["inductor", "fisedit"]
