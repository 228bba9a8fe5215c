"""The options of the backend that a session takes, and what its network and its decoder are compiled with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fisedit_compile.errors import OptionError
from fisedit_compile.options import parse_options
from fisedit_compile.passes import disabled_passes
from fisedit_compile.pipelines.families import Family
from fisedit_compile.runtime import Domain

OF_INPUTS = ("tokens", "content")
"""Options that name inputs of the network; a decoder has none of them."""


@dataclass(frozen=True)
class BackendOptions:
    """What the user of a session wants of the backend.

    Attributes:
        common: for the network and the decoder.
        tokens: inputs of the network that are pictures as tokens, besides the latents, and their resolutions.
        content: inputs of the network of rank 0 or 1 that an edit may change, besides those of the family.
    """

    common: Mapping[str, Any]
    tokens: Mapping[str, Any]
    content: Sequence[str]

    @classmethod
    def of(cls, **given: Any) -> BackendOptions:
        """The options by their names, all but ``runtime``.

        Raises:
            OptionError: one has an invalid value.
        """
        # Wrong options are told now, not in the middle of the first network call.
        disabled_passes(parse_options(None, given)[1])
        common = {name: value for name, value in given.items() if name not in OF_INPUTS}
        return cls(common, dict(given["tokens"]), tuple(given["content"]))

    def check(self, family: Family) -> None:
        """Refuse what the session itself tells the backend.

        Raises:
            OptionError: ``tokens`` names the latents.
        """
        if family.packing is not None and family.packing.argument in self.tokens:
            raise OptionError(
                f"tokens names {family.packing.argument}, the latents of the picture, whose height and width the "
                "session tells the compiler by itself; leave it out"
            )

    def of_network(self, family: Family, resolutions: Sequence[Domain]) -> dict[str, Any]:
        """What the network is compiled with, but for ``runtime``.

        Args:
            family: of the pipeline.
            resolutions: that the tokens may have to which latents are packed; none: they are maps.
        """
        options = {**self.common, "content": [*family.content, *self.content]}
        tokens = dict(self.tokens)
        if resolutions and family.packing is not None:
            tokens[family.packing.argument] = [(domain.height, domain.width) for domain in resolutions]
        return {**options, "tokens": tokens} if tokens else options

    def of_decoder(self) -> dict[str, Any]:
        """What the decoder is compiled with, but for ``runtime``."""
        return dict(self.common)
