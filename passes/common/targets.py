"""Which ATen operators belong to which family. Only overloads that the traced graph can hold are listed."""

from __future__ import annotations

from typing import Any

import torch

import fisedit_compile.operators  # noqa: F401  (registers operators that are named here)
from fisedit_compile.private.operators import schema_of

aten = torch.ops.aten
#: The class of every concrete operator.
OVERLOAD = type(aten.add.Tensor)

#: Operators that work on each element but carry no pointwise tag.
ELEMENTWISE = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten._to_copy.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.gelu.default,
    aten.silu.default,
    aten.relu.default,
    aten.relu6.default,
    aten.selu.default,
    aten.prelu.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.leaky_relu.default,
    aten.softplus.default,
    aten.mish.default,
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.where.Scalar,
    aten.clamp.default,
    aten.clip.default,
    aten.square.default,
    aten.float_power.Tensor_Scalar,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.divide.Tensor,
    aten.multiply.Tensor,
    aten.subtract.Tensor,
    aten.rsub.Scalar,
    aten.rsub.Tensor,
    aten.lerp.Scalar,
    aten.lerp.Tensor,
}

#: Operators that only rename, split or merge dimensions; judged by the shapes before and after.
RESHAPES = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.view_as.default,
    aten.reshape_as.default,
}

PERMUTES = {aten.permute.default, aten.transpose.int, aten.movedim.int, aten.movedim.intlist}
SQUEEZES = {aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default}
JOINS = {aten.cat.default, aten.stack.default, aten.concat.default}
#: What takes a part of a dimension, or all parts of it.
CROPS = {aten.slice.Tensor, aten.narrow.default}
SPLITS = {aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default}
#: The same, and what takes single indices of a dimension, which then vanishes.
SLICES = CROPS | {aten.select.int}
CUTS = SPLITS | {aten.unbind.int}
#: What writes into a part of a dimension.
WRITES = {aten.slice_scatter.default, aten.select_scatter.default}
#: What moves the indices of a dimension.
TURNS = {aten.flip.default, aten.roll.default}
#: The same value at another place of the mask: propagate_domains puts it where values from different places meet.
ALIAS = aten.alias.default
#: Whatever changes dimensions and computes nothing.
LAYOUTS = RESHAPES | PERMUTES | SQUEEZES | JOINS | CUTS | SLICES | WRITES | TURNS | {aten.expand.default, ALIAS}

#: Complex numbers from pairs along the last dimension, and back.
COMPLEX = {torch.ops.fisedit.complex_of_pairs.default, aten.view_as_real.default}

#: Products over the last dimension of the first operand.
LAST_DIMENSION_PRODUCTS = {aten.linear.default, aten.matmul.default}
#: Norms over the last dimensions.
LAST_DIMENSION_NORMS = {aten.layer_norm.default, aten.rms_norm.default}
#: Work within the channels of each position, where these are where an operator looks for them.
PER_POSITION = LAST_DIMENSION_PRODUCTS | LAST_DIMENSION_NORMS | {aten.batch_norm.default}
#: Norms whose statistics are those of all positions.
GROUP_NORMS = {aten.group_norm.default, aten.instance_norm.default}

#: Reductions and scans over named dimensions: operator -> whether the dimensions vanish without ``keepdim``.
REDUCTIONS: dict[Any, bool] = {
    aten.sum.dim_IntList: True,
    aten.mean.dim: True,
    aten.amax.default: True,
    aten.amin.default: True,
    aten.var.correction: True,
    aten.std.correction: True,
    aten.logsumexp.default: True,
    aten.linalg_vector_norm.default: True,
    aten.softmax.int: False,
    aten.log_softmax.int: False,
    aten.cumsum.default: False,
}

ATTENTIONS = {aten.scaled_dot_product_attention.default}

#: Operators that end nothing and do nothing once a graph is functional.
NO_OPERATION = {
    aten.lift_fresh_copy.default,
    aten.lift_fresh.default,
    aten.detach.default,
    aten.alias.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.positive.default,
}

CONVOLUTIONS = {
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.convolution.default,
    aten.conv_transpose2d.input,
}

NEAREST = {aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default}
BILINEAR = {aten.upsample_bilinear2d.vec, aten.upsample_bilinear2d.default}
#: Pads and their modes; "" where the mode is an argument.
PADS: dict[Any, str] = {
    aten.constant_pad_nd.default: "constant",
    aten.reflection_pad2d.default: "reflect",
    aten.replication_pad2d.default: "replicate",
    aten.pad.default: "",
}
POOLS = {aten.avg_pool2d.default, aten.max_pool2d.default, aten.adaptive_avg_pool2d.default}
SHUFFLES = {aten.pixel_shuffle.default, aten.pixel_unshuffle.default}
#: Operators that change the resolution and have a rule for rows, convolutions apart.
RESAMPLINGS = NEAREST | BILINEAR | set(PADS) | POOLS | SHUFFLES

#: Operators that keep a map a map of dimensions (batch, channel, height, width) at another resolution, rule or no rule.
RESOLUTION_CHANGES = CONVOLUTIONS | {
    aten._upsample_bicubic2d_aa.vec,
    aten._upsample_bilinear2d_aa.vec,
    aten._upsample_nearest_exact2d.default,
    aten._upsample_nearest_exact2d.vec,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_max_pool2d.default,
    aten.avg_pool2d.default,
    aten.constant_pad_nd.default,
    aten.fractional_max_pool2d.default,
    aten.max_pool2d.default,
    aten.max_pool2d_with_indices.default,
    aten.pad.default,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
    aten.reflection_pad2d.default,
    aten.replication_pad2d.default,
    aten.upsample_bicubic2d.vec,
    aten.upsample_bicubic2d.default,
    aten.upsample_bilinear2d.default,
    aten.upsample_bilinear2d.vec,
    aten.upsample_nearest2d.default,
    aten.upsample_nearest2d.vec,
}

SOFTMAXES = {aten.softmax.int, aten._softmax.default}

#: Behind one of these, a rank-4 input is a picture-like map and not, say, an attention bias.
ANCHORS = RESOLUTION_CHANGES | {aten.group_norm.default, aten.batch_norm.default, aten.instance_norm.default}


def is_elementwise(target: Any) -> bool:
    """Whether an operator computes each output element from the same element of its (broadcast) inputs only."""
    if not isinstance(target, OVERLOAD):
        return False
    tags = target.tags
    if torch.Tag.nondeterministic_seeded in tags or schema_of(target).is_mutable:
        return False
    return torch.Tag.pointwise in tags or target in ELEMENTWISE
