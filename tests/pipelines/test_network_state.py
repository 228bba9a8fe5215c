"""What is done to a network between a generation and an edit is named, before anything is computed."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, FluxTransformer2DModel, PyramidAttentionBroadcastConfig
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines.network_state import NetworkState


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1)))


def transformer() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )


def test_an_unchanged_network_is_fine() -> None:
    found = network()
    state = NetworkState(found)
    found(torch.zeros(1, 3, 8, 8))
    found.double()
    state.check(found)
    with pytest.raises(PipelineError, match="another network than when the picture was generated; generate again"):
        state.check(network())


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (FirstBlockCacheConfig(threshold=0.1), "FirstBlockCache"),
        (PyramidAttentionBroadcastConfig(2, current_timestep_callback=lambda: 1), "PyramidAttention"),
    ],
)
def test_caches_of_diffusers(settings: Any, name: str) -> None:
    found = transformer()
    before = NetworkState(found)
    found.enable_cache(settings)
    with pytest.raises(
        PipelineError, match=rf"cache was off .* and is on \({name}.*\) now, .* disable_cache\(\) of the"
    ):
        before.check(found)
    cached = NetworkState(found)
    cached.check(found)
    found.disable_cache()
    before.check(found)
    with pytest.raises(
        PipelineError, match=rf"cache was on \({name}.*\) .* and is off now, .* enable_cache\(\.\.\.\) of"
    ):
        cached.check(found)


def test_a_hook_of_diffusers() -> None:
    found = network()
    state = NetworkState(found)
    HookRegistry.check_if_exists_or_initialize(found[1]).register_hook(ModelHook(), "own_cache")
    with pytest.raises(
        PipelineError, match=r"hooks of diffusers .* layer 1 of the network were none and are own_cache\)"
    ):
        state.check(found)


def patched(module: nn.Module, origin: str) -> Any:
    """A method in the place of ``forward``, of a module of another package."""
    original = module.forward

    @functools.wraps(original)
    def forward(*arguments: Any, **named: Any) -> Any:
        return original(*arguments, **named)

    forward.__module__ = origin
    return forward


@pytest.mark.parametrize(
    ("origin", "told"),
    [
        (
            "DeepCache.extension.deepcache",
            r"DeepCache was changed .* layer 1\.1 .* disable\(\) or enable\(\) of its helper",
        ),
        (
            "somewhere.else",
            r"a part of the network was changed .*the forward of the layer 1\.1 .* is somewhere\.else\.",
        ),
    ],
)
def test_exchanged_methods(origin: str, told: str) -> None:
    found = network()
    state = NetworkState(found)
    found[1][1].forward = patched(found[1][1], origin)
    with pytest.raises(PipelineError, match=told):
        state.check(found)
    switched_on = NetworkState(found)
    switched_on.check(found)
    del found[1][1].forward
    state.check(found)
    with pytest.raises(PipelineError, match="was changed since"):
        switched_on.check(found)


def test_token_merging_exchanges_classes() -> None:
    found = network()
    state = NetworkState(found)
    block = type("ToMeBlock", (type(found[1]),), {"__module__": "tomesd.patch"})
    found[1].__class__ = block
    with pytest.raises(
        PipelineError,
        match=r"token merging \(tomesd\) was changed .* was Sequential and is ToMeBlock\); .*remove_patch",
    ):
        state.check(found)


def test_another_memory_format() -> None:
    found = network()
    state = NetworkState(found)
    found.to(memory_format=torch.channels_last)
    with pytest.raises(
        PipelineError, match="the memory format of weights was changed .*in the layer 0 of the"
    ) as caught:
        state.check(found)
    assert "content" not in str(caught.value)
    found.to(memory_format=torch.contiguous_format)
    state.check(found)
