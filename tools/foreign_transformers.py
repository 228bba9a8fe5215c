"""Networks of diffusers and transformers, small and with random weights. For ``try_networks.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from foreign_networks import EVEN, ODD, Foreign, Method, Named, made, timestep


def prompt(width: int, length: int = 5) -> Callable[[], tuple[Tensor, ...]]:
    """A timestep and the states of a prompt."""
    return lambda: (*timestep(), torch.randn(1, length, width, generator=torch.Generator().manual_seed(1)))


def diffusers() -> list[Foreign]:
    """U-Nets, transformers and autoencoders."""
    blocks: dict[str, Any] = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
    downs = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    crossed = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 16}
    crossed |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 8}
    coded: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    kl = coded | blocks | {"latent_channels": 4}
    heads: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
    dit: dict[str, Any] = heads | {"sample_size": 16, "patch_size": 2, "in_channels": 4}
    made_of: dict[str, Callable[[], nn.Module]] = {
        "UNet2DModel": made("diffusers.UNet2DModel", **blocks, **downs),
        "UNet2DConditionModel": made("diffusers.UNet2DConditionModel", in_channels=3, **blocks, **crossed),
        "UNet2DConditionModel linear": made(
            "diffusers.UNet2DConditionModel", in_channels=3, use_linear_projection=True, **blocks, **crossed
        ),
        "AutoencoderKL": made("diffusers.AutoencoderKL", **kl),
        "AutoencoderTiny": made(
            "diffusers.AutoencoderTiny", encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 2), num_decoder_blocks=(2, 1),
        ),
        "AsymmetricAutoencoderKL": made(
            "diffusers.AsymmetricAutoencoderKL", down_block_out_channels=(16, 32), layers_per_down_block=1,
            up_block_out_channels=(16, 32), layers_per_up_block=1, norm_num_groups=8, **coded,
        ),
        "VQModel": made("diffusers.VQModel", **blocks, **coded, num_vq_embeddings=16, vq_embed_dim=4),
        "DiTTransformer2DModel": made(
            "diffusers.DiTTransformer2DModel", **dit, norm_num_groups=4, num_embeds_ada_norm=8
        ),
        "PixArtTransformer2DModel": made(
            "diffusers.PixArtTransformer2DModel", **dit, cross_attention_dim=16, caption_channels=16, norm_num_groups=4
        ),
        "SD3Transformer2DModel": made(
            "diffusers.SD3Transformer2DModel", **dit, joint_attention_dim=16, caption_projection_dim=16,
            pooled_projection_dim=16, pos_embed_max_size=32,
        ),
        "SanaTransformer2DModel": made(
            "diffusers.SanaTransformer2DModel", **(dit | {"patch_size": 1}), num_cross_attention_heads=2,
            cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16, out_channels=4,
        ),
        "AuraFlowTransformer2DModel": made(
            "diffusers.AuraFlowTransformer2DModel", sample_size=16, num_mmdit_layers=1, num_single_dit_layers=1,
            attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16,
            pos_embed_max_size=512,
        ),
        "AutoencoderDC": made(
            "diffusers.AutoencoderDC", latent_channels=4, attention_head_dim=8,
            encoder_block_out_channels=(16, 16), decoder_block_out_channels=(16, 16),
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        ),
    }  # fmt: skip

    def label() -> tuple[Tensor, ...]:
        return (*timestep(), torch.tensor([1]))

    def pooled() -> tuple[Tensor, ...]:
        step, states = prompt(16)()
        return step, states, torch.ones(1, 16)

    def states_and_step() -> tuple[Tensor, ...]:
        step, states = prompt(16)()
        return states, step

    def sized() -> tuple[Any, ...]:
        step, states = prompt(16)()
        return states, step, {"resolution": None, "aspect_ratio": None}

    arguments: dict[str, tuple[tuple[str, ...], Callable[[], tuple[Any, ...]], tuple[int, int], int]] = {
        "UNet2DModel": (("timestep",), timestep, (30, 42), 3),
        "UNet2DConditionModel": (("timestep", "encoder_hidden_states"), prompt(16), (30, 42), 3),
        "UNet2DConditionModel linear": (("timestep", "encoder_hidden_states"), prompt(16), (30, 42), 3),
        "DiTTransformer2DModel": (("timestep", "class_labels"), label, (32, 32), 4),
        "PixArtTransformer2DModel": (("encoder_hidden_states", "timestep", "added_cond_kwargs"), sized, (28, 36), 4),
        "SD3Transformer2DModel": (("timestep", "encoder_hidden_states", "pooled_projections"), pooled, (28, 36), 4),
        "SanaTransformer2DModel": (("encoder_hidden_states", "timestep"), states_and_step, (14, 18), 4),
        "AuraFlowTransformer2DModel": (("encoder_hidden_states", "timestep"), states_and_step, (28, 36), 4),
    }
    found = []
    for name, build in made_of.items():
        names, others, size, channels = arguments.get(name, ((), tuple, (60, 84), 3))
        found.append(Foreign("diffusers", name, named(build, names), size, channels, others))
    return found


def named(build: Callable[[], nn.Module], names: tuple[str, ...]) -> Callable[[], nn.Module]:
    """The same with its other arguments given in order."""
    return lambda: Named(build(), *names)


def transformers() -> list[Foreign]:
    """Backbones, segmentation, depth and enlargement."""
    stages: dict[str, Any] = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 32]}
    windows: dict[str, Any] = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 7}
    tokens: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    patches = tokens | {"image_size": [80, 112], "patch_size": 16}
    segments = {"hidden_sizes": [8, 16, 16, 32], "num_attention_heads": [1, 2, 2, 4], "depths": [1, 1, 1, 1]}
    many: tuple[tuple[str, str, dict[str, Any], tuple[int, int]], ...] = (
        ("ConvNext", "ConvNextModel", stages, ODD),
        ("ConvNextV2", "ConvNextV2Model", stages, ODD),
        ("ResNet", "ResNetModel", stages | {"embedding_size": 8}, ODD),
        ("RegNet", "RegNetModel", stages | {"embedding_size": 8, "groups_width": 4}, ODD),
        ("PoolFormer", "PoolFormerModel", stages, ODD),
        ("Swin", "SwinModel", windows, ODD),
        ("Swinv2", "Swinv2Model", windows, ODD),
        ("Swin2SR", "Swin2SRForImageSuperResolution", windows | {"upscale": 2, "window_size": 8}, EVEN),
        ("Segformer", "SegformerForSemanticSegmentation", segments | {"decoder_hidden_size": 16}, ODD),
        ("GLPN", "GLPNForDepthEstimation", segments | {"decoder_hidden_size": 16}, EVEN),
        ("PvtV2", "PvtV2Model", segments, EVEN),
        ("FocalNet", "FocalNetModel", {"embed_dim": 16, "depths": [1, 1]}, ODD),
        ("MobileNetV1", "MobileNetV1Model", {"depth_multiplier": 0.25}, ODD),
        ("MobileNetV2", "MobileNetV2ForSemanticSegmentation", {"depth_multiplier": 0.35}, ODD),
        ("ViT", "ViTModel", patches, (80, 112)),
        ("DeiT", "DeiTModel", patches, (80, 112)),
        ("BEiT", "BeitModel", patches | {"use_relative_position_bias": True}, (80, 112)),
        ("Dinov2", "Dinov2Model", patches | {"patch_size": 14, "image_size": 84}, (70, 98)),
        ("DINOv3", "DINOv3ViTModel", patches, (80, 112)),
        ("VitDet", "VitDetModel", tokens | {"image_size": 64, "window_size": 3, "window_block_indices": [0]}, (64, 64)),
        ("Swiftformer", "SwiftFormerModel", {"depths": [1] * 4, "embed_dims": [8, 16, 16, 32]}, EVEN),
        ("UperNet", "UperNetForSemanticSegmentation", {"hidden_size": 16, "auxiliary_channels": 8}, ODD),
        ("TextNet", "TextNetModel", {}, ODD),
        ("HGNetV2", "HGNetV2Backbone", {}, ODD),
    )  # fmt: skip
    return [Foreign("transformers", name, configured(kind, options), size) for name, kind, options, size in many]


def configured(name: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    """A network of transformers with a configuration of its own."""

    def build() -> nn.Module:
        import transformers

        network = getattr(transformers, name)
        configuration = network.config_class(**options)
        if name.startswith("UperNet"):
            configuration.backbone_config = transformers.ConvNextConfig(
                depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 16, 32], out_features=["stage1", "stage2", "stage3", "stage4"]
            )
        model: nn.Module = network(configuration)
        return Method(model, "forward")

    return build
