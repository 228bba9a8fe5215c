"""Networks of diffusers with the architecture of the published models and tiny widths, behind positional inputs."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from support.networks import Network

TEXT = 7
PROMPT = 20
SIZE = (22, 18)  # then 11x9 and 6x5


class Conditioned(nn.Module):
    """``UNet2DConditionModel`` with the extra inputs of its family as positional tensors."""

    def __init__(self, network: Any, extra: str = "") -> None:
        super().__init__()
        self.network, self.extra = network, extra

    def forward(self, x: Tensor, timestep: Tensor, prompt: Tensor, *extra: Tensor) -> Tensor:
        options: dict[str, Any] = {}
        if self.extra == "sdxl":
            options["added_cond_kwargs"] = {"text_embeds": extra[0], "time_ids": extra[1]}
        elif self.extra == "controlnet":
            options["down_block_additional_residuals"] = extra[:-1]
            options["mid_block_additional_residual"] = extra[-1]
        return self.network(x, timestep, encoder_hidden_states=prompt, **options).sample


class Controlled(nn.Module):
    """A ControlNet on its own: two maps in, residuals of every level out."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, timestep: Tensor, prompt: Tensor, picture: Tensor) -> tuple[Tensor, ...]:
        down, middle = self.network(x, timestep, prompt, picture, return_dict=False)
        return (*down, middle)


class Unconditioned(nn.Module):
    """``UNet2DModel``."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.network(x, timestep).sample


class Decoder(nn.Module):
    """The decoder of an autoencoder."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, latents: Tensor) -> Tensor:
        return self.network.decode(latents).sample


class Encoder(nn.Module):
    """The encoder of an autoencoder: the mean of its distribution."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, picture: Tensor) -> Tensor:
        return self.network.encode(picture).latent_dist.mean


def unet(extra: str = "", **options: Any) -> Conditioned:
    """A conditional U-Net of two levels."""
    settings: dict[str, Any] = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": PROMPT,
        "attention_head_dim": 2,
    }
    return Conditioned(UNet2DConditionModel(**{**settings, **options}), extra)


def unet_xl() -> Conditioned:
    """The SDXL way: deeper transformers, linear projections, added text and size conditions."""
    return unet(
        "sdxl",
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=14 + 6 * 4,
    )


def controlnet() -> Controlled:
    """A ControlNet whose zero convolutions are not zero, as after training."""
    network: Any = ControlNetModel(
        in_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=PROMPT,
        attention_head_dim=2,
        conditioning_embedding_out_channels=(6, 12),
    )
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return Controlled(network)


def autoencoder() -> AutoencoderKL:
    """An autoencoder of two levels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )


def ddpm() -> Unconditioned:
    """The unconditional U-Net of DDPM, with self-attention and asymmetric padding."""
    return Unconditioned(
        UNet2DModel(
            sample_size=16,
            in_channels=3,
            out_channels=3,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
        )
    )


LATENTS = (2, 4, *SIZE)
COMMON: tuple[tuple[int, ...], ...] = (LATENTS, (), (2, TEXT, PROMPT))
COARSE = (2, 16, 11, 9)
RESIDUALS = ((2, 8, *SIZE), (2, 8, *SIZE), (2, 8, 11, 9), COARSE, COARSE)

DIFFUSERS = [
    Network("sd15", unet, COMMON, fixed=(1,)),
    Network("sd21", lambda: unet(attention_head_dim=(2, 4), use_linear_projection=True), COMMON, fixed=(1,)),
    Network("sdxl", unet_xl, (*COMMON, (2, 14), (2, 6)), fixed=(1,)),
    Network(
        "sd15 with residuals",
        lambda: unet("controlnet"),
        (*COMMON, *RESIDUALS),
        spatial=(0, 3, 4, 5, 6, 7),
        fixed=(1,),
    ),
    Network("controlnet", controlnet, (*COMMON, (2, 3, 44, 36)), spatial=(0, 3), fixed=(1,)),
    Network("ddpm", ddpm, ((2, 3, *SIZE), ()), fixed=(1,)),
    Network("decoder", lambda: Decoder(autoencoder()), ((1, 4, 11, 7),)),
    Network("encoder", lambda: Encoder(autoencoder()), ((1, 3, 22, 18),)),
]
