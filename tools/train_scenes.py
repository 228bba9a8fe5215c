"""Train the scenes model from nothing: autoencoder, denoiser with text encoder, export, evaluation.

Every picture is drawn on the fly by the project's own renderer, so there is no data set.  Each training stage
writes checkpoints from which it carries on after an interruption.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from tqdm import tqdm

from fisedit_compile.scenes import (
    ATTRIBUTES,
    Scene,
    all_scenes,
    caption,
    check,
    held_back_scenes,
    load_pipeline,
)
from fisedit_compile.scenes.models import new_scheduler, new_text_encoder, new_tokenizer, new_unet
from fisedit_compile.scenes.pipeline import WEIGHTS
from fisedit_compile.scenes.render import SIZE, render
from scenes_training import (
    STATE_FILE,
    AutoencoderTraining,
    Checkpoint,
    DenoiserTraining,
    LatentBank,
    finished_autoencoder,
    to_pictures,
    to_tensor,
    with_prefix,
)

application = typer.Typer(help=__doc__, no_args_is_help=True)

Folder = Annotated[Path, typer.Option(help="Folder of the checkpoints.")]
Device = Annotated[str, typer.Option(help="Device to train on: cpu or cuda.")]
Weights = Annotated[Path, typer.Option(help="Folder of the exported pipeline.")]

AUTOENCODER_STEPS = 2000
DENOISER_STEPS = 5400
COOLDOWN_STEPS = 1900
LAYOUT_STEPS = range(1750, 2350)

LARGE_SIZE = 256
"""Width and height of the larger pictures in pixels."""

ENLARGE_STEPS = 1600
ENLARGE_COOLDOWN_STEPS = 600
NOISY_SHARE = 0.375
"""Share of the noisiest levels: in larger pictures the same noise hides less of what stands where."""

SMALL_EVERY = 4
"""One step of so many is on small pictures."""


@application.command()
def vae(
    folder: Folder,
    steps: Annotated[int, typer.Option(help="Number of optimiser steps.")] = AUTOENCODER_STEPS,
    batch: Annotated[int, typer.Option(help="Crops in a step.")] = 8,
    side: Annotated[int, typer.Option(help="Width and height of a crop in pixels.")] = 64,
    peak_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-3,
    device: Device = "cpu",
) -> None:
    """Train the autoencoder."""
    training = AutoencoderTraining(device, peak_rate)
    checkpoint = Checkpoint(folder / "vae", {"vae": training.model}, training.optimiser)
    first = checkpoint.load()
    progress = tqdm(range(first, steps), initial=first, total=steps, desc="autoencoder", mininterval=5.0)
    for step in progress:
        decibels = training.step(step, steps, batch, side)
        if step % 50 == 0:
            progress.set_postfix_str(f"{decibels:.1f} dB")
        if (step + 1) % 500 == 0 or step + 1 == steps:
            checkpoint.save(step + 1)


@application.command()
def unet(
    folder: Folder,
    steps: Annotated[int, typer.Option(help="Number of optimiser steps.")] = DENOISER_STEPS,
    cooldown: Annotated[int, typer.Option(help="Last steps, with a falling learning rate.")] = COOLDOWN_STEPS,
    batch: Annotated[int, typer.Option(help="Pictures in a step.")] = 16,
    peak_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 7e-4,
    bank_size: Annotated[int, typer.Option(help="Pictures kept as latents; a multiple of 32.")] = 1024,
    layout_from: Annotated[int, typer.Option(help="First step that trains the layout alone.")] = LAYOUT_STEPS.start,
    layout_to: Annotated[int, typer.Option(help="First step after those.")] = LAYOUT_STEPS.stop,
    workers: Annotated[int, typer.Option(help="Threads that share a batch; 1 on a GPU.")] = 2,
    device: Device = "cpu",
) -> None:
    """Train the denoiser and the text encoder together on the finished autoencoder's latents."""
    layout = range(layout_from, layout_to)
    training = DenoiserTraining(finished_autoencoder(folder, device), device, workers, peak_rate, layout)
    checkpoint = Checkpoint(folder / "unet", training.modules, training.optimiser)
    first = checkpoint.load()
    bank = LatentBank(training.vae, training.tokenizer, device, bank_size, fresh=1)
    bank.fill(first)

    def rate(step: int) -> float:
        return peak_rate * min(1.0, (step + 1) / 200, (steps - step) / cooldown)

    take_steps(training, checkpoint, range(first, steps), batch, rate, lambda step: bank)


