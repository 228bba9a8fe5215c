"""What the scenes model's training is made of: checkpoints, pictures drawn on the fly, and steps."""

from __future__ import annotations

import math
import random
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

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

STATE_FILE = "state.safetensors"
"""Name of a checkpoint's file inside the folder of its stage."""

NORMALISING_PICTURES = 256
"""How many pictures tell the mean and the spread of latents."""

_OBJECT_WEIGHT = 4.0
_SPREAD_WEIGHT = 1e-5
_NOISE_WARMUP_STEPS = 1000
_CAPTION_DROPOUT = 0.1
_AVERAGE_DECAY = 0.998


@dataclass
class Checkpoint:
    """The state of a training run, weights and the optimiser's moments, kept in one safetensors file."""

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
        partial.replace(self.folder / STATE_FILE)

    def load(self) -> int:
        """Restore the state, if there is one, and return how many steps it has behind it."""
        path = self.folder / STATE_FILE
        if not path.exists():
            return 0
        tensors = load_file(path)
        for name, module in self.modules.items():
            module.load_state_dict(with_prefix(tensors, f"{name}/"))
        for number, parameter in enumerate(self._parameters()):
            state = with_prefix(tensors, f"optimiser/{number}/")
            self.optimiser.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in state.items()
            }
        with safe_open(path, framework="pt") as file:
            return int(file.metadata()["step"])


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with ``prefix``, under the rest of their names."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the same learning rate."""
    for group in optimiser.param_groups:
        group["lr"] = rate


@lru_cache(maxsize=1)
def known_scenes() -> tuple[Scene, ...]:
    """The training scenes, listed once."""
    return tuple(training_scenes())


def to_tensor(pictures: list[NDArray[np.uint8]]) -> Tensor:
    """Pictures as a float tensor ``[N, 3, height, width]`` with values from -1 to 1."""
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return stacked.float().div_(127.5).sub_(1.0).contiguous(memory_format=torch.channels_last)


def to_pictures(tensor: Tensor) -> NDArray[np.uint8]:
    """The inverse of :func:`to_tensor`: ``uint8`` of shape ``[N, height, width, 3]``."""
    scaled = tensor.detach().float().add(1.0).mul(127.5).round().clamp(0, 255)
    pictures: NDArray[np.uint8] = scaled.byte().permute(0, 2, 3, 1).cpu().numpy()
    return pictures


