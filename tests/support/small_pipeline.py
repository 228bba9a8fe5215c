"""A pipeline of the least that an edit session asks for: networks of a few convolutions, compiled in no time."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torch.nn import functional

HEIGHT, WIDTH = 14, 22
"""Of a picture in pixels; a latent cell has two in each direction."""


class Plain:
    """What a block does between its convolutions, where PyTorch can trace it."""

    def __call__(self, x: Tensor) -> Tensor:
        return functional.silu(x)


@torch.compiler.disable
def _hidden(x: Tensor) -> Tensor:
    return functional.silu(x)


class Breaking:
    """The same where it cannot, as a processor in compiled code."""

    def __call__(self, x: Tensor) -> Tensor:
        return _hidden(x)


class Block(nn.Module):
    """A convolution on each side of what is exchanged."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.before = nn.Conv2d(channels, 5, 3, padding=1)
        self.after = nn.Conv2d(5, channels, 3, padding=1)
        self.processor: Any = Plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.processor(self.before(x)))


class Network(nn.Module):
    """A denoiser with two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(4), Block(4)

    def forward(self, sample: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        x = self.first(sample + prompt.mean(dim=(1, 2))[:, None, None, None])
        return self.second(x) * torch.cos(timestep / 1000)


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator as diffusers has one: one code for the forwards of all its models."""

    @wraps(function)
    def wrapper(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        return function(self, *arguments, **named)

    return wrapper


class DecoratedNetwork(Network):
    forward = decorated(Network.forward)  # type: ignore[assignment]


class OtherDecoratedNetwork(Network):
    @decorated
    def forward(self, sample: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        return self.second(self.first(sample)) + prompt.mean() - timestep / 1000


class Autoencoder(nn.Module):
    """Pixels are cells, four times each."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 3, 3, padding=1))

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents)


class SmallPipeline:
    """A loop over a scheduler's timesteps, and a callback in it."""

    def __init__(self, network: nn.Module | None = None) -> None:
        torch.manual_seed(0)
        self.unet = (Network() if network is None else network).eval().requires_grad_(False)
        self.vae = Autoencoder().eval().requires_grad_(False)
        self.scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str = "",
        height: int = HEIGHT,
        width: int = WIDTH,
        num_inference_steps: int = 2,
        generator: torch.Generator | None = None,
        output_type: str = "pt",
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> Any:
        words = torch.tensor([[[float(ord(letter)) / 128 for letter in prompt.ljust(8)[:8]]]])
        latents = torch.randn(1, 4, height // 2, width // 2, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for number, timestep in enumerate(self.scheduler.timesteps):
            noise = self.unet(latents, timestep, prompt=words)
            latents = self.scheduler.step(noise, timestep, latents).prev_sample
            if callback_on_step_end is not None:
                latents = callback_on_step_end(self, number, timestep, {"latents": latents}).pop("latents")
        return SimpleNamespace(images=self.vae.decode(latents).sigmoid(), nsfw_content_detected=None)
