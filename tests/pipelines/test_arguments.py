"""Which arguments an edit takes over and which it may change."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    HunyuanDiTPipeline,
    LattePipeline,
    LTXPipeline,
    SanaPipeline,
    SanaVideoPipeline,
    StableDiffusionLDM3DPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    TextToVideoZeroPipeline,
    ZImagePipeline,
)
from diffusers.image_processor import VaeImageProcessor, VaeImageProcessorLDM3D
from PIL import Image

from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines.arguments import CallArguments, keep_value, same_value
from fisedit_compile.pipelines.families.stable_diffusion import STABLE_DIFFUSION as FAMILY
from fisedit_compile.pipelines.noise import NoiseSource


@pytest.fixture
def arguments() -> CallArguments:
    pipe = object.__new__(StableDiffusionPipeline)
    vars(pipe)["unet"] = SimpleNamespace(config=SimpleNamespace(time_cond_proj_dim=None))
    return CallArguments(pipe, FAMILY)


def test_defaults_are_the_pipelines(arguments: CallArguments) -> None:
    assert arguments.value({}, "guidance_scale") == 7.5
    assert CallArguments(object.__new__(StableDiffusionXLPipeline), FAMILY).value({}, "guidance_scale") == 5.0
    assert arguments.value({"guidance_scale": 3.0}, "guidance_scale") == 3.0
    assert arguments.accepts("generator") and not arguments.accepts("prompt_2")


def test_a_pipeline_without_step_callback_is_refused() -> None:
    class Other:
        def __call__(self, prompt: str) -> None: ...

    with pytest.raises(PipelineError, match="Other has no callback_on_step_end"):
        CallArguments(Other(), FAMILY)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_steps": 4}, "has no argument num_steps"),
        ({"return_dict": False}, "return_dict"),
        ({"output_type": "jpeg"}, "output_type must be one of pil, np, pt, latent"),
    ],
)
def test_arguments_a_session_cannot_honour(arguments: CallArguments, given: dict[str, Any], message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        arguments.check(given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_inference_steps": 20}, "num_inference_steps was 50 .* cannot be 20"),
        ({"height": 64}, "height was None"),
        ({"generator": torch.Generator()}, "generator cannot be given"),
        ({"guidance_scale": 1.0}, r"guidance was on .*guidance_scale 7.5.* and would be off"),
        ({"output_type": "latent"}, "output_type cannot change"),
        ({"num_images_per_prompt": 2}, "num_images_per_prompt was 1"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, "latents was None .* Tensor of shape"),
    ],
)
def test_changes_that_break_the_correspondence(arguments: CallArguments, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        arguments.merge({"prompt": "a"}, changes)


def test_changes_that_are_none_are_accepted(arguments: CallArguments) -> None:
    recorded = {"prompt": "a", "height": 64, "guidance_scale": 5.0}
    merged = arguments.merge(recorded, {"prompt": "b", "height": 64, "guidance_scale": 2.0, "eta": 0.0})
    assert merged == {"prompt": "b", "height": 64, "guidance_scale": 2.0, "eta": 0.0}
    assert recorded == {"prompt": "a", "height": 64, "guidance_scale": 5.0}


def test_a_new_prompt_replaces_recorded_embeddings(arguments: CallArguments) -> None:
    recorded = {"prompt_embeds": torch.zeros(1), "negative_prompt_embeds": torch.ones(1)}
    assert arguments.merge(recorded, {"prompt": "b"}).keys() == {"prompt", "negative_prompt_embeds"}


def test_new_embeddings_replace_recorded_prompts() -> None:
    pipe = object.__new__(HunyuanDiTPipeline)
    recorded = {"prompt": "a", "negative_prompt": "b", "prompt_attention_mask": None}
    new = {"prompt_embeds": torch.zeros(1, 2), "prompt_embeds_2": torch.zeros(1, 2), "prompt_attention_mask_2": None}
    merged = CallArguments(pipe, FAMILY).merge(recorded, new)
    assert merged == {"prompt": None, "negative_prompt": "b", "prompt_attention_mask": None, **new}
    again = CallArguments(pipe, FAMILY).merge(merged, {"negative_prompt_embeds": torch.ones(1, 2)})
    assert again["negative_prompt"] is None and again["prompt_embeds"] is new["prompt_embeds"]
    assert CallArguments(pipe, FAMILY).merge(merged, {"prompt": "c"}) == {"prompt": "c", "negative_prompt": "b"}


def test_prompts_given_as_lists_of_embeddings_are_counted() -> None:
    arguments = CallArguments(object.__new__(ZImagePipeline), FAMILY)
    recorded = {"prompt_embeds": [torch.zeros(3, 2)]}
    with pytest.raises(PipelineError, match="from 1 prompts and the edit has 2"):
        arguments.merge(recorded, {"prompt_embeds": [torch.zeros(3, 2)] * 2})


@pytest.mark.parametrize(
    "kind", [AnimateDiffPipeline, TextToVideoZeroPipeline, LTXPipeline, LattePipeline, SanaVideoPipeline]
)
def test_videos_are_refused_as_videos(kind: Any) -> None:
    """Also those whose latents have four dimensions, with a frame in each sample's place."""
    with pytest.raises(
        PipelineError, match=rf"{kind.__name__} makes videos \(it takes .*\), and an edit session is for"
    ):
        CallArguments(object.__new__(kind), FAMILY)