def crops(batch: int, side: int, step: int, size: int = SIZE) -> tuple[Tensor, Tensor]:
    """Draw random crops of random pictures of ``size`` pixels.

    Half of the crops are centred on a pixel of the object or the fireworks.

    Returns:
        The crops ``[N, 3, side, side]`` from -1 to 1, and ``[N, 1, side, side]``: 1 on object and fireworks.
    """
    generator = random.Random(f"autoencoder {step}")
    pictures, masks = [], []
    for _ in range(batch):
        scene, seed = generator.choice(known_scenes()), generator.randrange(2**31)
        picture = render(scene, seed, size)
        bare = replace(scene, object_kind="nothing", fireworks=False)
        mask = (picture != render(bare, seed, size)).any(axis=2)
        top, left = (generator.randrange(size - side + 1) for _ in range(2))
        rows, columns = np.nonzero(mask)
        if len(rows) and generator.random() < 0.5:
            pixel = generator.randrange(len(rows))
            top = min(max(int(rows[pixel]) - side // 2, 0), size - side)
            left = min(max(int(columns[pixel]) - side // 2, 0), size - side)
        window = slice(top, top + side), slice(left, left + side)
        pictures.append(picture[window])
        masks.append(mask[window])
    return to_tensor(pictures), torch.from_numpy(np.stack(masks)).unsqueeze(1).float()


@dataclass
class AutoencoderTraining:
    """The autoencoder and one step of its training.

    The loss is the mean absolute and squared error, counted several times on the pixels of the object and of
    the fireworks: they are few, and their colour is what the captions are about.  The noise on the latents
    and the pull towards a normal distribution come in over the first 1000 steps; from the start, they would
    win.
    """

    device: str
    peak_rate: float

    def __post_init__(self) -> None:
        torch.manual_seed(1)
        self.model = new_autoencoder().to(device=self.device, memory_format=torch.channels_last)
        # At the usual spread of 1 for the latents' noise, the decoder would learn to ignore the latents.
        with torch.no_grad():
            self.model.quant_conv.weight[LATENT_CHANNELS:].mul_(0.1)
            self.model.quant_conv.bias[LATENT_CHANNELS:].fill_(-7.0)
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=self.peak_rate, betas=(0.9, 0.99), weight_decay=1e-4
        )

    def step(self, step: int, steps: int, batch: int, side: int) -> float:
        """Take one optimiser step and return the peak signal-to-noise ratio of the batch in decibels."""
        warmup = 100
        share = max(0.0, (step - warmup) / max(1, steps - warmup))
        rate = self.peak_rate * min((step + 1) / warmup, 0.5 * (1.0 + math.cos(math.pi * share)))
        set_learning_rate(self.optimiser, rate)
        pictures, mask = (tensor.to(self.device) for tensor in crops(batch, side, step))
        generator = torch.Generator().manual_seed(1_000_000 + step)
        noise = torch.randn((batch, LATENT_CHANNELS, side // 4, side // 4), generator=generator)
        ramp = min(1.0, step / _NOISE_WARMUP_STEPS)
        with torch.autocast(self.device, torch.bfloat16):
            posterior = self.model.encode(pictures).latent_dist
            decoded = self.model.decode(posterior.mean + posterior.std * noise.to(self.device) * ramp).sample
        difference = decoded.float() - pictures
        weight = 1.0 + _OBJECT_WEIGHT * mask
        error = (weight * (difference.abs() * 0.5 + difference.square())).mean()
        spread = (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).float().mean() * 0.5
        loss = error + _SPREAD_WEIGHT * ramp * spread
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return -10.0 * math.log10(difference.square().mean().item() / 4.0)


def normalise_latents(vae: Any, device: str) -> None:
    """Give each latent channel mean 0 and spread 1 over ``NORMALISING_PICTURES`` pictures.

    The shift and the scale go into the 1 by 1 convolutions on both sides of the latents, so the autoencoder's
    pictures stay as they are and the scaling factor of its configuration is 1.
    """
    generator = random.Random("latent scale")
    pictures = [render(generator.choice(known_scenes()), seed) for seed in range(NORMALISING_PICTURES)]
    parts = to_tensor(pictures).to(device).split(32)
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in parts])
        centre, spread = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
        before, after, channels = vae.quant_conv, vae.post_quant_conv, LATENT_CHANNELS
        before.bias[:channels] = (before.bias[:channels] - centre) / spread
        before.weight[:channels] /= spread[:, None, None, None]
        before.bias[channels:] -= 2.0 * spread.log()
        after.bias += (after.weight[:, :, 0, 0] * centre).sum(dim=1)
        after.weight *= spread[None, :, None, None]


def finished_autoencoder(folder: Path, device: str) -> Any:
    """The trained autoencoder of a folder of checkpoints, with normalised latents.

    Raises:
        FileNotFoundError: the autoencoder has not been trained yet.
    """
    path = folder / "vae" / STATE_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: train the autoencoder first")
    vae = new_autoencoder()
    vae.load_state_dict(with_prefix(load_file(path), "vae/"))
    vae = vae.to(device=device, memory_format=torch.channels_last).eval().requires_grad_(False)
    normalise_latents(vae, device)
    return vae


def tokens_of(tokenizer: Any, captions: list[str]) -> Tensor:
    """The captions' token numbers ``[N, 24]``."""
    tokens: Tensor = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return tokens


def region_weight(scene: Scene, side: int = LATENT_SIZE) -> Tensor:
    """How much each latent counts in the loss, ``[1, side, side]``; ``side`` is a multiple of 32.

    It counts more in the band where objects stand, wherever the scene's own one is: an object in the wrong
    place is as wrong as a missing one.  The weight depends on the caption alone, not on the picture, so it
    does not bias what the denoiser learns to expect.
    """
    weight = torch.ones(1, LATENT_SIZE, LATENT_SIZE)
    weight[:, 15:28] = 3.0
    if scene.fireworks:
        weight[:, 1:12] = 1.5
    times = side // LATENT_SIZE
    return weight.repeat_interleave(times, dim=1).repeat_interleave(times, dim=2)


@dataclass
class LatentBank:
    """A window over an endless, fixed sequence of pictures, kept as latents and token numbers.

    Encoding a picture costs a good share of a training step, so every picture is used several times: each
    step drops the oldest few and adds as many new ones.
    """

    vae: Any
    tokenizer: Any
    device: str
    size: int
    fresh: int
    picture_size: int = SIZE
    latents: Tensor = field(init=False)
    tokens: Tensor = field(init=False)
    regions: Tensor = field(init=False)
    end: int = field(init=False, default=0)

    def fill(self, step: int) -> None:
        """Bring the window to where it stands after ``step`` steps."""
        side = self.picture_size * LATENT_SIZE // SIZE
        self.latents = torch.zeros(self.size, LATENT_CHANNELS, side, side)
        self.tokens = torch.zeros(self.size, CAPTION_TOKENS, dtype=torch.long)
        self.regions = torch.zeros(self.size, 1, side, side)
        self.end = self.fresh * step
        for _ in tqdm(range(0, self.size, 32), desc="latents", mininterval=5.0):
            self.add(32)

    def add(self, count: int) -> None:
        """Draw, encode and keep the next ``count`` pictures in place of the oldest ones."""
        chosen = []
        for number in range(self.end, self.end + count):
            generator = random.Random(f"picture {number}")
            chosen.append((generator.choice(known_scenes()), generator.randrange(2**31)))
        drawn = [render(scene, seed, self.picture_size) for scene, seed in chosen]
        pictures = to_tensor(drawn).to(self.device)
        with torch.no_grad(), torch.autocast(self.device, torch.bfloat16):
            latents = self.vae.encode(pictures).latent_dist.mean
        places = torch.arange(self.end, self.end + count) % self.size
        self.latents[places] = latents.float().cpu()
        self.tokens[places] = tokens_of(self.tokenizer, [caption(scene) for scene, _ in chosen])
        self.regions[places] = torch.stack([region_weight(scene, self.latents.shape[-1]) for scene, _ in chosen])
        self.end += count


@dataclass
class DenoiserTraining:
    """The denoiser and the text encoder, their running averages, and one step of their training.

    What is hardest to learn is which word puts the object where, and only the noisiest inputs teach it: in
    all others the object can be seen already.  The layout steps train on those alone, with more weight on the
    band where objects stand.  A pipeline ``start`` gives the first weights.
    """

    vae: Any
    device: str
    workers: int
    peak_rate: float
    layout_steps: range
    noisy_share: float = 0.25
    start: Any = None

    def __post_init__(self) -> None:
        torch.manual_seed(2)
        self.denoiser = new_unet().to(self.device)
        # On a processor the plain attention trains faster than the fused one, whose backward pass is slow, as long as
        # there are few tokens: from a thousand on it is the other way around.
        self.denoiser.set_attn_processor(AttnProcessor() if self.start is None else AttnProcessor2_0())
        self.text_encoder = new_text_encoder().to(self.device)
        if self.start is not None:
            self.denoiser.load_state_dict(self.start.unet.state_dict())
            self.text_encoder.load_state_dict(self.start.text_encoder.state_dict())
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

    def timesteps(self, batch: int, generator: torch.Generator, layout: bool) -> Tensor:
        """Draw the noise levels of a batch, ``int64`` of shape ``[N]``, from 0 to 999.

        They are spread evenly over the batch, and denser towards the noisy end, where it is decided what
        stands where: one in four comes from the last 120 levels, and in the layout steps all of them from the
        last 100.
        """
        if layout:
            return (900 + 100 * (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch).long()
        noisy = round(batch * self.noisy_share)
        late = (torch.arange(noisy) + torch.rand(noisy, generator=generator)) / max(1, noisy)
        rest = batch - noisy
        position = (torch.arange(rest) + torch.rand(rest, generator=generator)) / rest
        timesteps = torch.cat([880 + 120 * late, 1000 * position**0.6]).long().clamp(max=999)
        return timesteps[torch.randperm(batch, generator=generator)]

    def step(self, bank: LatentBank, step: int, batch: int, rate: float) -> float:
        """Take one optimiser step and return the unweighted mean squared error of the velocity."""
        generator = torch.Generator().manual_seed(2_000_000 + step)
        chosen = torch.randint(bank.size, (batch,), generator=generator)
        latents, tokens, weight = bank.latents[chosen], bank.tokens[chosen], bank.regions[chosen]
        dropped = torch.rand(batch, generator=generator) < _CAPTION_DROPOUT
        tokens = torch.where(dropped[:, None], self.no_caption, tokens)
        weight = torch.where(dropped[:, None, None, None], torch.tensor(1.5), weight)
        layout = step in self.layout_steps
        if layout:
            weight = weight.square() * 0.4
        timesteps = self.timesteps(batch, generator, layout)
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
        decay = min(_AVERAGE_DECAY, (1 + step) / (10 + step))
        with torch.no_grad():
            for average, parameter in zip(self.averages, self.parameters, strict=True):
                average.lerp_(parameter, 1.0 - decay)
        return error
