"""The transforms of convolutions by tiles by compiled code (``tiles.cpp`` says how)."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fisedit_compile.native.compiling import NotCompiledError, load_library

logger = logging.getLogger(__name__)

#: Channels are a multiple of so many, the lanes of the widest vectors.
LANES = 16


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    """The compiled code; None where there is none."""
    try:
        return load_library("tiles")
    except NotCompiledError as error:
        logger.info("tiles are transformed by PyTorch alone: %s", error)
        return None


def supports(dtype: torch.dtype, device: torch.device, inputs: int, outputs: int) -> bool:
    """Whether compiled code transforms tiles of so many input and output channels."""
    fitting = dtype == torch.float32 and device.type == "cpu" and inputs % LANES == outputs % LANES == 0
    return fitting and _library() is not None


def patches(source: Tensor, table: Tensor, first: int, count: int) -> Tensor:
    """Transformed patches of some tiles.

    Args:
        source: float32 ``[B, L, C]``, contiguous.
        table: int64 ``[1 or B, T, 16]``, positions of the source that a tile reads.
        first, count: which of the tiles of all samples.

    Returns:
        ``[16, count, C]``.
    """
    library = _library()
    assert library is not None
    table = table.contiguous()
    samples, tiles, taps = table.shape
    result = source.new_empty((taps, count, source.shape[2]))
    library.patches(
        ctypes.c_void_p(source.data_ptr()),
        ctypes.c_int64(source.shape[1]),
        ctypes.c_int64(source.shape[2]),
        ctypes.c_void_p(table.data_ptr()),
        ctypes.c_int64(tiles * taps if samples > 1 else 0),
        ctypes.c_int64(tiles),
        ctypes.c_int64(first),
        ctypes.c_int64(count),
        ctypes.c_void_p(result.data_ptr()),
        torch.get_num_threads(),
    )
    return result


def outputs(
    products: Sequence[Tensor], step: int, place: Tensor, which: Tensor, batch: int, tiles: int, bias: Tensor | None
) -> Tensor:
    """Rows of a convolution from products of transformed patches.

    Args:
        products: float32 ``[tiles of a chunk, C]``, contiguous; 16 for each chunk of ``step`` tiles of all samples.
        step: tiles of a chunk but the last.
        place: int64 ``[1 or B, N]``, the tile of each row; beyond the last one, a row is computed from the last.
        which: int64 ``[1 or B, N]``, which of its tile's four outputs a row is.
        batch: samples.
        tiles: of a sample.
        bias: ``[C]`` or None.

    Returns:
        ``[B, N, C]``.
    """
    library = _library()
    assert library is not None
    place, which = place.contiguous(), which.contiguous()
    bias = None if bias is None else bias.contiguous()
    count, channels = place.shape[1], products[0].shape[1]
    result = products[0].new_empty((batch, count, channels))
    library.outputs(
        (ctypes.c_void_p * len(products))(*(product.data_ptr() for product in products)),
        ctypes.c_int64(step),
        ctypes.c_int64(channels),
        ctypes.c_void_p(place.data_ptr()),
        ctypes.c_int64(count if place.shape[0] > 1 else 0),
        ctypes.c_void_p(which.data_ptr()),
        ctypes.c_int64(count if which.shape[0] > 1 else 0),
        ctypes.c_int64(tiles),
        ctypes.c_int64(batch),
        ctypes.c_int64(count),
        ctypes.c_void_p(None if bias is None else bias.data_ptr()),
        ctypes.c_void_p(result.data_ptr()),
        torch.get_num_threads(),
    )
    return result
