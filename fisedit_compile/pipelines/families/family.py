"""The description of a family of pipelines: what a session has to know of a pipeline before it calls it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fisedit_compile.pipelines.families.encoding import Encoded, encode_map
from fisedit_compile.pipelines.families.guidance import Guidance, guidance_of
from fisedit_compile.pipelines.families.sizes import default_size_of, whole_cells_of
from fisedit_compile.runtime import Domain

CHANGEABLE = frozenset(
    {
        "ip_adapter_image",
        "ip_adapter_image_embeds",
        "negative_ip_adapter_image",
        "negative_ip_adapter_image_embeds",
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
"""Arguments of diffusers' pipelines that an edit may change, besides prompts and guidance scales."""

REFUSED = {
    "return_dict": "return_dict cannot be given: a session returns an object with image and images",
    "padding_mask_crop": "padding_mask_crop cannot be used in a session, because masks would not refer to the whole "
    "picture; crop the picture and its mask before generating",
}
"""Arguments of diffusers' pipelines that a session cannot honour."""

MULTIPLE = 8
"""Pixels of which pipelines of diffusers ask height and width to be multiples, also with small autoencoders."""


@dataclass(frozen=True)
class Packing:
    """How a pipeline packs its latents to tokens ``[B, tokens, C]``, row by row.

    Attributes:
        argument: what the network calls its tokens.
        side: latent cells of a token in each direction.
        resolutions: the resolutions that the tokens of a call may have, of which their number tells one; none where
            the pipeline packs nothing. It is given the pipeline, height and width in pixels (None: the pipeline's
            default) and heights and widths that the picture may have instead. It may raise PipelineError.
    """

    argument: str
    side: int
    resolutions: Callable[[Any, int | None, int | None, Sequence[tuple[int, int]]], tuple[Domain, ...]]


@dataclass(frozen=True)
class Family:
    """What is particular to a family of pipelines. The defaults are what diffusers' pipelines have in common.

    Attributes:
        name: in words.
        belongs: whether a pipeline is of this family; asked of one family after the other.
        network: attribute of the pipeline that holds the network which is called at every step.
        autoencoder: attribute that holds the autoencoder, with ``decode`` and a network ``decoder``; None: there is
            none, and pixels are what the network is called with.
        encode_prompt: method that encodes prompts; it is timed, and what it draws at random is told apart. A pipeline
            need not have it.
        prepare_latents: method that makes the first latents, or a tuple that begins with them. A pipeline need not
            have it; then a network that is called with parts of the picture is noticed only behind the first step.
        latents: what the network may call the latents that it is given; the first that is a tensor counts.
        packing: how latents are packed to tokens; None: they are maps ``[B, C, height, width]``.
        content: arguments of the network, of rank 0 or 1, that an edit may change, such as a guidance scale. All
            others of rank 0 or 1 (timesteps) are compared with the recording.
        guidance: tells whether the network computes a second prediction in a call: in a doubled batch or by a second
            call. It is given the pipeline, its network, a function from the name of an argument to its value, and one
            that tells whether the pipeline has an argument.
        prompt_limit: tells of a pipeline's ``encode_prompt`` the most tokens that a prompt has where the session pads
            prompts, and None where the pipeline does. None: all pipelines of the family do.
        changeable: arguments of the pipeline that an edit may change, besides prompts and guidance scales. All others
            decide noise, steps or size, which the edit shares with the recorded run.
        default_size: tells height and width in pixels of pictures of which the user gives none; None from it: that is
            not known. It is given the pipeline and its network.
        refused: arguments that a session cannot honour, and what its user is told.
        tokenizers: of text encoders whose tokens stand at the same places of the network's prompt, each with the
            argument that has its text; none: it is not known which of the network's tokens are which words.
        resizes: the argument by which a pipeline may make a picture of another size, which it resizes in the end.
        encode: makes latents of pixels ``[B, 3, height, width]`` from 0 to 1; it is given the pipeline and these.
        without_callbacks: whether the pipeline takes no callbacks at all and goes on with what the scheduler's ``step``
            returns, so that a session follows it there.
    """

    name: str
    belongs: Callable[[Any], bool]
    network: str
    autoencoder: str | None = "vae"
    encode_prompt: str = "encode_prompt"
    prepare_latents: str = "prepare_latents"
    latents: tuple[str, ...] = ("sample", "hidden_states")
    packing: Packing | None = None
    content: tuple[str, ...] = ("guidance",)
    guidance: Callable[[Any, Any, Callable[[str], Any], Callable[[str], bool]], Guidance] = guidance_of
    prompt_limit: Callable[[Callable[..., Any] | None], int | None] | None = None
    changeable: frozenset[str] = CHANGEABLE
    default_size: Callable[[Any, Any], tuple[int, int] | None] = default_size_of
    refused: Mapping[str, str] = field(default_factory=lambda: dict(REFUSED))
    tokenizers: tuple[tuple[str, str], ...] = ()
    resizes: str = "use_resolution_binning"
    encode: Callable[[Any, Tensor], Encoded] = encode_map
    without_callbacks: bool = False

    def network_of(self, pipe: Any) -> Any:
        """The network of a pipeline that is called at every step; None: it has none."""
        return getattr(pipe, self.network, None)

    def tokens(
        self, pipe: Any, height: int | None, width: int | None, others: Sequence[tuple[int, int]] = ()
    ) -> tuple[Domain, ...]:
        """The resolutions that the tokens of a call may have; none: its latents are maps.

        Args:
            pipe: of this family.
            height: of the picture in pixels; None: the pipeline's default.
            width: the same.
            others: heights and widths that it may have instead.

        Raises:
            PipelineError: they cannot be told.
        """
        return () if self.packing is None else self.packing.resolutions(pipe, height, width, others)

    def cells(self, pipe: Any, height: int | None, width: int | None) -> Domain | None:
        """How many latent cells a picture has in each direction; None: that is not known.

        Args:
            pipe: of this family.
            height: of the picture in pixels; None: the pipeline's default.
            width: the same.
        """
        scale, size = getattr(pipe, "vae_scale_factor", None), self.default_size(pipe, self.network_of(pipe))
        wanted = [given or default for given, default in zip((height, width), size or (None, None), strict=True)]
        if not isinstance(scale, int) or not all(isinstance(side, int) and side >= scale for side in wanted):
            return None
        return Domain(*(int(side) // scale for side in wanted if side is not None))

    def grid(self, pipe: Any) -> tuple[int, int] | None:
        """The pixels of which height and width of a picture must be multiples for the pipeline, and those of which they
        should be, so that no resolution of the network has a part of a cell; None: the pipeline does not tell."""
        scale = getattr(pipe, "vae_scale_factor", None)
        if not isinstance(scale, int):
            return None
        whole = self.side if self.packing is not None else whole_cells_of(self.network_of(pipe))
        return math.lcm(MULTIPLE, scale * self.side), math.lcm(MULTIPLE, scale * whole)

    def prompt_limit_of(self, pipe: Any) -> int | None:
        """The most tokens of a prompt where the session pads prompts; None: the pipeline does."""
        return None if self.prompt_limit is None else self.prompt_limit(getattr(pipe, self.encode_prompt, None))

    @property
    def side(self) -> int:
        """Latent cells of a position that the network computes for, in each direction."""
        return 1 if self.packing is None else self.packing.side


def has_part(pipe: Any, name: str) -> bool:
    """Whether a pipeline has a part of this name."""
    return getattr(pipe, name, None) is not None
