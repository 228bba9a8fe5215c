"""The training's parts, and its stages run end to end for a step or two."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import scenes_training
from fisedit_compile.scenes import Scene, load_pipeline
from fisedit_compile.scenes.models import new_autoencoder
from scenes_training import (
    Checkpoint,
    DenoiserTraining,
    crops,
    finished_autoencoder,
    known_scenes,
    normalise_latents,
    region_weight,
    to_pictures,
    to_tensor,
)

SCRIPT = Path(__file__).parents[2] / "tools" / "train_scenes.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    specification = importlib.util.spec_from_file_location("train_scenes", SCRIPT)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few pictures tell the spread of latents well enough."""
    monkeypatch.setattr(scenes_training, "NORMALISING_PICTURES", 16)


def take_steps(model: nn.Linear, optimiser: torch.optim.Optimizer, count: int) -> None:
    """Train a layer to output ones."""
    for _ in range(count):
        (model(torch.ones(1, 3)) - 1.0).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()


def test_a_resumed_training_goes_on_as_if_never_interrupted(tmp_path: Path) -> None:
    weights = []
    for interrupted in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
        checkpoint = Checkpoint(tmp_path, {"layer": model}, optimiser)
        take_steps(model, optimiser, 3)
        if interrupted:
            checkpoint.save(3)
            model = nn.Linear(3, 2)
            optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
            assert Checkpoint(tmp_path, {"layer": model}, optimiser).load() == 3
        take_steps(model, optimiser, 3)
        weights.append(model.weight.detach())
    assert torch.equal(*weights)


def test_crops_are_drawn_from_the_step_alone() -> None:
    pictures, mask = crops(3, 64, step=7)
    again, _ = crops(3, 64, step=7)
    assert pictures.shape == (3, 3, 64, 64)
    assert mask.shape == (3, 1, 64, 64)
    assert torch.equal(pictures, again)
    assert pictures.abs().max() <= 1.0
    assert (to_tensor(list(to_pictures(pictures))) - pictures).abs().max() < 1e-6


def test_noise_levels_are_spread_and_the_layout_steps_take_the_noisiest() -> None:
    training = DenoiserTraining(None, "cpu", workers=1, peak_rate=1e-3, layout_steps=range(0))
    generator = torch.Generator().manual_seed(0)
    levels = torch.cat([training.timesteps(16, generator, layout=False) for _ in range(50)])
    assert levels.min() < 150
    assert levels.max() <= 999
    layout = training.timesteps(16, generator, layout=True)
    assert layout.min() >= 900
    assert layout.max() <= 999


def test_the_weight_does_not_tell_what_stands_where() -> None:
    one, other = Scene("ball", "red", "left"), Scene("car", "blue", "right")
    assert torch.equal(region_weight(one), region_weight(other))


def test_normalising_the_latents_leaves_the_pictures_as_they_are() -> None:
    torch.manual_seed(0)
    vae = new_autoencoder().eval().requires_grad_(False)
    pictures, _ = crops(2, 64, step=0)
    before = vae(pictures, sample_posterior=False).sample
    normalise_latents(vae, "cpu")
    latents = vae.encode(pictures).latent_dist.mean
    assert latents.shape == (2, 4, 16, 16)
    assert torch.allclose(vae(pictures, sample_posterior=False).sample, before, atol=1e-4)


def test_known_scenes_are_those_of_the_training_split() -> None:
    assert len(known_scenes()) == 466


def test_missing_autoencoder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="train the autoencoder first"):
        finished_autoencoder(tmp_path, "cpu")


def test_every_stage_runs(script: ModuleType, tmp_path: Path) -> None:
    def run(*arguments: str) -> None:
        result = CliRunner().invoke(script.application, [*arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output

    folder, weights = str(tmp_path / "checkpoints"), str(tmp_path / "weights")
    for steps in ("1", "2"):
        run("vae", "--folder", folder, "--steps", steps, "--batch", "2")
    run("unet", "--folder", folder, "--steps", "2", "--batch", "4", "--bank-size", "32", "--layout-from", "1")
    run("export", "--folder", folder, "--weights", weights)
    pipeline = load_pipeline(weights=Path(weights))
    assert pipeline.vae.config.scaling_factor == 1.0
    assert not list(tmp_path.glob("weights.*"))
    larger, enlarged = str(tmp_path / "larger"), str(tmp_path / "enlarged")
    few = ("--batch", "4", "--bank-size", "32")
    for steps in ("1", "2"):
        run("enlarge", "--folder", larger, "--start", weights, "--steps", steps, *few)
    run("export", "--folder", larger, "--weights", enlarged, "--autoencoder", weights)
    trained = load_pipeline(weights=Path(enlarged))
    assert all(map(torch.equal, trained.vae.parameters(), pipeline.vae.parameters()))
    assert not all(map(torch.equal, trained.unet.parameters(), pipeline.unet.parameters()))


@pytest.mark.parametrize("size", ["128", "200"])
def test_larger_pictures_have_whole_numbers_of_positions(script: ModuleType, tmp_path: Path, size: str) -> None:
    result = CliRunner().invoke(script.application, ["enlarge", "--folder", str(tmp_path), "--size", size])
    assert result.exit_code == 2 and "multiple of 128" in result.output
