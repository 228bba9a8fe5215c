"""Train the scenes model from nothing: autoencoder, then denoiser with text encoder, then export and evaluation.

Every picture is drawn on the fly by the project's own renderer, so there is no data set.  Each stage writes
checkpoints from which it carries on after an interruption.
"""

from __future__ import annotations

import math
import random
import time
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from fisedit_compile.scenes.models import (
    CAPTION_TOKENS,
    LATENT_CHANNELS,
    LATENT_SIZE,
    new_autoencoder,
    new_scheduler,
    new_text_encoder,
    new_tokenizer,
    new_unet,
)
from fisedit_compile.scenes.render import SIZE, render
from fisedit_compile.scenes.world import Scene, caption, training_scenes

application = typer.Typer(help=__doc__, no_args_is_help=True)

Folder = Annotated[Path, typer.Option(help="Folder of the checkpoints.")]
Device = Annotated[str, typer.Option(help="Device to train on: cpu or cuda.")]


@dataclass
class Checkpoint:
    """The state of a training run, kept as two safetensors files: weights, and the optimiser's moments."""

    folder: Path
    modules: dict[str, nn.Module]
    optimiser: torch.optim.Optimizer

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimiser.param_groups for parameter in group["params"]]

    def save(self, step: int) -> None:
        """Write the state after ``step`` finished steps; an interruption leaves the previous state whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{name}/{key}": value.detach().contiguous().clone()
            for name, module in self.modules.items()
            for key, value in module.state_dict().items()
        }
        for number, parameter in enumerate(self._parameters()):
            for key, value in self.optimiser.state[parameter].items():
                tensors[f"optimiser/{number}/{key}"] = torch.as_tensor(value).contiguous().clone()
        partial = self.folder / "state.partial"
        save_file(tensors, partial, metadata={"step": str(step)})
        partial.replace(self.folder / "state.safetensors")

    def load(self) -> int:
        """Restore the state, if there is one, and return how many steps it has behind it."""
        path = self.folder / "state.safetensors"
        if not path.exists():
            return 0
        tensors = load_file(path)
        for name, module in self.modules.items():
            prefix = f"{name}/"
            module.load_state_dict(
                {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            )
        for number, parameter in enumerate(self._parameters()):
            prefix = f"optimiser/{number}/"
            self.optimiser.state[parameter] = {
                key.removeprefix(prefix): value.to(parameter.device) if key.endswith(("avg", "sq")) else value
                for key, value in tensors.items()
                if key.startswith(prefix)
            }
        with safe_open(path, framework="pt") as file:
            return int(file.metadata()["step"])


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """A linear warm-up to ``peak``, then half a cosine down to nothing at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the same learning rate."""
    for group in optimiser.param_groups:
        group["lr"] = rate


def bare(scene: Scene) -> Scene:
    """The scene without its object and its fireworks."""
    return replace(scene, object_kind="nothing", fireworks=False)


def to_tensor(pictures: list[np.ndarray]) -> Tensor:
    """Pictures as a float tensor ``[N, 3, height, width]`` with values from -1 to 1."""
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return stacked.float().div_(127.5).sub_(1.0).contiguous(memory_format=torch.channels_last)


def crops(batch: int, side: int, step: int) -> tuple[Tensor, Tensor]:
    """Draw random crops of random pictures.

    Half of the crops are centred on a pixel of the object or the fireworks.

    Returns:
        The crops ``[N, 3, side, side]`` from -1 to 1, and ``[N, 1, side, side]``: 1 on object and fireworks.
    """
    generator = random.Random(f"autoencoder {step}")
    scenes = training_scenes_cached()
    pictures, masks = [], []
    for _ in range(batch):
        scene, seed = generator.choice(scenes), generator.randrange(2**31)
        picture = render(scene, seed)
        mask = (picture != render(bare(scene), seed)).any(axis=2)
        top, left = (generator.randrange(SIZE - side + 1) for _ in range(2))
        rows, columns = np.nonzero(mask)
        if len(rows) and generator.random() < 0.5:
            pixel = generator.randrange(len(rows))
            top = min(max(int(rows[pixel]) - side // 2, 0), SIZE - side)
            left = min(max(int(columns[pixel]) - side // 2, 0), SIZE - side)
        window = slice(top, top + side), slice(left, left + side)
        pictures.append(picture[window])
        masks.append(mask[window])
    return to_tensor(pictures), torch.from_numpy(np.stack(masks)).unsqueeze(1).float()


def start_with_little_noise(model: AutoencoderKL) -> None:
    """Start the latents' noise at a small spread; at the usual spread of 1 the decoder learns to ignore them."""
    with torch.no_grad():
        model.quant_conv.weight[LATENT_CHANNELS:].mul_(0.1)
        model.quant_conv.bias[LATENT_CHANNELS:].fill_(-7.0)


