"""Arguments of a pipeline call: which an edit takes over from the recorded run, and which it may change."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import is_dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines.differences import told_apart
from fisedit_compile.pipelines.families import Family, Guidance
from fisedit_compile.pipelines.families.refused import check_single_pictures
from fisedit_compile.runtime import Domain

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

_GUIDANCE = re.compile(r"(?:\w+_)?guidance_(?:re)?scale$")
"""Names of guidance scales (``image_guidance_scale``, ``distilled_guidance_scale``). By some predictions are mixed,
others are inputs of the network: both may change. Whether guidance is on may not, which is checked."""

_PROMPT = re.compile(r"(?P<side>negative_)?(?:(?P<words>prompt(?:_\d)?)|(?:pooled_)?prompt_\w*[a-z]\w*)$")
"""Names of prompts. ``words`` are texts (``negative_prompt_2``), the others embeddings and their masks."""


class CallArguments:
    """The arguments one pipeline class understands, with their defaults.

    Args:
        pipe: a diffusers pipeline.
        family: of the pipeline.

    Raises:
        PipelineError: the pipeline has neither ``callback_on_step_end`` nor its predecessor ``callback``, or makes
            something else than single pictures.
    """

    def __init__(self, pipe: Any, family: Family) -> None:
        self._pipe, self._family = pipe, family
        self._name = type(pipe).__name__
        parameters = inspect.signature(type(pipe).__call__).parameters
        self._defaults = {
            name: None if parameter.default is inspect.Parameter.empty else parameter.default
            for name, parameter in parameters.items()
            if name != "self" and parameter.kind is not inspect.Parameter.VAR_KEYWORD
        }
        followed = family.without_callbacks or self.accepts("callback_on_step_end") or self.accepts("callback")
        if not followed:
            raise PipelineError(
                f"{self._name} has no callback_on_step_end, through which an edit session follows the steps; use a "
                "text-to-image, image-to-image or inpainting pipeline with it, such as StableDiffusionPipeline"
            )
        check_single_pictures(pipe, self._defaults)

    def value(self, given: Mapping[str, Any], name: str) -> Any:
        """The value of an argument: the given one, or the pipeline's default."""
        return given.get(name, self._defaults.get(name))

    def accepts(self, name: str) -> bool:
        """Whether the pipeline has an argument of this name."""
        return name in self._defaults

    def of_generation(self, prompt: Any, steps: int | None, others: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a generation, copied; what is None is left to the pipeline's default.

        Raises:
            PipelineError: an argument that the pipeline does not know or that a session cannot honour.
        """
        given = {**({} if prompt is None else {"prompt": prompt}), **others}
        if steps is not None:
            given["num_inference_steps"] = steps
        given = {name: keep_value(value) for name, value in given.items()}
        self.check(given)
        asked = given.get("num_inference_steps")
        if asked is not None and (isinstance(asked, bool) or not isinstance(asked, Integral) or asked < 1):
            raise PipelineError(f"num_inference_steps must be a whole number from 1 on, got {asked!r}")
        return given

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
        for name, reason in self._family.refused.items():
            if given.get(name) is not None:
                raise PipelineError(reason)
        output_type = given.get("output_type", OUTPUT_TYPES[0])
        if output_type not in OUTPUT_TYPES:
            raise PipelineError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")

    def guidance(self, given: Mapping[str, Any]) -> Guidance:
        """The guidance of a call: it doubles the batch of the network calls, or their number."""
        network = self._family.network_of(self._pipe)
        return self._family.guidance(self._pipe, network, lambda name: self.value(given, name), self.accepts)

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
            if not self._changeable(name) and not same_value(self.value(recorded, name), value):
                was, cannot_be = told_apart(self.value(recorded, name), value)
                raise PipelineError(
                    f"{name} was {was} when the picture was generated and cannot be {cannot_be} in an edit; leave it "
                    "out, or call generate with the new value first"
                )
        merged = _exchange_prompts(recorded, changes)
        before, after = self.guidance(recorded), self.guidance(merged)
        if before.on != after.on:
            states = {True: "on", False: "off"}
            raise PipelineError(
                f"guidance was {states[before.on]} when the picture was generated ({before.why}) and would be "
                f"{states[after.on]} in the edit ({after.why}), which changes the network calls of every step; stay on "
                "the same side, or call generate with the new values first"
            )
        counts = [_prompt_count(given) for given in (recorded, merged)]
        if counts[0] != counts[1]:
            raise PipelineError(
                f"the picture was generated from {counts[0]} prompts and the edit has {counts[1]}; the number of "
                "prompts must be the same, or call generate with the new ones first"
            )
        was_latent, is_latent = (self.output_type(given) == "latent" for given in (recorded, merged))
        if was_latent != is_latent:
            raise PipelineError(
                "output_type cannot change between latent and a picture: the pixels outside the mask come from the "
                "recorded picture; call generate with the output_type of the edit first"
            )
        return merged

    def _changeable(self, name: str) -> bool:
        return name in self._family.changeable or any(names.match(name) is not None for names in (_PROMPT, _GUIDANCE))

    def tokens(self, given: Mapping[str, Any]) -> tuple[Domain, ...]:
        """The resolutions that the tokens of a call may have; none: its latents are maps.

        Raises:
            PipelineError: they cannot be told.
        """
        size = self.value(given, "height"), self.value(given, "width")
        return self._family.tokens(self._pipe, *size, self.control_sizes(given))

    def cells(self, given: Mapping[str, Any]) -> Domain | None:
        """How many latent cells the picture of a call has in each direction, as far as that can be told before it;
        None: it cannot."""
        if not self.accepts("height") or not self.accepts("width") or self.control_sizes(given):
            return None
        return self._family.cells(self._pipe, self.value(given, "height"), self.value(given, "width"))

    def made_size(self, given: Mapping[str, Any]) -> tuple[int, int] | None:
        """Height and width that the latents must have in pixels, of a call whose pipeline may make another size and
        resize the picture in the end; None: it does not."""
        height, width = (self.value(given, name) for name in ("height", "width"))
        if not self.value(given, self._family.resizes) or height is None or width is None:
            return None
        return int(height), int(width)

    def output_type(self, given: Mapping[str, Any]) -> str:
        """The form in which pictures are wanted: the given one, or the pipeline's default where a session has it."""
        wanted = self.value(given, "output_type")
        return wanted if wanted in OUTPUT_TYPES else OUTPUT_TYPES[0]

    def asked_type(self, given: Mapping[str, Any]) -> str:
        """The output type to ask of the pipeline. Tensors of pixels are what edits are pasted with, but only the usual
        image processor of diffusers makes them; arrays are what all pipelines make."""
        if self.output_type(given) == "latent":
            return "latent"
        postprocess = getattr(type(getattr(self._pipe, "image_processor", None)), "postprocess", None)
        return "pt" if postprocess is VaeImageProcessor.postprocess else "np"

    def control_sizes(self, given: Mapping[str, Any]) -> list[tuple[int, int]]:
        """Heights and widths of control pictures in pixels, where these are tensors: pipelines take such as they are,
        and some make a picture of that size, whatever was asked for."""
        found = []
        for name, value in given.items():
            if "control" in name and "image" in name:
                pictures = value if isinstance(value, (list, tuple)) else [value]
                tensors = (one for one in pictures if isinstance(one, torch.Tensor) and one.dim() > 2)
                found += [(int(one.shape[-2]), int(one.shape[-1])) for one in tensors]
        return found

    def user_callback(self, given: Mapping[str, Any]) -> tuple[Callable[..., Any] | None, list[str]]:
        """The user's ``callback_on_step_end`` and the names of the tensors it is to be given."""
        callback = given.get("callback_on_step_end")
        names = getattr(callback, "tensor_inputs", None)
        if names is None:
            names = self.value(given, "callback_on_step_end_tensor_inputs")
        return callback, list(names if names is not None else ["latents"])


def _exchange_prompts(recorded: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded arguments with the changed ones. New texts replace recorded embeddings, and new embeddings recorded
    texts, of prompts and of negative prompts: pipelines refuse both together."""
    merged = {**recorded, **changes}
    matches = {name: match for name in merged if (match := _PROMPT.match(name)) is not None}
    for side in (None, "negative_"):
        names = [name for name, match in matches.items() if match["side"] == side]
        texts = {name for name in names if matches[name]["words"] is not None}
        given = {name for name in names if changes.get(name) is not None}
        embedded = any("embeds" in name for name in given)
        for name in set(names) - changes.keys():
            if given & texts and name not in texts:
                del merged[name]
            elif embedded and not given & texts and name in texts:
                # Not left out: the default of some pipelines is an empty text, which counts as given.
                merged[name] = None
    return merged


def _prompt_count(given: Mapping[str, Any]) -> int:
    """How many prompts a call has, also when they are given as embeddings: a tensor, or a list of them."""
    prompt, embeddings = given.get("prompt"), given.get("prompt_embeds")
    if isinstance(prompt, (list, tuple)):
        return len(prompt)
    return 1 if prompt is not None or embeddings is None else len(embeddings)


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
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(same_value(left[name], right[name]) for name in left)
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(same_value, left, right))
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(same_value(left[name], right[name]) for name in left)
    if any(isinstance(value, (torch.Tensor, np.ndarray, Image.Image)) for value in (left, right)):
        return False
    return bool(left == right)


def keep_value(value: Any) -> Any:
    """A copy of an argument that later changes in place cannot reach."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, (np.ndarray, Image.Image)):
        return value.copy()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(keep_value, value))
    if isinstance(value, (list, tuple)):
        return type(value)(keep_value(element) for element in value)
    if isinstance(value, (set, bytearray)):
        return copy.copy(value)
    if isinstance(value, MutableMapping):
        kept = copy.copy(value)
        kept.update({name: keep_value(element) for name, element in value.items()})
        return kept
    if is_dataclass(value) and not isinstance(value, type):
        same = copy.copy(value)
        for name, element in vars(value).items() if hasattr(value, "__dict__") else ():
            # Also of one that is frozen.
            object.__setattr__(same, name, keep_value(element))
        return same
    return value
