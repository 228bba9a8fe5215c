"""Convolutions, whatever overload they are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fisedit_compile.passes.common.arguments import pair, read_arguments
from fisedit_compile.passes.common.ir import shape_of
from fisedit_compile.passes.common.targets import aten
from fisedit_compile.runtime.spec import Domain, Stencil


@dataclass(frozen=True)
class Convolution:
    """The arguments of a convolution, alike for all overloads."""

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    transposed: bool

    def stencil(self, source: Domain, target: Domain) -> Stencil:
        """Which positions each output position reads."""
        kernel = shape_of(self.weight)[2:]
        return Stencil.of(
            "transposed" if self.transposed else "window",
            source,
            target,
            kernel_height=kernel[0],
            kernel_width=kernel[1],
            stride_y=self.stride[0],
            stride_x=self.stride[1],
            padding_y=self.padding[0],
            padding_x=self.padding[1],
            dilation_y=self.dilation[0],
            dilation_x=self.dilation[1],
        )


def read_convolution(node: fx.Node) -> Convolution | str:
    """Read the arguments of a convolution node, or say why it is not a two-dimensional one."""
    given = read_arguments(node)
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    if len(shape_of(weight)) != 4:
        return f"the kernel has {len(shape_of(weight)) - 2} dimensions, not 2"
    transposed = bool(given.get("transposed", node.target is aten.conv_transpose2d.input))
    dilation = pair(given["dilation"])
    padding = given["padding"]
    if isinstance(padding, str):
        kernel = shape_of(weight)[2:]
        total = [step * (size - 1) if padding == "same" else 0 for step, size in zip(dilation, kernel, strict=True)]
        padding = [amount // 2 for amount in total]
    return Convolution(
        x, weight, bias, pair(given["stride"]), pair(padding), dilation, int(given["groups"]), transposed
    )