def test_depth_maps_are_refused() -> None:
    pipe = object.__new__(StableDiffusionLDM3DPipeline)
    vars(pipe)["image_processor"] = VaeImageProcessorLDM3D()
    with pytest.raises(PipelineError, match="StableDiffusionLDM3DPipeline makes depth maps beside its pictures"):
        CallArguments(pipe, FAMILY)


def test_only_output_types_that_a_pipeline_gives_are_asked_of_it() -> None:
    class Own(VaeImageProcessor):
        def postprocess(self, image: Any, output_type: str = "pil", do_denormalize: Any = None) -> Any:
            raise ValueError(f"no {output_type}")

    class Pipe:
        image_processor: Any = None

        def __call__(self, prompt: str, output_type: str = "tensor", callback: Any = None) -> None: ...

    pipe = Pipe()
    arguments = CallArguments(pipe, FAMILY)
    arguments.check({"prompt": "a"})
    assert arguments.output_type({}) == "pil" and arguments.output_type({"output_type": "np"}) == "np"
    with pytest.raises(PipelineError, match="output_type must be one of pil, np, pt, latent, got 'tensor'"):
        arguments.check({"output_type": "tensor"})
    for processor, asked in ((None, "np"), (Own(), "np"), (VaeImageProcessor(), "pt")):
        pipe.image_processor = processor
        assert arguments.asked_type({}) == asked and arguments.asked_type({"output_type": "pil"}) == asked
        assert arguments.asked_type({"output_type": "latent"}) == "latent"


def test_control_pictures_tell_their_size_where_they_are_tensors(arguments: CallArguments) -> None:
    pictures = [torch.zeros(1, 3, 8, 16), Image.new("RGB", (4, 4)), torch.zeros(3, 24, 8)]
    given = {"control_image": pictures, "image": torch.zeros(1, 3, 4, 4), "control_mode": torch.zeros(1)}
    assert arguments.control_sizes(given) == [(8, 16), (24, 8)]


def test_pictures_may_be_resized_in_the_end() -> None:
    sana = CallArguments(object.__new__(SanaPipeline), FAMILY)
    assert sana.made_size({"width": 96}) == (1024, 96)
    assert sana.made_size({"use_resolution_binning": False}) is None


@pytest.mark.parametrize("changes", [{"prompt": ["a", "b"]}, {"prompt": None, "prompt_embeds": torch.zeros(3, 2, 2)}])
def test_the_number_of_prompts_must_stay(arguments: CallArguments, changes: dict[str, Any]) -> None:
    with pytest.raises(PipelineError, match=r"from 1 prompts and the edit has [23]"):
        arguments.merge({"prompt": "a"}, changes)
    assert arguments.merge({"prompt": ["a"]}, {"prompt": "b"}) == {"prompt": "b"}


