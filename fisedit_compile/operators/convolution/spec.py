"""What convolutions are measured by."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fisedit_compile.operators.records import dtype_name, typical_count

#: Under which names times are kept and choices counted: of rows, and of whole maps.
MEASURED, MEASURED_MAPS = "convolution", "convolution of a map"


class ConvolutionCase(NamedTuple):
    """What the time of a 3x3 convolution at active rows depends on.

    Attributes:
        batch, height, width: of the map.
        inputs, outputs: channels.
        dtype: of the rows.
        rows: a typical count of active rows.
        eighths: how full tiles are, in eighths.
    """

    batch: int
    height: int
    width: int
    inputs: int
    outputs: int
    dtype: str
    rows: int
    eighths: int

    @staticmethod
    def of(
        batch: int, height: int, width: int, inputs: int, outputs: int, rows: int, tiles: int, dtype: torch.dtype
    ) -> ConvolutionCase:
        """The case of so many rows in so many tiles; equal for cases whose times are alike."""
        eighths = round(8 * rows / max(4 * tiles, 1))
        return ConvolutionCase(batch, height, width, inputs, outputs, dtype_name(dtype), typical_count(rows), eighths)

    @property
    def shape(self) -> tuple[int, int, int, int, int, str]:
        """What does not depend on the mask: batch, height, width, inputs, outputs and dtype."""
        return self[:6]

    def __str__(self) -> str:
        shape = f"{self.batch}x{self.height}x{self.width} {self.inputs}->{self.outputs} {self.dtype}"
        return f"{shape}, about {self.rows} rows, tiles {self.eighths / 8:.0%} full"


class MapCase(NamedTuple):
    """What decides how a whole map is convolved the fastest.

    Attributes:
        inputs, outputs: channels.
        dtype: of the map.
        channels_last: order of map and result in memory.
    """

    inputs: int
    outputs: int
    dtype: str
    channels_last: bool

    @staticmethod
    def of(inputs: int, outputs: int, channels_last: bool, dtype: torch.dtype) -> MapCase:
        """The case of a map in this order."""
        return MapCase(inputs, outputs, dtype_name(dtype), channels_last)

    def __str__(self) -> str:
        return f"{self.inputs}->{self.outputs} {self.dtype}{', channels last' if self.channels_last else ''}"
