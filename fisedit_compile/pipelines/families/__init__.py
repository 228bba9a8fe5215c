"""Families of pipelines: one description each, in a file of its own, and the list in which they are looked up."""

from __future__ import annotations

from typing import Any

from fisedit_compile.errors import PipelineError
from fisedit_compile.pipelines.families.diffusion_transformers import DIFFUSION_TRANSFORMERS
from fisedit_compile.pipelines.families.family import Family, Packing
from fisedit_compile.pipelines.families.flux import FLUX
from fisedit_compile.pipelines.families.guidance import Guidance
from fisedit_compile.pipelines.families.qwen_image import QWEN_IMAGE
from fisedit_compile.pipelines.families.stable_diffusion import STABLE_DIFFUSION
from fisedit_compile.pipelines.families.unconditional import UNCONDITIONAL

__all__ = ["FAMILIES", "Family", "Guidance", "Packing", "family_of", "register"]

FAMILIES: list[Family] = [UNCONDITIONAL, STABLE_DIFFUSION, QWEN_IMAGE, FLUX, DIFFUSION_TRANSFORMERS]
"""All families; the first that a pipeline belongs to is its own."""


def register(family: Family) -> None:
    """Add a family of your own, which is asked before all others, for sessions that are made from now on."""
    FAMILIES.insert(0, family)


def family_of(pipe: Any) -> Family:
    """The family of a pipeline.

    Raises:
        PipelineError: it belongs to none.
    """
    found = next((family for family in FAMILIES if family.belongs(pipe)), None)
    if found is None:
        networks = " or a ".join(dict.fromkeys(family.network for family in FAMILIES))
        raise PipelineError(
            f"an edit session needs a diffusers pipeline with a {networks}, and {type(pipe).__name__} has none; use "
            "one with a U-Net, such as StableDiffusionPipeline or StableDiffusionXLPipeline, or with a transformer, "
            "such as StableDiffusion3Pipeline or FluxPipeline, or describe its family (docs/adding-a-pipeline.md)"
        )
    return found
