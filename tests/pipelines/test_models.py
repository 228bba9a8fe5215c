"""Public configurations with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fisedit_compile.bench.networks import MODEL_NAMES, build_unet, example_inputs, fill_randomly
from fisedit_compile.errors import OptionError
from support.tiny_pipelines import tiny_unet

# Published sizes of the three networks, in parameters.
PARAMETERS = {"sd15": 859_520_964, "sd21": 865_910_724, "sdxl": 2_567_463_684}


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_networks_take_their_example_inputs(name: str) -> None:
    model = build_unet(name, torch.bfloat16, "meta")
    assert not model.training
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == PARAMETERS.get(name, count)
    positional, named = example_inputs(name, dtype=torch.bfloat16, device="meta")
    with torch.no_grad():
        output = model(*positional, **named)[0]
    assert output.shape == positional[0].shape and output.dtype == torch.bfloat16


def test_sizes_are_in_pixels() -> None:
    positional, named = example_inputs("sdxl", (512, 768), batch=3, device="meta")
    assert positional[0].shape == (3, 4, 64, 96)
    assert named["added_cond_kwargs"]["text_embeds"].shape == (3, 1280)
    assert example_inputs("scenes", 64, device="meta")[0][0].shape == (2, 4, 16, 16)
    with pytest.raises(OptionError, match="multiple of 8"):
        example_inputs("sd15", 100, device="meta")


def test_example_inputs_repeat() -> None:
    first, second, other = (example_inputs("scenes", seed=seed)[0][0] for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_unknown_models_list_the_known_ones() -> None:
    with pytest.raises(OptionError, match="sd15, sd21, sdxl, scenes"):
        build_unet("sd3")


def test_random_weights_keep_activations_in_size() -> None:
    model = build_unet("scenes", seed=3)
    weights = {name: parameter for name, parameter in model.named_parameters()}
    assert all(torch.isfinite(parameter).all() for parameter in weights.values())
    assert float(weights["conv_in.weight"].std()) == pytest.approx(1 / 36**0.5, rel=0.1)
    assert weights["conv_norm_out.weight"].eq(1).all() and weights["conv_in.bias"].eq(0).all()
    positional, named = example_inputs("scenes")
    with torch.no_grad():
        output = model(*positional, **named)[0]
    assert 0.05 < float(output.std()) < 20
    again, other = build_unet("scenes", seed=3), build_unet("scenes", seed=4)
    assert torch.equal(again.conv_in.weight, model.conv_in.weight)
    assert not torch.equal(other.conv_in.weight, model.conv_in.weight)


def test_weights_that_wrap_around_the_pool_differ() -> None:
    layers = torch.nn.ModuleList(torch.nn.Linear(2048, 1500, bias=False) for _ in range(3))
    fill_randomly(layers, seed=0)
    first, second, third = (layer.weight for layer in layers)
    assert not torch.equal(first, second) and not torch.equal(second[:100], third[:100])
    assert float(third.detach().std()) == pytest.approx(2048**-0.5, rel=0.01)


def test_a_folder_gives_its_configuration(tmp_path: Path) -> None:
    tiny_unet().save_config(tmp_path / "unet")
    for path in (tmp_path, tmp_path / "unet"):
        model = build_unet(str(path), device="meta")
        assert model.config.block_out_channels in ((8, 16), [8, 16])
        positional, named = example_inputs(str(path), device="meta")
        assert model(*positional, **named)[0].shape == positional[0].shape
