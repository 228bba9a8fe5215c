"""``fisedit edit``: generate a picture and edit it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fisedit_compile.cli import options
from fisedit_compile.errors import MaskError, OptionError

if TYPE_CHECKING:
    from torch import Tensor

    from fisedit_compile.pipelines import AutomaticMask


def edit(
    base_prompt: Annotated[str, typer.Option(help="What the picture shows before the edit.")],
    prompt: Annotated[str, typer.Option(help="What it should show after the edit.")],
    mask: Annotated[
        Path | None,
        typer.Option(help="Picture that is white where the edit may change something; found when left out."),
    ] = None,
    white_threshold: Annotated[
        float, typer.Option(help="The share of the mask's scale that white reaches, above 0 and up to 1.")
    ] = 0.5,
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("fisedit-edit"),
    model: options.Model = options.EMBEDDED,
    seed: options.Seed = 0,
    steps: options.Steps = 50,
    scheduler: options.Scheduler = None,
    guidance: options.Guidance = None,
    negative_prompt: options.NegativePrompt = None,
    size: options.Size = None,
    argument: options.Argument = None,
    device: options.Device = None,
    precision: options.DataType = options.Precision.FLOAT32,
    norm: Annotated[
        options.Norm, typer.Option(help="Statistics of group norms: updated exactly, or as recorded.")
    ] = options.Norm.EXACT,
    storage: Annotated[
        options.Precision | None, typer.Option(help="Type in which feature maps are recorded; as computed if left out.")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="Most memory for recorded feature maps, such as 8GB.")] = None,
    tier: Annotated[
        options.Tier, typer.Option(help="Where feature maps are kept: on the device, or in the host's memory.")
    ] = options.Tier.DEVICE,
    mask_method: Annotated[
        options.MaskMethod,
        typer.Option(help="Find the mask by probes of recorded steps, or as FISEdit does in the first steps."),
    ] = options.MaskMethod.PROBE,
    mask_steps: Annotated[
        int | None,
        typer.Option(help="With the method fisedit, how many of 50 steps run densely to find the mask; 10.", min=1),
    ] = None,
    mask_threshold: Annotated[
        float | None, typer.Option(help="Threshold of the mask from 0 to 1; Otsu's method when left out.")
    ] = None,
    mask_growth: Annotated[int | None, typer.Option(help="Grow the found mask by so many latent cells.", min=0)] = None,
    mask_growth_pixels: Annotated[
        int | None, typer.Option(help="Grow the found mask by so many pixels of the picture.", min=0)
    ] = None,
    global_share: Annotated[
        float | None,
        typer.Option(help="With the method probe, the share of the picture from which on everything is edited."),
    ] = None,
    decoder: Annotated[
        options.Decoder, typer.Option(help="How the edit is decoded; auto takes the cheapest.")
    ] = options.Decoder.AUTO,
) -> None:
    """Generate a picture, then edit it by a new prompt, computing only the part that changes.

    Writes base.png, mask.png (the mask over the base), edited.png and report.json.
    """
    arguments = options.call_arguments(model, steps, guidance, negative_prompt, size, argument)
    painted = None
    if mask is not None:
        painted = read_mask(mask, white_threshold)
    automatic = automatic_mask(
        method=mask_method.value,
        steps=mask_steps,
        threshold=mask_threshold,
        growth=mask_growth,
        growth_pixels=mask_growth_pixels,
        global_share=global_share,
    )
    pipe = options.load_model(model, scheduler, device, precision)
    import torch
    from rich.console import Console

    from fisedit_compile.cli import pictures, tables
    from fisedit_compile.pipelines import EditSession

    session = EditSession(
        pipe,
        storage=None if storage is None else getattr(torch, storage.value),
        budget=budget,
        tier=tier.value,
        norm=norm.value,
        automatic_mask=automatic,
        decoder=decoder.value,
    )
    if painted is not None:
        session.check_mask_size(*painted.shape[-2:], **arguments)
    with options.pipeline_complaints():
        pipe.set_progress_bar_config(desc="generating and recording")
        base = session.generate(base_prompt, generator=torch.Generator().manual_seed(seed), **arguments)
        pipe.set_progress_bar_config(desc="editing")
        edited = session.edit(prompt, mask=painted, keep=False)
    output.mkdir(parents=True, exist_ok=True)
    base.image.save(output / "base.png")
    pictures.overlay(base.image, pictures.mask_of(edited)).save(output / "mask.png")
    edited.image.save(output / "edited.png")
    reports = {"base": base.report, "edit": edited.report}
    summary = {heading: report.to_dict() for heading, report in reports.items()}
    (output / "report.json").write_text(json.dumps(summary, indent=2) + "\n")
    Console().print(tables.report_table(f"{base_prompt} → {prompt}", reports))
    for note in tables.notes(reports):
        typer.echo(f"note: {note}")
    typer.echo(f"pictures and report in {output}")


def automatic_mask(**settings: Any) -> AutomaticMask:
    """How the mask is found.

    Raises:
        typer.BadParameter: settings out of their ranges, or of different methods.
    """
    from fisedit_compile.pipelines import AutomaticMask

    try:
        return AutomaticMask(**settings)
    except OptionError as error:
        raise typer.BadParameter(str(error), param_hint="--mask-...") from error


def read_mask(path: Path, white_threshold: float) -> Tensor:
    """Read a mask: bool ``[1, height, width]``.

    Raises:
        typer.BadParameter: the file is no picture, or none that can be a mask.
    """
    from fisedit_compile.runtime.masks import prepare_mask

    try:
        return prepare_mask(path, white_threshold, samples=1)
    except MaskError as error:
        raise typer.BadParameter(str(error), param_hint="--mask") from error
    except OptionError as error:
        raise typer.BadParameter(str(error), param_hint="--white-threshold") from error
