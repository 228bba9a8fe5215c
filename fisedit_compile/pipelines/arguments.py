"""Arguments of a pipeline call: which an edit takes over from the recorded run, and which it may change."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from fisedit_compile.errors import PipelineError

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

CHANGEABLE = frozenset(
    {
        "prompt",
        "prompt_2",
        "prompt_3",
        "negative_prompt",
        "negative_prompt_2",
        "negative_prompt_3",
        "prompt_embeds",
        "prompt_embeds_mask",
        "prompt_attention_mask",
        "negative_prompt_embeds",
        "negative_prompt_embeds_mask",
        "negative_prompt_attention_mask",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
        "ip_adapter_image",
        "ip_adapter_image_embeds",
        "guidance_scale",
        "guidance_rescale",
        "true_cfg_scale",
        "clip_skip",
        "cross_attention_kwargs",
        "joint_attention_kwargs",
        "attention_kwargs",
        "callback_on_step_end",
        "callback_on_step_end_tensor_inputs",
        "output_type",
    }
)
"""Arguments an edit may change. All others decide noise, steps or size, which the edit shares with the recorded run."""

_EMBEDDINGS = ("prompt_embeds", "pooled_prompt_embeds", "prompt_embeds_mask", "prompt_attention_mask")


class CallArguments:
    """The arguments one pipeline class understands, with their defaults.

    Args:
        pipe: a diffusers pipeline.

    Raises:
        PipelineError: the pipeline has no ``callback_on_step_end``.
    """

    def __init__(self, pipe: Any) -> None:
        self._name = type(pipe).__name__
        parameters = inspect.signature(type(pipe).__call__).parameters
        self._defaults = {
            name: None if parameter.default is inspect.Parameter.empty else parameter.default
            for name, parameter in parameters.items()
            if name != "self" and parameter.kind is not inspect.Parameter.VAR_KEYWORD
        }
        if "callback_on_step_end" not in self._defaults:
            raise PipelineError(
                f"{self._name} has no callback_on_step_end, through which an edit session follows the steps; use a "
                "text-to-image, image-to-image or inpainting pipeline with it, such as StableDiffusionPipeline"
            )

    def value(self, given: Mapping[str, Any], name: str) -> Any:
        """The value of an argument: the given one, or the pipeline's default."""
        return given.get(name, self._defaults.get(name))

    def accepts(self, name: str) -> bool:
        """Whether the pipeline has an argument of this name."""
        return name in self._defaults

    def check(self, given: Mapping[str, Any]) -> None:
        """Refuse arguments that the pipeline does not know or that a session cannot honour.

        Raises:
            PipelineError: naming the argument and what to do instead.
        """
        unknown = sorted(set(given) - self._defaults.keys() - {"callback", "callback_steps"})
        if unknown:
            raise PipelineError(
                f"{self._name} has no argument {', '.join(unknown)}; it takes {', '.join(sorted(self._defaults))}"
            )
        if "return_dict" in given:
            raise PipelineError("return_dict cannot be given: a session returns an object with image and images")
        if given.get("padding_mask_crop") is not None:
            raise PipelineError(
                "padding_mask_crop cannot be used in a session, because masks would not refer to the whole picture; "
                "crop the picture and its mask before generating"
            )
        output_type = self.value(given, "output_type")
        if output_type not in OUTPUT_TYPES:
            raise PipelineError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")

    def guided(self, given: Mapping[str, Any]) -> bool:
        """Whether the run has classifier-free guidance, which doubles the batch of its network calls."""
        scale = self.value(given, "guidance_scale")
        return scale is not None and scale > 1

    def merge(self, recorded: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of an edit: those of the recorded run with the changed ones.

        Raises:
            PipelineError: a change that would break the correspondence with the recorded run.
        """
        self.check(changes)
        for name, value in changes.items():
            if name == "generator":
                raise PipelineError(
                    "generator cannot be given to an edit: it starts from the noise of the recorded run; "
                    "call generate with another generator for other noise"
                )
            if name not in CHANGEABLE and not same_value(self.value(recorded, name), value):
                raise PipelineError(
                    f"{name} was {_short(self.value(recorded, name))} when the picture was generated and cannot be "
                    f"{_short(value)} in an edit; leave it out, or call generate with the new value first"
                )
        merged = {**recorded, **changes}
        if merged.get("prompt") is not None:
            for name in _EMBEDDINGS:
                if name not in changes:
                    merged.pop(name, None)
        if self.guided(recorded) != self.guided(merged):
            raise PipelineError(
                f"guidance_scale was {self.value(recorded, 'guidance_scale')} and cannot become "
                f"{self.value(merged, 'guidance_scale')}: guidance is on above 1 only, and crossing 1 changes the "
                "batch of every network call; stay on the same side of 1, or call generate with the new value first"
            )
        counts = [_prompt_count(given) for given in (recorded, merged)]
        if counts[0] != counts[1]:
            raise PipelineError(
                f"the picture was generated from {counts[0]} prompts and the edit has {counts[1]}; the number of "
                "prompts must be the same, or call generate with the new ones first"
            )
        was_latent, is_latent = (self.value(given, "output_type") == "latent" for given in (recorded, merged))
        if was_latent != is_latent:
            raise PipelineError(
                "output_type cannot change between latent and a picture: the pixels outside the mask come from the "
                "recorded picture; call generate with the output_type of the edit first"
            )
        return merged

    def user_callback(self, given: Mapping[str, Any]) -> tuple[Callable[..., Any] | None, list[str]]:
        """The user's ``callback_on_step_end`` and the names of the tensors it is to be given."""
        callback = given.get("callback_on_step_end")
        names = getattr(callback, "tensor_inputs", None)
        if names is None:
            names = self.value(given, "callback_on_step_end_tensor_inputs")
        return callback, list(names if names is not None else ["latents"])


def _prompt_count(given: Mapping[str, Any]) -> int:
    """How many prompts a call has, also when they are given as embeddings."""
    prompt, embeddings = given.get("prompt"), given.get("prompt_embeds")
    if isinstance(prompt, (list, tuple)):
        return len(prompt)
    return 1 if prompt is not None or embeddings is None else int(embeddings.shape[0])


def same_value(left: Any, right: Any) -> bool:
    """Whether two arguments mean the same; pictures and tensors are compared by content."""
    if left is right:
        return True
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return left.shape == right.shape and bool(torch.equal(left.cpu(), right.cpu()))
    if isinstance(left, Image.Image) and isinstance(right, Image.Image):
        return left.size == right.size and left.mode == right.mode and left.tobytes() == right.tobytes()
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        return bool(np.array_equal(left, right))
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(same_value, left, right))
    if any(isinstance(value, (torch.Tensor, np.ndarray, Image.Image)) for value in (left, right)):
        return False
    return bool(left == right)


def keep_value(value: Any) -> Any:
    """A copy of an argument that later changes in place cannot reach."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, (np.ndarray, Image.Image)):
        return value.copy()
    if isinstance(value, (list, tuple)):
        return type(value)(keep_value(element) for element in value)
    return value


def _short(value: Any) -> str:
    """A value as it may stand in a message."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    if isinstance(value, Image.Image):
        return f"a picture of {value.width}x{value.height} pixels"
    return repr(value)