def take_steps(
    training: DenoiserTraining,
    checkpoint: Checkpoint,
    steps: range,
    batch: int,
    rate: Callable[[int], float],
    bank: Callable[[int], LatentBank],
) -> None:
    """Train the denoiser for some steps, each at its rate and on its bank, and log and save what comes of it."""
    recent = 1.0
    progress = tqdm(steps, initial=steps.start, total=steps.stop, desc="denoiser", mininterval=5.0)
    with (checkpoint.folder.parent / "unet_log.txt").open("a") as log:
        for step in progress:
            pictures = bank(step)
            error = training.step(pictures, step, batch, rate(step))
            pictures.add(pictures.fresh)
            recent += max(0.01, 1.0 / (step - steps.start + 1)) * (error - recent)
            if step % 50 == 0:
                progress.set_postfix_str(f"loss {recent:.4f}")
                log.write(f"{time.strftime('%H:%M:%S')} {step} {recent:.4f}\n")
                log.flush()
            if (step + 1) % 250 == 0 or step + 1 == steps.stop:
                checkpoint.save(step + 1)


@application.command()
def enlarge(
    folder: Folder,
    start: Annotated[Path, typer.Option(help="Folder of the pipeline to start from.")] = WEIGHTS,
    size: Annotated[int, typer.Option(help="Width and height of the larger pictures in pixels.")] = LARGE_SIZE,
    steps: Annotated[int, typer.Option(help="Number of optimiser steps.")] = ENLARGE_STEPS,
    cooldown: Annotated[int, typer.Option(help="Last steps, with a falling learning rate.")] = ENLARGE_COOLDOWN_STEPS,
    batch: Annotated[int, typer.Option(help="Pictures in a step.")] = 16,
    peak_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 5e-4,
    bank_size: Annotated[int, typer.Option(help="Pictures kept as latents; a multiple of 32.")] = 512,
    workers: Annotated[int, typer.Option(help="Threads that share a batch; 1 on a GPU.")] = 2,
    device: Device = "cpu",
) -> None:
    """Teach a trained denoiser and text encoder larger pictures; every fourth step keeps them used to small ones.

    The autoencoder stays as it is: ``export --autoencoder`` takes it from where the training started.
    """
    if size <= SIZE or size % SIZE:
        raise typer.BadParameter(f"expected a multiple of {SIZE} above it, got {size}", param_hint="--size")
    folder.mkdir(parents=True, exist_ok=True)
    pipeline = load_pipeline(weights=start)
    vae = pipeline.vae.to(device=device, memory_format=torch.channels_last).eval().requires_grad_(False)
    training = DenoiserTraining(vae, device, workers, peak_rate, range(0), NOISY_SHARE, pipeline)
    checkpoint = Checkpoint(folder / "unet", training.modules, training.optimiser)
    first = checkpoint.load()
    banks = {
        side: LatentBank(vae, training.tokenizer, device, bank_size, fresh=1, picture_size=side)
        for side in (SIZE, size)
    }
    on_small = -(-first // SMALL_EVERY)
    banks[SIZE].fill(on_small)
    banks[size].fill(first - on_small)

    def rate(step: int) -> float:
        return peak_rate * min(1.0, (step + 1) / 100, (steps - step) / cooldown)

    take_steps(
        training,
        checkpoint,
        range(first, steps),
        batch,
        rate,
        lambda step: banks[SIZE if step % SMALL_EVERY == 0 else size],
    )


@application.command()
def export(
    folder: Folder,
    weights: Weights = WEIGHTS,
    autoencoder: Annotated[
        Path | None,
        typer.Option(help="Folder of a pipeline whose autoencoder is kept; else the own one."),
    ] = None,
) -> None:
    """Write the averaged weights as a pipeline of 16-bit safetensors, in the layout of diffusers.

    The new folder is written beside the old one and then takes its place.
    """
    state = load_file(folder / "unet" / STATE_FILE)
    vae = finished_autoencoder(folder, "cpu") if autoencoder is None else load_pipeline(weights=autoencoder).vae
    denoiser, text_encoder = new_unet(), new_text_encoder()
    denoiser.load_state_dict(with_prefix(state, "average_unet/"))
    text_encoder.load_state_dict(with_prefix(state, "average_text_encoder/"))
    components: dict[str, Any] = {
        "vae": vae.to(memory_format=torch.contiguous_format),
        "text_encoder": text_encoder,
        "tokenizer": new_tokenizer(),
        "unet": denoiser,
        "scheduler": new_scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
    }
    for name in ("vae", "text_encoder", "unet"):
        components[name].half()
    pipeline = StableDiffusionPipeline(**components, requires_safety_checker=False)
    partial, previous = weights.with_name(weights.name + ".new"), weights.with_name(weights.name + ".old")
    for leftover in (partial, previous):
        if leftover.exists():
            shutil.rmtree(leftover)
    pipeline.save_pretrained(partial, safe_serialization=True)
    # Releases of transformers differ in what they call this class; all of them read it under this name.
    configuration = partial / "tokenizer" / "tokenizer_config.json"
    fields = {**json.loads(configuration.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}
    configuration.write_text(json.dumps(fields, indent=2) + "\n")
    index = partial / "model_index.json"
    fields = {**json.loads(index.read_text()), "tokenizer": ["transformers", "PreTrainedTokenizerFast"]}
    index.write_text(json.dumps(fields, indent=2) + "\n")
    for path in partial.rglob("*.safetensors"):
        path.chmod(0o644)
    if weights.exists():
        weights.rename(previous)
    partial.rename(weights)
    if previous.exists():
        shutil.rmtree(previous)
    size = sum(path.stat().st_size for path in weights.rglob("*") if path.is_file())
    typer.echo(f"{weights}: {size / 1e6:.1f} MB")


@application.command()
def evaluate(
    folder: Annotated[Path, typer.Option(help="Folder for the scores and the pictures.")],
    weights: Weights = WEIGHTS,
    count: Annotated[int, typer.Option(help="How many of the 200 held-back captions.")] = 200,
    batch: Annotated[int, typer.Option(help="Pictures sampled together.")] = 20,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 28,
    guidance: Annotated[float, typer.Option(help="Strength of classifier-free guidance.")] = 4.0,
    rescale: Annotated[float, typer.Option(help="Rescaling of the guided prediction, 0 to 1.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the first picture.")] = 0,
    size: Annotated[int, typer.Option(help="Width and height of the pictures in pixels.")] = SIZE,
) -> None:
    """Let the checker judge the model on unseen captions, and the autoencoder on drawn pictures."""
    pipeline = load_pipeline(weights=weights)
    scenes = held_back_scenes()[:count]
    pictures: list[np.ndarray] = []
    for start in tqdm(range(0, len(scenes), batch), desc="held-back captions"):
        part = scenes[start : start + batch]
        generators = [torch.Generator().manual_seed(seed + start + number) for number in range(len(part))]
        result = pipeline(
            [caption(scene) for scene in part],
            num_inference_steps=steps,
            guidance_scale=guidance,
            guidance_rescale=rescale,
            height=size,
            width=size,
            generator=generators,
            output_type="np",
        )
        pictures.extend((image * 255).round().astype(np.uint8) for image in result.images)
    scores = score(pictures, scenes)
    drawn_scenes = random.Random(seed).sample(all_scenes(), 100)
    drawn = [render(scene, 1000 + number, size) for number, scene in enumerate(drawn_scenes)]
    with torch.no_grad():
        parts = [pipeline.vae(part, sample_posterior=False).sample for part in to_tensor(drawn).split(10)]
    round_trips = list(to_pictures(torch.cat(parts)))
    report = {
        "held_back_captions": scores,
        "drawn_pictures": score(drawn, drawn_scenes),
        "autoencoder_round_trips": score(round_trips, drawn_scenes),
        "sampling": {"steps": steps, "guidance": guidance, "rescale": rescale, "seed": seed, "size": size},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scores.json").write_text(json.dumps(report, indent=2) + "\n")
    columns = 10
    blank = np.zeros_like(pictures[0])
    cells = pictures + [blank] * (-len(pictures) % columns)
    rows = [np.concatenate(cells[at : at + columns], axis=1) for at in range(0, len(cells), columns)]
    Image.fromarray(np.concatenate(rows, axis=0)).save(folder / "held_back.png")
    typer.echo(json.dumps(report, indent=2))


def score(pictures: list[np.ndarray], scenes: list[Scene]) -> dict[str, float]:
    """The share of pictures that show their scene: in every attribute together, and in each one."""
    verdicts = [check(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    shares: dict[str, float] = {name: sum(verdict[name] for verdict in verdicts) / len(verdicts) for name in ATTRIBUTES}
    every = sum(all(verdict.values()) for verdict in verdicts) / len(verdicts)
    return {"pictures": len(verdicts), "all_attributes": every, **shares}


@application.command(name="all")
def everything(folder: Folder, weights: Weights = WEIGHTS, device: Device = "cpu") -> None:
    """Run the four stages one after another with their standard settings."""
    vae(folder, device=device)
    unet(folder, device=device)
    export(folder, weights)
    evaluate(folder, weights)


if __name__ == "__main__":
    application()
