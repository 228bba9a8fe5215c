"""Networks of other projects, small and with random weights: what maps a picture to maps. For ``try_networks.py``."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

ODD = (61, 83)
"""No multiple of any stride or window."""
EVEN = (64, 96)
"""For networks that need multiples of 32; no multiple of 7."""


@dataclass(frozen=True)
class Foreign:
    """A network.

    Attributes:
        source: the project.
        name: of the network.
        build: makes it.
        size: height and width of the picture.
        channels: of the picture.
        others: makes its other arguments.
        options: of the compiler.
    """

    source: str
    name: str
    build: Callable[[], nn.Module]
    size: tuple[int, int] = ODD
    channels: int = 3
    others: Callable[[], tuple[Any, ...]] = tuple
    options: dict[str, Any] = field(default_factory=dict)


class Method(nn.Module):
    """A network of which another method is called."""

    def __init__(self, network: nn.Module, method: str) -> None:
        super().__init__()
        self.network = network
        self.method = method

    def forward(self, *arguments: Any) -> Any:
        """Call it."""
        return getattr(self.network, self.method)(*arguments)


class Named(nn.Module):
    """A network whose other arguments are given by name."""

    def __init__(self, network: nn.Module, *names: str) -> None:
        super().__init__()
        self.network = network
        self.names = names

    def forward(self, picture: Tensor, *others: Any) -> Any:
        """Call it."""
        return self.network(picture, **dict(zip(self.names, others, strict=True)))


def made(path: str, *arguments: Any, **options: Any) -> Callable[[], nn.Module]:
    """Makes ``path``, a class or function, later: its project may be missing."""

    def build() -> nn.Module:
        module, name = path.rsplit(".", 1)
        network: nn.Module = getattr(importlib.import_module(module), name)(*arguments, **options)
        return network

    return build


def timestep() -> tuple[Tensor, ...]:
    """One number of a step for one sample."""
    return (torch.tensor([7]),)


def spandrel() -> list[Foreign]:
    """Restoration and enlargement."""
    small: dict[str, Any] = {"depths": (2, 2), "num_heads": (2, 2), "embed_dim": 16, "window_size": 8, "upscale": 2}
    many: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("SwinIR", "SwinIR.__arch.SwinIR.SwinIR", small | {"upsampler": "pixelshuffle"}),
        ("SwinIR 1x", "SwinIR.__arch.SwinIR.SwinIR", small | {"upscale": 1, "window_size": 7, "img_size": 63}),
        ("SwinIR direct", "SwinIR.__arch.SwinIR.SwinIR", small | {"upsampler": "pixelshuffledirect"}),
        ("SwinIR nearest", "SwinIR.__arch.SwinIR.SwinIR", small | {"upscale": 4, "upsampler": "nearest+conv"}),
        ("Swin2SR", "Swin2SR.__arch.Swin2SR.Swin2SR", small | {"upsampler": "pixelshuffle"}),
        ("HAT", "HAT.__arch.HAT.HAT", small | {"upsampler": "pixelshuffle", "squeeze_factor": 4}),
        ("DRCT", "DRCT.__arch.drct_arch.DRCT", small | {"upsampler": "pixelshuffle", "gc": 8}),
        ("ATD", "ATD.__arch.atd_arch.ATD", small | {"upsampler": "pixelshuffle", "category_size": 64}),
        ("GRL", "GRL.__arch.grl.GRL",
         {"embed_dim": 16, "depths": [2], "num_heads_window": [2], "num_heads_stripe": [2]}),
        ("DAT", "DAT.__arch.DAT.DAT", {"embed_dim": 16, "split_size": [2, 4], "depth": [2], "num_heads": [2]}),
        ("RGT", "RGT.__arch.rgt.RGT", {"embed_dim": 16, "depth": [2], "num_heads": [2]}),
        ("CRAFT", "CRAFT.__arch.CRAFT.CRAFT", {"embed_dim": 12, "depths": [2], "num_heads": [2]}),
        ("DCTLSA", "DCTLSA.__arch.dctlsa.DCTLSA", {"nf": 15}),
        ("DITN", "DITN.__arch.DITN_Real.DITN_Real", {"dim": 12, "ITL_blocks": 1, "SAL_blocks": 1, "upscale": 2}),
        ("FDAT", "FDAT.__arch.fdat.FDAT", {"embed_dim": 16, "num_groups": 1, "depth_per_group": 2, "scale": 2}),
        ("FFTformer", "FFTformer.__arch.fftformer_arch.FFTformer", {"dim": 8, "num_blocks": [1, 1, 1]}),
        ("OmniSR", "OmniSR.__arch.OmniSR.OmniSR", {"num_feat": 16, "up_scale": 2}),
        ("Uformer", "Uformer.__arch.Uformer.Uformer", {"img_size": 64, "embed_dim": 8, "depths": [1] * 9}),
        ("SCUNet", "SCUNet.__arch.SCUNet.SCUNet", {"config": [1] * 7, "dim": 64}),
        ("RetinexFormer", "RetinexFormer.__arch.retinexformer_arch.RetinexFormer", {"n_feat": 8, "stage": 1}),
        ("CIDNet", "HVICIDNet.__arch.cidnet.CIDNet", {"channels": [8, 8, 16, 32]}),
        ("KBNet_s", "KBNet.__arch.kbnet_s.KBNet_s", {"width": 32, "middle_blk_num": 1, "enc_blk_nums": [1] * 2}),
        ("KBNet_l", "KBNet.__arch.kbnet_l.KBNet_l", {"num_blocks": [1] * 4, "num_refinement_blocks": 1}),
        ("NAFNet", "NAFNet.__arch.NAFNet_arch.NAFNet", {"width": 8, "enc_blk_nums": [1] * 3, "dec_blk_nums": [1] * 3}),
        ("MixDehazeNet", "MixDehazeNet.__arch.MixDehazeNet.MixDehazeNet", {"embed_dims": [8, 16, 32, 16, 8]}),
        ("LaMa", "LaMa.__arch.LaMa.LaMa", {"in_nc": 4}),
        ("MMRealSR", "MMRealSR.__arch.mmrealsr_arch.MMRRDBNet_test", {"num_in_ch": 3, "num_out_ch": 3, "num_block": 1}),
        ("MoESR", "MoESR.__arch.MoESR.MoESR", {"dim": 16, "n_blocks": 1, "n_block": 2}),
        ("MoSR", "MoSR.__arch.mosr_arch.MoSR", {"n_block": 3, "dim": 16}),
        ("MoSR dysample", "MoSR.__arch.mosr_arch.MoSR", {"n_block": 1, "dim": 16, "upsampler": "dys"}),
        ("PLKSR", "PLKSR.__arch.PLKSR.PLKSR", {"dim": 16, "n_blocks": 3}),
        ("RealPLKSR", "PLKSR.__arch.RealPLKSR.RealPLKSR", {"dim": 16, "n_blocks": 3}),
        ("RCAN", "RCAN.__arch.rcan_arch.RCAN", {"n_resgroups": 2, "n_resblocks": 2, "n_feats": 16, "reduction": 4}),
        ("RCAN unshuffle", "RCAN.__arch.rcan_arch.RCAN",
         {"n_resgroups": 1, "n_resblocks": 2, "unshuffle_mod": True, "scale": 2}),
        ("RealCUGAN 2x", "RealCUGAN.__arch.upcunet_v3.UpCunet2x", {}),
        ("RealCUGAN 3x", "RealCUGAN.__arch.upcunet_v3.UpCunet3x", {}),
        ("RealCUGAN 4x", "RealCUGAN.__arch.upcunet_v3.UpCunet4x", {}),
        ("RealCUGAN fast", "RealCUGAN.__arch.upcunet_v3.UpCunet2x_fast", {}),
        ("SAFMN", "SAFMN.__arch.safmn.SAFMN", {"dim": 16, "n_blocks": 2}),
        ("SAFMN_BCIE", "SAFMNBCIE.__arch.safmn_bcie.SAFMN_BCIE", {"dim": 16, "n_blocks": 2, "num_layers": 2}),
        ("SPAN", "SPAN.__arch.span.SPAN", {"num_in_ch": 3, "num_out_ch": 3, "feature_channels": 16}),
        ("SeemoRe", "SeemoRe.__arch.seemore_arch.SeemoRe", {"num_layers": 2, "embedding_dim": 16, "num_experts": 3}),
        ("SwiftSRGAN", "SwiftSRGAN.__arch.SwiftSRGAN.Generator", {"num_channels": 16, "num_blocks": 3}),
        ("DRUNet", "DRUNet.__arch.network_unet.DRUNet", {"in_nc": 3, "out_nc": 3, "nc": [8, 16, 16, 32], "nb": 1}),
        ("DnCNN", "DnCNN.__arch.network_dncnn.DnCNN", {"in_nc": 3, "out_nc": 3, "nc": 16, "nb": 6}),
        ("ESRGAN", "ESRGAN.__arch.RRDB.RRDBNet", {"num_filters": 16, "num_blocks": 2}),
        ("ESRGAN unshuffle", "ESRGAN.__arch.RRDB.RRDBNet",
         {"num_filters": 16, "num_blocks": 1, "scale": 2, "shuffle_factor": 2, "in_nc": 12}),
        ("FBCNN", "FBCNN.__arch.FBCNN.FBCNN", {"in_nc": 3, "out_nc": 3, "nc": [8, 16, 16, 512], "nb": 1}),
        ("Compact", "Compact.__arch.SRVGG.SRVGGNetCompact", {"num_feat": 16, "num_conv": 4}),
    )  # fmt: skip
    even = "CRAFT FFTformer MixDehazeNet DRCT RetinexFormer CIDNet KBNet_s KBNet_l SAFMN_BCIE DRUNet".split()
    sizes = dict.fromkeys(even, EVEN) | {"Uformer": (64, 64), "RealCUGAN fast": EVEN}

    def hole() -> tuple[Tensor, ...]:
        return ((torch.rand(1, 1, *ODD, generator=torch.Generator().manual_seed(1)) > 0.8).float(),)

    return [
        Foreign(
            "spandrel",
            name,
            made(f"spandrel.architectures.{path}", **options),
            sizes.get(name, ODD),
            others=hole if name == "LaMa" else tuple,
        )
        for name, path, options in many
    ]


def torchvision() -> list[Foreign]:
    """Segmentation, and features of classifiers."""
    segmentation = "torchvision.models.segmentation."
    found = [
        Foreign("torchvision", name, made(segmentation + name, weights=None, weights_backbone=None, num_classes=5))
        for name in ("fcn_resnet50", "deeplabv3_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
    ]
    names = """
        resnet18 vgg11 mobilenet_v2 mobilenet_v3_small shufflenet_v2_x0_5 squeezenet1_1 mnasnet0_5
        regnet_y_400mf efficientnet_b0 convnext_tiny densenet121 googlenet swin_t swin_v2_t
    """
    for name in names.split():
        options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
        found.append(Foreign("torchvision", name, features(name, options)))
    return found


def features(name: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    """A classifier of torchvision without what follows its maps."""

    def build() -> nn.Module:
        from torchvision import models

        network = getattr(models, name)(weights=None, **options)
        if hasattr(network, "features"):
            found: nn.Module = network.features
            return found
        left_out = ("avgpool", "fc", "classifier", "dropout")
        return nn.Sequential(*(part for key, part in network.named_children() if key not in left_out))

    return build


def timm() -> list[Foreign]:
    """Maps of the stages of classifiers, and tokens of transformers."""
    names = """
        resnet18 resnet26d seresnet18 resnest14d skresnet18 mobilenetv3_small_050 mobilenetv4_conv_small
        efficientnet_b0 efficientnetv2_rw_t regnetx_002 regnety_002 convnext_atto convnextv2_atto
        poolformer_s12 ghostnet_050 lcnet_035 mnasnet_small tinynet_e hrnet_w18_small dla34 repvgg_a0
        edgenext_xx_small mobilevit_xxs mobilevitv2_050 pvt_v2_b0 efficientvit_b0 fastvit_t8
        inception_next_atto starnet_s1 mobileone_s0 repghostnet_050 rexnetr_200 cspresnet50 ese_vovnet19b_dw
        selecsls42 hgnetv2_b0 res2net50_14w_8s xception41 darknet17 repvit_m0_9 caformer_s18 convformer_s18
        focalnet_tiny_srf davit_tiny efficientformer_l1 efficientformerv2_s0 nextvit_small
        coatnet_pico_rw_224 maxvit_rmlp_pico_rw_256 swin_tiny_patch4_window7_224 swinv2_tiny_window8_256
        hiera_tiny_224 tiny_vit_5m_224 ghostnetv2_100 shvit_s1 mambaout_femto rdnet_tiny
    """
    options = {
        "swin_tiny_patch4_window7_224": {"img_size": ODD, "depths": (2, 2, 2)},
        "swinv2_tiny_window8_256": {"img_size": ODD, "depths": (2, 2, 2)},
        "coatnet_pico_rw_224": {"img_size": EVEN},
        "maxvit_rmlp_pico_rw_256": {"img_size": 64},
        "hiera_tiny_224": {"img_size": EVEN},
    }
    sizes = {
        "maxvit_rmlp_pico_rw_256": (64, 64),
        "tiny_vit_5m_224": (224, 224),
        "efficientformer_l1": (224, 224),
        "efficientformerv2_s0": (224, 224),
    } | dict.fromkeys(
        ("coatnet_pico_rw_224", "hiera_tiny_224", "convformer_s18", "caformer_s18", "nextvit_small",
         "hrnet_w18_small", "dla34"), EVEN)  # fmt: skip
    found = [
        Foreign("timm", name, made("timm.create_model", name, features_only=True, **options.get(name, {})),
                sizes.get(name, ODD))
        for name in names.split()
    ]  # fmt: skip
    tokens = """
        vit_tiny_patch16_224 deit_tiny_distilled_patch16_224 beit_base_patch16_224 eva02_tiny_patch14_224
        vit_small_patch14_reg4_dinov2 vit_small_patch16_dinov3 xcit_nano_12_p16_224 cait_xxs24_224
        volo_d1_224 mixer_s32_224 gmlp_ti16_224 resmlp_12_224 crossvit_tiny_240 convit_tiny visformer_tiny
        pit_ti_224 levit_128s flexivit_small naflexvit_base_patch16_gap nest_tiny gcvit_xxtiny
    """
    for name in tokens.split():
        patch = 14 if "patch14" in name else 16
        size = (5 * patch, 7 * patch)
        given: dict[str, Any] = {"img_size": size}
        if name.startswith(("vit", "deit", "beit", "eva")):
            given |= {"depth": 3}
        if name in ("volo_d1_224", "nest_tiny", "gcvit_xxtiny", "crossvit_tiny_240", "levit_128s", "mixer_s32_224",
                    "gmlp_ti16_224", "resmlp_12_224", "pit_ti_224", "visformer_tiny", "convit_tiny"):  # fmt: skip
            size, given = (224, 224), {}
        elif name in ("xcit_nano_12_p16_224", "naflexvit_base_patch16_gap"):
            given = {}
        size = (240, 240) if name == "crossvit_tiny_240" else size
        found.append(Foreign("timm", name, token_features(name, given), size))
    return found


def token_features(name: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    """What a transformer of timm gives before its head."""

    def build() -> nn.Module:
        return Method(made("timm.create_model", name, **options)(), "forward_features")

    return build


def segmentation_models() -> list[Foreign]:
    """Segmentation with encoders of all kinds."""
    pairs = (
        ("Unet", "resnet18"), ("Unet", "mobilenet_v2"), ("Unet", "efficientnet-b0"),
        ("Unet", "timm-mobilenetv3_small_minimal_100"),
        ("UnetPlusPlus", "resnet18"), ("MAnet", "resnet18"), ("Linknet", "resnet18"), ("FPN", "resnet18"),
        ("FPN", "mobilenet_v2"), ("PSPNet", "resnet18"), ("PAN", "resnet18"), ("DeepLabV3", "resnet18"),
        ("DeepLabV3Plus", "resnet18"), ("DeepLabV3Plus", "mobilenet_v2"), ("UPerNet", "resnet18"),
        ("Segformer", "mit_b0"),
        ("Segformer", "resnet18"), ("Unet", "mit_b0"), ("FPN", "mit_b0"), ("Unet", "tu-convnext_atto"),
        ("Unet", "vgg11"), ("Unet", "densenet121"), ("Unet", "mobileone_s0"),
        ("DPT", "tu-vit_tiny_patch16_224.augreg_in21k"),
    )  # fmt: skip
    found = []
    for decoder, encoder in pairs:
        options: dict[str, Any] = {"encoder_weights": None, "classes": 3, "encoder_name": encoder}
        if decoder == "DPT":
            options |= {"dynamic_img_size": True}
        build = made(f"segmentation_models_pytorch.{decoder}", **options)
        size = (128, 160) if decoder == "PAN" else EVEN
        found.append(Foreign("segmentation-models-pytorch", f"{decoder} {encoder}", build, size))
    return found


def denoising_diffusion() -> list[Foreign]:
    """U-Nets of diffusion models."""
    unet = "denoising_diffusion_pytorch.Unet"
    uvit = "denoising_diffusion_pytorch.simple_diffusion.UViT"
    karras = "denoising_diffusion_pytorch.KarrasUnet"
    source = "denoising-diffusion-pytorch"
    two: dict[str, Any] = {"dim_mults": (1, 2)}
    small: dict[str, Any] = {
        "image_size": 64,
        "dim": 16,
        "dim_max": 32,
        "num_downsamples": 2,
        "num_blocks_per_stage": 1,
    }

    def stretch() -> tuple[Tensor, ...]:
        return (torch.tensor([0.3]),)

    return [
        Foreign(source, "Unet", made(unet, 16, dim_mults=(1, 2, 2)), (60, 84), others=timestep),
        Foreign(source, "Unet learned", made(unet, 16, learned_sinusoidal_cond=True, **two), EVEN, others=timestep),
        Foreign(source, "Unet all attention", made(unet, 16, full_attn=True, **two), (44, 52), others=timestep),
        Foreign(source, "UViT", made(uvit, 16, dim_mults=(1, 2), vit_depth=2), EVEN, others=timestep),
        Foreign(source, "KarrasUnet", made(karras, channels=3, **small), (64, 64), others=stretch),
    ]  # fmt: skip


def monai() -> list[Foreign]:
    """Segmentation, registration and generation of medical pictures, in two dimensions."""
    plain: dict[str, Any] = {"spatial_dims": 2, "in_channels": 3, "out_channels": 2}
    steps: dict[str, Any] = {"channels": (8, 16, 32), "strides": (2, 2)}
    kernels: dict[str, Any] = {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]}
    groups: dict[str, Any] = {"channels": (8, 16), "attention_levels": (False, True), "norm_num_groups": 4}
    two: dict[str, Any] = {"spatial_dims": 2, "in_channels": 3, "features": (8, 8, 16, 16, 32, 8)}
    wide, four = {"img_size": EVEN, "hidden_size": 32, "mlp_dim": 64, "num_heads": 4}, (60, 84)
    many: tuple[tuple[str, str, dict[str, Any], tuple[int, int]], ...] = (
        ("UNet", "UNet", plain | steps | {"num_res_units": 1}, four),
        ("UNet batch", "UNet", plain | steps | {"norm": "BATCH"}, four),
        ("UNet groups", "UNet", plain | steps | {"norm": ("GROUP", {"num_groups": 2}), "num_res_units": 1}, four),
        ("BasicUNet", "BasicUNet", two | {"norm": "batch"}, ODD),
        ("BasicUNet instance", "BasicUNet", two, ODD),
        ("BasicUNet pixelshuffle", "BasicUNet", two | {"norm": "batch", "upsample": "pixelshuffle"}, ODD),
        ("BasicUNet nontrainable", "BasicUNet", two | {"norm": "batch", "upsample": "nontrainable"}, ODD),
        ("BasicUNetPlusPlus", "BasicUNetPlusPlus", two | {"norm": "batch"}, EVEN),
        ("AttentionUnet", "AttentionUnet", plain | steps, four),
        ("DynUNet", "DynUNet", plain | kernels | {"filters": [8, 16, 32], "norm_name": "batch"}, four),
        ("DynUNet instance", "DynUNet", plain | kernels | {"filters": [8, 16, 32]}, four),
        ("SegResNet", "SegResNet", plain | {"blocks_down": (1, 1, 1), "blocks_up": (1, 1)}, four),
        ("SegResNet batch", "SegResNet", plain | {"blocks_down": (1, 1), "blocks_up": (1,), "norm": "BATCH"}, four),
        ("SegResNet pixelshuffle", "SegResNet",
         plain | {"blocks_down": (1, 1), "blocks_up": (1,), "norm": "BATCH", "upsample_mode": "pixelshuffle"}, four),
        ("SegResNetDS", "SegResNetDS", plain | {"init_filters": 8, "blocks_down": (1, 1, 1)}, four),
        ("FlexibleUNet", "FlexibleUNet",
         {"in_channels": 3, "out_channels": 2, "backbone": "efficientnet-b0",
          "decoder_channels": (32, 16, 16, 8, 8)}, EVEN),
        ("AutoEncoder", "AutoEncoder", plain | {"channels": (8, 16, 32), "strides": (2, 2, 1), "norm": "BATCH"}, four),
        ("VQVAE", "VQVAE", plain | {"channels": (8, 16), "num_res_layers": 1, "num_res_channels": 8, "embedding_dim": 8,
         "num_embeddings": 16, "downsample_parameters": ((2, 4, 1, 1),) * 2,
         "upsample_parameters": ((2, 4, 1, 1, 0),) * 2}, four),
        ("SwinUNETR", "SwinUNETR",
         plain | {"feature_size": 12, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4), "norm_name": "batch"}, EVEN),
        ("UNETR", "UNETR", plain | wide | {"feature_size": 8, "norm_name": "batch"}, EVEN),
        ("ViTAutoEnc", "ViTAutoEnc", plain | wide | {"patch_size": 16, "num_layers": 2}, EVEN),
        ("MedNeXt", "MedNeXt",
         plain | {"init_filters": 8, "blocks_down": (1, 1), "blocks_bottleneck": 1, "blocks_up": (1, 1)}, four),
        ("HighResNet", "HighResNet", plain, ODD),
        ("Quicknat", "Quicknat", {"num_classes": 3, "num_channels": 3, "num_filters": 8}, EVEN),
        ("PatchDiscriminator", "PatchDiscriminator", {"spatial_dims": 2, "channels": 8, "in_channels": 3}, ODD),
    )  # fmt: skip
    found = [
        Foreign("monai", name, made(f"monai.networks.nets.{kind}", **options), size)
        for name, kind, options, size in many
    ]
    diffusion = made(
        "monai.networks.nets.DiffusionModelUNet", **(plain | groups), num_res_blocks=1, num_head_channels=8
    )
    return [*found, Foreign("monai", "DiffusionModelUNet", diffusion, four, others=timestep)]


def _later(name: str) -> Callable[[], list[Foreign]]:
    def load() -> list[Foreign]:
        found: list[Foreign] = getattr(importlib.import_module("foreign_transformers"), name)()
        return found

    return load


#: By project: the module that it installs, and its networks.
SOURCES: dict[str, tuple[str, Callable[[], list[Foreign]]]] = {
    "spandrel": ("spandrel", spandrel),
    "torchvision": ("torchvision", torchvision),
    "segmentation-models-pytorch": ("segmentation_models_pytorch", segmentation_models),
    "denoising-diffusion-pytorch": ("denoising_diffusion_pytorch", denoising_diffusion),
    "monai": ("monai", monai),
    "timm": ("timm", timm),
    "diffusers": ("diffusers", _later("diffusers")),
    "transformers": ("transformers", _later("transformers")),
}


def networks(sources: Sequence[str]) -> list[Foreign]:
    """The networks of the projects that are installed, in turn, so that a run that is stopped has seen all projects."""
    lists = []
    for source in sources:
        module, make = SOURCES[source]
        if importlib.util.find_spec(module) is not None:
            importlib.import_module(module)
            lists.append(make())
    longest = max(map(len, lists), default=0)
    return [found[number] for number in range(longest) for found in lists if number < len(found)]
