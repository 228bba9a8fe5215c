"""Which arguments decide whether a pipeline calls its network for a second prediction."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    AuraFlowPipeline,
    ChromaPipeline,
    FluxPipeline,
    HunyuanImagePipeline,
    QwenImagePipeline,
    SanaSprintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLPipeline,
    ZImagePipeline,
)

from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines.arguments import CallArguments
from fisedit_compile.pipelines.families import family_of

ROW = torch.zeros(1, 2)


def arguments(kind: Any, **config: Any) -> CallArguments:
    """Those of a pipeline of which nothing is known but its class and its network's configuration."""
    pipe = object.__new__(kind)
    network = SimpleNamespace(config=SimpleNamespace(**config))
    vars(pipe).update(unet=network if "time_cond_proj_dim" in config else None, transformer=network)
    return CallArguments(pipe, family_of(pipe))


@pytest.mark.parametrize(
    ("kind", "config", "given", "on"),
    [
        (StableDiffusionXLPipeline, {"time_cond_proj_dim": None}, {}, True),
        (StableDiffusionXLPipeline, {"time_cond_proj_dim": None}, {"guidance_scale": 1.0}, False),
        # Distilled networks take the scale as an input.
        (StableDiffusionXLPipeline, {"time_cond_proj_dim": 256}, {}, False),
        (FluxPipeline, {"guidance_embeds": True}, {"guidance_scale": 9.0}, False),
        (SanaSprintPipeline, {"guidance_embeds": True}, {"guidance_scale": 9.0}, False),
        (FluxPipeline, {}, {"true_cfg_scale": 2.0}, False),
        (FluxPipeline, {}, {"true_cfg_scale": 2.0, "negative_prompt": "a"}, True),
        (FluxPipeline, {}, {"true_cfg_scale": 1.0, "negative_prompt": "a"}, False),
        (FluxPipeline, {}, {"true_cfg_scale": 2.0, "negative_prompt_embeds": ROW}, False),
        (
            FluxPipeline,
            {},
            {"true_cfg_scale": 2.0, "negative_prompt_embeds": ROW, "negative_pooled_prompt_embeds": ROW},
            True,
        ),
        (QwenImagePipeline, {"guidance_embeds": False}, {"negative_prompt_embeds": ROW}, True),
        (QwenImagePipeline, {"guidance_embeds": False}, {"guidance_scale": 9.0}, False),
        (ChromaPipeline, {}, {}, True),
        # No property tells; and for Z-Image guidance begins above 0.
        (AuraFlowPipeline, {}, {"guidance_scale": 0.5}, False),
        (AuraFlowPipeline, {}, {"guidance_scale": 1.5}, True),
        (ZImagePipeline, {}, {"guidance_scale": 0.5}, True),
        (ZImagePipeline, {}, {"guidance_scale": 0.0}, False),
    ],
)
def test_what_turns_guidance_on(kind: Any, config: dict[str, Any], given: dict[str, Any], on: bool) -> None:
    assert arguments(kind, **config).guidance(given).on is on


def test_guidance_must_stay_on_its_side() -> None:
    qwen = arguments(QwenImagePipeline, guidance_embeds=False)
    recorded = {"prompt": "a", "negative_prompt": "b", "true_cfg_scale": 4.0}
    assert qwen.merge(recorded, {"true_cfg_scale": 2.0, "guidance_scale": 0.5})["true_cfg_scale"] == 2.0
    with pytest.raises(
        PipelineError, match=r"on .* \(true_cfg_scale 4.0 and a negative .* off .* \(true_cfg_scale 1.0"
    ):
        qwen.merge(recorded, {"true_cfg_scale": 1.0})
    with pytest.raises(PipelineError, match=r"off .* \(true_cfg_scale 4.0 and no negative .* on .* and a negative"):
        qwen.merge({"prompt": "a"}, {"negative_prompt": "b"})
    flux = arguments(FluxPipeline, guidance_embeds=True)
    assert flux.merge({"prompt": "a", "guidance_scale": 3.5}, {"guidance_scale": 0.5})["guidance_scale"] == 0.5


def test_guidance_scales_of_other_names_may_change_on_their_side() -> None:
    hunyuan = arguments(HunyuanImagePipeline, guidance_embeds=True)
    assert hunyuan.merge({}, {"distilled_guidance_scale": 0.5})["distilled_guidance_scale"] == 0.5
    instructed = arguments(StableDiffusionInstructPix2PixPipeline, time_cond_proj_dim=None)
    assert instructed.merge({}, {"image_guidance_scale": 3.0})["image_guidance_scale"] == 3.0
    with pytest.raises(
        PipelineError,
        match=r"on .* image_guidance_scale 1.5\) .* off .* \(guidance_scale 7.5 and image_guidance_scale 0.5",
    ):
        instructed.merge({}, {"image_guidance_scale": 0.5})
