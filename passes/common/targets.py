"""Which ATen operators belong to which family. Only overloads that the traced graph can hold are listed."""

from __future__ import annotations

from typing import Any

import torch

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