def test_no_guidance_on_both_sides_is_fine(arguments: CallArguments) -> None:
    assert not arguments.guidance({"guidance_scale": 1.0}).on
    assert arguments.merge({"guidance_scale": 1.0}, {"guidance_scale": 0.0})["guidance_scale"] == 0.0


def test_the_callback_brings_the_names_of_its_tensors(arguments: CallArguments) -> None:
    class Own:
        tensor_inputs = ["prompt_embeds"]

        def __call__(self, *given: Any) -> dict[str, Any]:
            return {}

    own = Own()
    assert arguments.user_callback({"callback_on_step_end": own}) == (own, ["prompt_embeds"])
    names = ["latents", "prompt_embeds"]
    assert arguments.user_callback({"callback_on_step_end_tensor_inputs": names}) == (None, names)
    assert arguments.user_callback({}) == (None, ["latents"])


def test_values_are_compared_by_content() -> None:
    picture = Image.new("RGB", (2, 2), 5)
    assert same_value(picture, picture.copy()) and not same_value(picture, Image.new("RGB", (2, 2), 6))
    assert same_value([torch.ones(2)], [torch.ones(2)]) and not same_value(torch.ones(2), torch.zeros(2))
    assert same_value(np.ones(2), np.ones(2)) and not same_value(np.ones(2), None)
    assert same_value((1, 2), [1, 2]) and not same_value([1], [1, 2])


def test_kept_values_are_out_of_reach() -> None:
    tensor, array, picture = torch.zeros(2), np.zeros(2), Image.new("L", (1, 1), 0)
    kept = keep_value([tensor, array, picture])
    tensor.add_(1)
    array += 1
    picture.putpixel((0, 0), 9)
    assert kept[0].sum() == 0 and kept[1].sum() == 0 and kept[2].getpixel((0, 0)) == 0


def test_generators_are_rebuilt_in_their_first_state() -> None:
    own = torch.Generator().manual_seed(3)
    torch.randn(5, generator=own)
    noise = NoiseSource.of(own)
    expected = torch.randn(4, generator=own)
    state = own.get_state()
    rebuilt = noise.generators()
    assert isinstance(rebuilt, torch.Generator)
    assert torch.equal(torch.randn(4, generator=rebuilt), expected)
    assert torch.equal(own.get_state(), state)
    several = NoiseSource.of([own, torch.Generator().manual_seed(1)]).generators()
    assert isinstance(several, list) and len(several) == 2


@pytest.mark.parametrize("wrong", [3, [], [None], "seed"])
def test_what_is_no_generator_is_refused(wrong: Any) -> None:
    with pytest.raises(PipelineError, match=r"torch\.Generator"):
        NoiseSource.of(wrong)


def test_runs_without_a_generator_have_none() -> None:
    assert NoiseSource.of(None).generators() is None


def test_kept_dictionaries_are_out_of_reach() -> None:
    @dataclass(frozen=True)
    class Setting:
        values: dict[str, Any]

    Pair = namedtuple("Pair", "left right")
    inner = {"scale": 1.0, "parts": [torch.zeros(2)]}
    given = {"a": inner, "b": Setting(inner), "c": Pair(inner, {3}), "d": OrderedDict(inner)}
    kept = keep_value(given)
    inner["scale"] = 2.0
    inner["parts"][0].add_(1)
    given["c"].right.add(4)
    given["d"]["scale"] = 3.0
    for found in (kept["a"], kept["b"].values, kept["c"].left, kept["d"]):
        assert found["scale"] == 1.0 and found["parts"][0].sum() == 0
    assert kept["c"].right == {3} and type(kept["d"]) is OrderedDict and type(kept["c"]) is Pair
    assert same_value(kept["a"], kept["d"]) and not same_value(kept["a"], inner)
    assert not same_value({"a": torch.ones(2)}, {"b": torch.ones(2)})


@pytest.mark.parametrize("steps", [0, -1, 2.5, True])
def test_steps_are_a_number_from_one_on(steps: Any, arguments: CallArguments) -> None:
    with pytest.raises(PipelineError, match="num_inference_steps must be"):
        arguments.of_generation("a ball", steps, {})
