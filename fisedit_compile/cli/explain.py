"""``fisedit explain``: what the compiler makes sparse in a network, and what stays dense and why."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fisedit_compile.cli import options


def explain(
    model: Annotated[
        str,
        typer.Option(
            help="sd15, sd21, sdxl or scenes; or the folder of a diffusers pipeline, of which only the U-Net's "
            "configuration is read.",
            metavar="NAME",
        ),
    ] = "sd15",
    size: options.Size = None,
    batch: Annotated[int, typer.Option(help="Batch of a U-Net call; 2 is one picture with guidance.", min=1)] = 2,
    chip: Annotated[
        str | None,
        typer.Option(
            help="Also show which kernels a GPU would use in half precision; none is needed: T4, A100, RTX 3090, "
            "RTX 4090, H100 or B200.",
            metavar="NAME",
        ),
    ] = None,
    graph: Annotated[
        Path | None,
        typer.Option(
            help="Also write the graph of resolutions, and of what flows where, to this file: a drawing (.svg), for "
            "Graphviz (.dot), or node-link data (.json)."
        ),
    ] = None,
) -> None:
    """Explain what becomes sparse in a U-Net.

    Nothing is computed and no weights are needed: the network is built without them.
    """
    if graph is not None:
        from fisedit_compile.reporting.flow import check_ending

        check_ending(graph)
    options.quiet()
    import torch
    from rich.console import Console

    from fisedit_compile import explain as explain_network
    from fisedit_compile.bench import networks as models
    from fisedit_compile.reporting.kernels import named_chip

    gpu = named_chip(chip) if chip is not None else None
    dtype = torch.float32 if gpu is None else torch.float16
    unet = models.build_unet(model, dtype, device="meta")
    positional, named = models.example_inputs(model, options.parse_size(size), batch, dtype, device="meta")
    with Console(stderr=True).status("tracing"):
        report = explain_network(unet, *positional, **named)
    typer.echo(str(report))
    if gpu is not None:
        typer.echo(report.describe_kernels(gpu))
    if graph is not None:
        report.write_graph(graph)
        typer.echo(f"graph in {graph}")