_TRAINING_SCENES: list[Scene] = []


def training_scenes_cached() -> list[Scene]:
    """The training scenes, listed once."""
    if not _TRAINING_SCENES:
        _TRAINING_SCENES.extend(training_scenes())
    return _TRAINING_SCENES


@application.command()
def vae(
    folder: Folder,
    steps: Annotated[int, typer.Option(help="Number of optimiser steps.")] = 2000,
    batch: Annotated[int, typer.Option(help="Crops in a step.")] = 8,
    side: Annotated[int, typer.Option(help="Width and height of a crop in pixels.")] = 64,
    peak_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-3,
    device: Device = "cpu",
) -> None:
    """Train the autoencoder.

    The loss is the mean absolute and squared error, counted several times on the pixels of the object and of the
    fireworks: they are few, and their colour is what the captions are about.  The noise on the latents and the
    pull towards a normal distribution come in over the first 1000 steps; from the start, they would win.
    """
    torch.manual_seed(1)
    model = new_autoencoder().to(device=device, memory_format=torch.channels_last)
    start_with_little_noise(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=peak_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    checkpoint = Checkpoint(folder / "vae", {"vae": model}, optimiser)
    first = checkpoint.load()

    def loss_of(pictures: Tensor, mask: Tensor, noise: Tensor, ramp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(device, torch.bfloat16):
            posterior = model.encode(pictures).latent_dist
            decoded = model.decode(posterior.mean + posterior.std * noise * ramp).sample
        difference = decoded.float() - pictures
        weight = 1.0 + 4.0 * mask
        error = (weight * (difference.abs() * 0.5 + difference.square())).mean()
        spread = (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).float().mean() * 0.5
        return error + 1e-5 * ramp * spread, difference.square().mean(), posterior.mean.float().std()

    progress = tqdm(range(first, steps), initial=first, total=steps, desc="autoencoder", mininterval=5.0)
    for step in progress:
        set_learning_rate(optimiser, learning_rate(step, steps, peak_rate, 100))
        pictures, mask = crops(batch, side, step)
        noise = torch.randn(
            (batch, 4, side // 4, side // 4), generator=torch.Generator().manual_seed(1_000_000 + step)
        )
        ramp = torch.tensor(min(1.0, step / 1000))
        inputs = (tensor.to(device) for tensor in (pictures, mask, noise, ramp))
        loss, squared, spread = loss_of(*inputs)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if step % 50 == 0:
            decibel = -10.0 * math.log10(squared.item() / 4.0)
            progress.set_postfix_str(f"loss {loss.item():.4f}, {decibel:.1f} dB, latents {spread.item():.2f}")
        if (step + 1) % 500 == 0 or step + 1 == steps:
            checkpoint.save(step + 1)


@dataclass
class LatentBank:
    """A window over an endless, fixed sequence of pictures, kept as latents and token numbers.

    Encoding a picture costs more than a share of a training step, so every picture is used for several steps: each
    step drops the oldest few and adds as many new ones.
    """

    vae: AutoencoderKL
    tokenizer: PreTrainedTokenizerFast
    device: str
    size: int
    fresh: int
    latents: Tensor = field(init=False)
    tokens: Tensor = field(init=False)
    regions: Tensor = field(init=False)
    end: int = field(init=False, default=0)

    def fill(self, step: int) -> None:
        """Bring the window to where it stands after ``step`` steps."""
        self.latents = torch.zeros(self.size, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
        self.tokens = torch.zeros(self.size, CAPTION_TOKENS, dtype=torch.long)
        self.regions = torch.zeros(self.size, 1, LATENT_SIZE, LATENT_SIZE)
        self.end = self.fresh * step
        for _ in tqdm(range(0, self.size, 32), desc="latents", mininterval=5.0):
            self.add(32)

    def add(self, count: int) -> None:
        """Draw, encode and keep the next ``count`` pictures in place of the oldest ones."""
        scenes = training_scenes_cached()
        chosen = []
        for number in range(self.end, self.end + count):
            generator = random.Random(f"picture {number}")
            chosen.append((generator.choice(scenes), generator.randrange(2**31)))
        pictures = to_tensor([render(scene, seed) for scene, seed in chosen]).to(self.device)
        with torch.no_grad(), torch.autocast(self.device, torch.bfloat16):
            latents = self.vae.encode(pictures).latent_dist.mean
        places = torch.arange(self.end, self.end + count) % self.size
        self.latents[places] = latents.float().cpu() * self.vae.config.scaling_factor
        self.tokens[places] = tokens_of(self.tokenizer, [caption(scene) for scene, _ in chosen])
        self.regions[places] = torch.stack([region_weight(scene) for scene, _ in chosen])
        self.end += count


def tokens_of(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> Tensor:
    """The captions' token numbers ``[N, 24]``."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def region_weight(scene: Scene) -> Tensor:
    """How much each latent counts in the loss, ``[1, 32, 32]``.

    It counts more where the caption says that something stands.  The weight depends on the caption alone, not on
    the picture, so it does not bias what the denoiser learns to expect.
    """
    weight = torch.ones(1, LATENT_SIZE, LATENT_SIZE)
    if scene.fireworks:
        weight[:, 1:12] = 1.5
    if not scene.is_empty:
        left = {"left": 0, "middle": 9, "right": 18}[scene.place]
        weight[:, 15:28, left : left + 14] = 3.0
    return weight


def set_latent_scale(vae: AutoencoderKL, device: str) -> None:
    """Measure the latents' spread over 256 pictures and set the scaling factor that makes it 1."""
    scenes = training_scenes_cached()
    generator = random.Random("latent scale")
    pictures = [render(generator.choice(scenes), seed) for seed in range(256)]
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in to_tensor(pictures).to(device).split(32)])
    vae.register_to_config(scaling_factor=round(1.0 / latents.std().item(), 5))


def finished_autoencoder(folder: Path, device: str) -> AutoencoderKL:
    """The trained autoencoder, with its latent scale in its configuration.

    Raises:
        typer.BadParameter: the autoencoder has not been trained yet.
    """
    path = folder / "vae" / "state.safetensors"
    if not path.exists():
        raise typer.BadParameter(f"{path} is missing: train the autoencoder first")
    vae = new_autoencoder()
    weights = {key: value for key, value in load_file(path).items() if key.startswith("vae/")}
    vae.load_state_dict({key.removeprefix("vae/"): value for key, value in weights.items()})
    vae = vae.to(device=device, memory_format=torch.channels_last).eval().requires_grad_(False)
    set_latent_scale(vae, device)
    return vae


@dataclass
class DenoiserTraining:
    """The denoiser and the text encoder, their running averages, and one step of their training."""

    vae: AutoencoderKL
    device: str
    workers: int
    peak_rate: float

    def __post_init__(self) -> None:
        torch.manual_seed(2)
        self.denoiser = new_unet().to(self.device)
        # On a processor the plain attention trains faster than the fused one, whose backward pass is slow.
        self.denoiser.set_attn_processor(AttnProcessor())
        self.text_encoder = new_text_encoder().to(self.device)
        self.parameters = [*self.denoiser.parameters(), *self.text_encoder.parameters()]
        average_denoiser, average_text_encoder = deepcopy(self.denoiser), deepcopy(self.text_encoder)
        self.averages = [*average_denoiser.parameters(), *average_text_encoder.parameters()]
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=self.peak_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.modules: dict[str, nn.Module] = {
            "unet": self.denoiser,
            "text_encoder": self.text_encoder,
            "average_unet": average_denoiser,
            "average_text_encoder": average_text_encoder,
        }
        self.tokenizer = new_tokenizer()
        self.no_caption = tokens_of(self.tokenizer, [""])
        self.signal_share = new_scheduler().alphas_cumprod.to(torch.float32)
        # One thread for each share of the batch: they meet once a step, not at the end of every operation.
        self.pool = ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,))

    def step(self, bank: LatentBank, step: int, batch: int, rate: float) -> float:
        """Take one optimiser step and return the unweighted mean squared error of the velocity."""
        generator = torch.Generator().manual_seed(2_000_000 + step)
        chosen = torch.randint(bank.size, (batch,), generator=generator)
        latents, tokens, weight = bank.latents[chosen], bank.tokens[chosen], bank.regions[chosen]
        dropped = torch.rand(batch, generator=generator) < 0.1
        tokens = torch.where(dropped[:, None], self.no_caption, tokens)
        weight = torch.where(dropped[:, None, None, None], torch.tensor(1.5), weight)
        # Stratified over the batch, and denser towards the noisy steps, where it is decided what stands where.
        position = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        timesteps = (1000 * position**0.6).long().clamp(max=999)
        noise = torch.randn(latents.shape, generator=generator)
        signal = self.signal_share[timesteps].sqrt()[:, None, None, None]
        noise_level = (1.0 - self.signal_share[timesteps]).sqrt()[:, None, None, None]
        noisy, target = signal * latents + noise_level * noise, signal * noise - noise_level * latents

        def share_of_loss(worker: int) -> float:
            share = slice(worker, None, self.workers)
            with torch.autocast(self.device, torch.bfloat16):
                states = self.text_encoder(tokens[share].to(self.device)).last_hidden_state
                velocity = self.denoiser(
                    noisy[share].to(self.device), timesteps[share].to(self.device), states, return_dict=False
                )[0]
            error = (velocity.float() - target[share].to(self.device)).square()
            loss = (error * weight[share].to(self.device)).mean() / self.workers
            loss.backward()
            return error.mean().item() / self.workers

        error = sum(self.pool.map(share_of_loss, range(self.workers)))
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        set_learning_rate(self.optimiser, rate)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        decay = min(0.998, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.parameters, 1.0 - decay)
        return error


@application.command()
def unet(
    folder: Folder,
    steps: Annotated[int, typer.Option(help="Number of optimiser steps.")] = 6000,
    cooldown: Annotated[int, typer.Option(help="Last steps, over which the learning rate falls to 0.")] = 1500,
    batch: Annotated[int, typer.Option(help="Pictures in a step.")] = 16,
    peak_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 7e-4,
    bank_size: Annotated[int, typer.Option(help="Pictures kept as latents; a multiple of 32.")] = 4096,
    workers: Annotated[int, typer.Option(help="Threads that share a batch; 1 on a GPU.")] = 2,
    device: Device = "cpu",
) -> None:
    """Train the denoiser and the text encoder together on the finished autoencoder's latents."""
    training = DenoiserTraining(finished_autoencoder(folder, device), device, workers, peak_rate)
    checkpoint = Checkpoint(folder / "unet", training.modules, training.optimiser)
    first = checkpoint.load()
    bank = LatentBank(training.vae, training.tokenizer, device, bank_size, fresh=1)
    bank.fill(first)
    recent = 1.0
    progress = tqdm(range(first, steps), initial=first, total=steps, desc="denoiser", mininterval=5.0)
    with (folder / "unet_log.txt").open("a") as log:
        for step in progress:
            rate = peak_rate * min(1.0, (step + 1) / 200, (steps - step) / cooldown)
            error = training.step(bank, step, batch, rate)
            bank.add(bank.fresh)
            recent += max(0.01, 1.0 / (step - first + 1)) * (error - recent)
            if step % 50 == 0:
                progress.set_postfix_str(f"loss {recent:.4f}")
                log.write(f"{time.strftime('%H:%M:%S')} {step} {recent:.4f}\n")
                log.flush()
            if (step + 1) % 250 == 0 or step + 1 == steps:
                checkpoint.save(step + 1)


if __name__ == "__main__":
    application()
