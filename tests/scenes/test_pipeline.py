"""The packaged model: it loads offline, keeps colours through its autoencoder and obeys captions."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from transformers import PreTrainedTokenizerFast

from fisedit_compile.scenes import all_scenes, caption, check, held_back_scenes, load_pipeline, render
from fisedit_compile.scenes.models import CAPTION_TOKENS, new_tokenizer
from fisedit_compile.scenes.pipeline import WEIGHTS


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return load_pipeline()


def test_weights_are_small_safetensors() -> None:
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 30_000_000
    assert {path.suffix for path in files} == {".json", ".safetensors"}


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="model_index.json is missing"):
        load_pipeline(weights=tmp_path)


def test_pipeline_has_the_size_and_type_it_should(pipeline: StableDiffusionPipeline) -> None:
    assert pipeline.unet.dtype == pipeline.vae.dtype == pipeline.text_encoder.dtype == torch.float32
    assert pipeline.vae_scale_factor * pipeline.unet.config.sample_size == 128
    assert load_pipeline(torch.bfloat16).unet.dtype == torch.bfloat16


def test_tokenizer_survives_being_saved(tmp_path: Path, pipeline: StableDiffusionPipeline) -> None:
    captions = [caption(scene) for scene in all_scenes()] + ["", "A Red ball, on a bicycle"]
    tokenizer = new_tokenizer()
    expected = tokenizer(captions, padding="max_length").input_ids
    tokenizer.save_pretrained(tmp_path)
    for other in (PreTrainedTokenizerFast.from_pretrained(tmp_path), pipeline.tokenizer):
        assert other(captions, padding="max_length").input_ids == expected
        assert other.model_max_length == CAPTION_TOKENS
    assert {len(tokens) for tokens in expected} == {CAPTION_TOKENS}
    known = [tokens for tokens in expected[:-1] if tokenizer.unk_token_id in tokens]
    assert not known
    assert tokenizer.unk_token_id in expected[-1]


def test_autoencoder_keeps_every_attribute(pipeline: StableDiffusionPipeline) -> None:
    scenes = random.Random(2).sample(all_scenes(), 30)
    drawn = np.stack([render(scene, number) for number, scene in enumerate(scenes)])
    images = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    with torch.no_grad():
        decoded = torch.cat([pipeline.vae(part, sample_posterior=False).sample for part in images.split(6)])
    pictures = ((decoded + 1.0) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    wrong = [
        caption(scene)
        for picture, scene in zip(pictures, scenes, strict=True)
        if not all(check(picture, scene).values())
    ]
    assert not wrong


def test_pipeline_obeys_captions_it_was_not_trained_on(pipeline: StableDiffusionPipeline) -> None:
    scenes = held_back_scenes()[:6]
    result = pipeline(
        [caption(scene) for scene in scenes],
        num_inference_steps=20,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(number) for number in range(len(scenes))],
        output_type="np",
    )
    pictures = (result.images * 255).round().astype(np.uint8)
    assert pictures.shape == (len(scenes), 128, 128, 3)
    right = [all(check(picture, scene).values()) for picture, scene in zip(pictures, scenes, strict=True)]
    assert sum(right) >= len(scenes) - 2
