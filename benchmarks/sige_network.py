"""Any diffusers U-Net made of residual blocks and transformers, run by the operators of the ``sige`` package.

The package (SIGE, arXiv 2211.02048) has gathers, scatters and their fusion; a network is written over them by hand.
This one follows the paper's recipe for Stable Diffusion: residual blocks, transformers and resampling convolutions work
on blocks of pixels, 6x6 for 3x3 convolutions and 4x4 for 1x1 ones; statistics of group norms and embeddings of the
timestep are those of the recorded call; self-attention has queries of active blocks and keys of the whole map; the
middle of the network is dense. What the recipe leaves open goes in its favour: attention is PyTorch's fused operator.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from sige.nn import Gather, Scatter, ScatterGather, ScatterWithBlockResidual, SIGEModel, SIGEModule
from sige.utils import downsample_mask
from torch import Tensor, nn
from torch.nn import functional

CONVOLUTION_BLOCK = 6
POINTWISE_BLOCK = 4


def _affine(x: Tensor, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """The group norm of ``x`` ``[B, C, H, W]`` as a scale and a shift, ``[B, C, 1, 1]`` each."""
    groups = x.reshape(x.shape[0], norm.num_groups, -1)
    deviation, mean = torch.std_mean(groups, dim=2, correction=0)
    repeats = norm.num_channels // norm.num_groups
    inverse = (deviation.square() + norm.eps).rsqrt().repeat_interleave(repeats, dim=1)
    scale = inverse * norm.weight
    shift = norm.bias - mean.repeat_interleave(repeats, dim=1) * scale
    return scale[:, :, None, None], shift[:, :, None, None]


def _on_blocks(x: Tensor, convolution: nn.Conv2d) -> Tensor:
    """The convolution of gathered blocks, which bring their own border."""
    return functional.conv2d(
        x, convolution.weight, convolution.bias, convolution.stride, 0, convolution.dilation, convolution.groups
    )


class _Part(SIGEModule):
    """A module of the network and, for each recorded call, the scales and shifts of its norms."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original
        self.affine: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}

    @property
    def sparse(self) -> bool:
        return bool(self.mode == "sparse")

    def keep(self, name: str, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        self.affine[self.cache_id, name] = pair
        return pair

    def kept(self, name: str) -> tuple[Tensor, Tensor]:
        return self.affine[self.cache_id, name]


class _SampleScatterGather(ScatterGather):
    """As its base, for more than one sample: version 0.3.0 makes room for the blocks of one and writes those of all."""

    def forward(self, x: Tensor, scale: Any = None, shift: Any = None) -> Any:
        if self.mode != "sparse":
            return super().forward(x, scale, shift)
        recorded = self.original_outputs[self.cache_id]
        batch = recorded.shape[0]
        parts = []
        for sample, blocks in enumerate(x.chunk(batch)):
            one = slice(sample, sample + 1)
            self.original_outputs[self.cache_id] = recorded[one]
            parts.append(super().forward(blocks, scale[one], shift[one]))
        self.original_outputs[self.cache_id] = recorded
        return torch.cat(parts)


class Resnet(_Part):
    """``ResnetBlock2D`` of the plain kind: no resampling, the embedding is added."""

    def __init__(self, original: ResnetBlock2D) -> None:
        super().__init__(original)
        self.gather = Gather(original.conv1, CONVOLUTION_BLOCK, activation_name="swish")
        self.scatter_gather = _SampleScatterGather(self.gather, activation_name="swish")
        self.shortcut: Gather | None = None
        if original.conv_shortcut is None:
            self.scatter = Scatter(self.gather)
        else:
            self.shortcut = Gather(original.conv_shortcut, POINTWISE_BLOCK)
            self.scatter = ScatterWithBlockResidual(self.gather, self.shortcut)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        block = self.original
        residual = x
        if self.shortcut is not None:
            residual = self.shortcut(x)
            residual = _on_blocks(residual, block.conv_shortcut) if self.sparse else block.conv_shortcut(residual)
        if self.sparse:
            x = _on_blocks(self.gather(x, *self.kept("first")), block.conv1)
            x = _on_blocks(self.scatter_gather(x, *self.kept("second")), block.conv2)
            return self.scatter(x, residual)
        x = self.gather(x)
        scale, shift = self.keep("first", _affine(x, block.norm1))
        x = self.scatter_gather(block.conv1(functional.silu(x * scale + shift)))
        embedding = block.time_emb_proj(functional.silu(temb))[:, :, None, None]
        scale, shift = _affine(x + embedding, block.norm2)
        scale, shift = self.keep("second", (scale, scale * embedding + shift))
        x = block.conv2(functional.silu(x * scale + shift))
        return self.scatter(x, residual)


class Transformer(_Part):
    """``Transformer2DModel`` over the pixels of a map."""

    def __init__(self, original: Transformer2DModel) -> None:
        super().__init__(original)
        # Convolution or linear layer: its geometry is that of a 1x1 convolution.
        self.gather = Gather(nn.Conv2d(1, 1, 1), POINTWISE_BLOCK)
        self.scatter_in = Scatter(self.gather)
        self.scatter_out = Scatter(self.gather)

    @staticmethod
    def project(layer: nn.Module, x: Tensor) -> Tensor:
        if isinstance(layer, nn.Conv2d):
            return layer(x)
        return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward(self, x: Tensor, encoder_hidden_states: Tensor, **others: Any) -> tuple[Tensor]:
        block, residual, batch = self.original, x, x.shape[0]
        if self.sparse:
            x = self.gather(x, *self.kept("norm"))
        else:
            x = self.gather(x)
            scale, shift = self.keep("norm", _affine(x, block.norm))
            x = x * scale + shift
        x = self.project(block.proj_in, x)
        channels, height, width = x.shape[1:]
        whole = self.scatter_in(x.contiguous()).flatten(2).transpose(1, 2)  # [B, H * W, C]
        tokens = whole
        if self.sparse:
            # [B * blocks, C, 4, 4] -> [B, blocks * 16, C]
            tokens = x.unflatten(0, (batch, -1)).permute(0, 1, 3, 4, 2).reshape(batch, -1, channels)
        for inner in block.transformer_blocks:
            tokens = tokens + inner.attn1(inner.norm1(tokens), encoder_hidden_states=inner.norm1(whole))
            tokens = tokens + inner.attn2(inner.norm2(tokens), encoder_hidden_states=encoder_hidden_states)
            tokens = tokens + inner.ff(inner.norm3(tokens))
        x = tokens.reshape(-1, height, width, channels).permute(0, 3, 1, 2)
        return (self.scatter_out(self.project(block.proj_out, x).contiguous(), residual.contiguous()),)


class Resampling(_Part):
    """A strided convolution, or a convolution after nearest upsampling."""

    def __init__(self, original: Downsample2D | Upsample2D) -> None:
        super().__init__(original)
        self.gather = Gather(original.conv, CONVOLUTION_BLOCK)
        self.scatter = Scatter(self.gather)

    def forward(self, x: Tensor, output_size: int | None = None) -> Tensor:
        if isinstance(self.original, Upsample2D):
            factor = 2.0 if output_size is None else None
            x = functional.interpolate(x, size=output_size, scale_factor=factor, mode="nearest")
        x = self.gather(x)
        return self.scatter(_on_blocks(x, self.original.conv) if self.sparse else self.original.conv(x))


PARTS = {ResnetBlock2D: Resnet, Transformer2DModel: Transformer, Downsample2D: Resampling, Upsample2D: Resampling}


class Network(SIGEModel):
    """A U-Net over the operators of ``sige``.

    Weights are shared with the original. The network runs in one of the package's modes: ``full`` records the call that
    ``cache_id`` names, ``sparse`` edits it. float32 only, as the package.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        shared: dict[int, object] = {id(value): value for value in (*unet.parameters(), *unet.buffers())}
        self.unet = copy.deepcopy(unet, shared)
        for name, module in list(self.unet.named_modules()):
            if type(module) in PARTS and not name.startswith("mid_block"):
                parent, _, child = name.rpartition(".")
                setattr(self.unet.get_submodule(parent), child, PARTS[type(module)](module))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.unet(*args, **kwargs)

    def record(self, number: int, *args: Any, **kwargs: Any) -> Any:
        """Run densely and keep what an edit of this call needs."""
        self.set_mode("full")
        self.set_cache_id(number)
        return self(*args, **kwargs)

    @contextmanager
    def edit(self, mask: Tensor) -> Iterator[None]:
        """Inside, calls are sparse; ``mask`` is bool ``[H, W]`` at the size of the latents."""
        least = min(mask.shape) // 8
        # The package grows masks by a pixel unless told not to; both sides compute what the mask covers.
        self.set_masks(downsample_mask(mask.float(), min_res=max(least, 1), dilation=0, threshold=0.0))
        self.set_mode("sparse")
        try:
            yield
        finally:
            self.set_mode("full")

    def call(self, number: int, *args: Any, **kwargs: Any) -> Any:
        """Inside ``edit``: the recorded call of that number with other inputs."""
        self.set_cache_id(number)
        return self(*args, **kwargs)
