"""The transforms of convolutions by tiles by compiled code (``native.cpp`` says how)."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fisedit_compile.operators.native.compiling import NotCompiledError, load_library, undisturbed

logger = logging.getLogger(__name__)

#: Channels are a multiple of so many, the lanes of the widest vectors.
LANES = 16
#: The transforms in one dimension, of four positions of a patch and of four products.
INPUT = ((1.0, 0.0, -1.0, 0.0), (0.0, 1.0, 1.0, 0.0), (0.0, -1.0, 1.0, 0.0), (0.0, 1.0, 0.0, -1.0))
OUTPUT = ((1.0, 1.0, 1.0, 0.0), (0.0, 1.0, -1.0, -1.0))


@undisturbed()
def _is_right(library: ctypes.CDLL) -> bool:
    """Whether the code transforms some tiles of two samples as the matrices say."""
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(2, 9, 3 * LANES, generator=generator, dtype=torch.float32)
    table = torch.randint(0, 9, (2, 5, 16), generator=generator)
    taken = torch.stack([sample[positions] for sample, positions in zip(source, table, strict=True)])
    patch = torch.tensor(INPUT, dtype=torch.float32)
    exact = torch.einsum("ia,jb,ntabc->ijntc", patch, patch, taken.unflatten(2, (4, 4))).reshape(16, 10, -1)
    if not torch.allclose(_patches(library, source, table, 3, 6), exact[:, 3:9], atol=1e-5):
        return False
    output = torch.tensor(OUTPUT, dtype=torch.float32)
    whole = torch.einsum("ia,jb,abtc->tijc", output, output, exact.unflatten(0, (4, 4))).reshape(2, 20, -1)
    place = torch.randint(0, 5, (1, 12), generator=generator)
    which = torch.randint(0, 4, (1, 12), generator=generator)
    bias = torch.randn(3 * LANES, generator=generator, dtype=torch.float32)
    products = [product for chunk in exact.split(4, 1) for product in chunk.contiguous()]
    rows = _outputs(library, products, 4, place, which, 2, 5, bias)
    return torch.allclose(rows, whole[:, (4 * place + which)[0]] + bias, atol=1e-4)


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    """The compiled code, once it was compared with exact results; None where there is none."""
    try:
        library = load_library("convolution")
    except NotCompiledError as error:
        logger.info("tiles are transformed by PyTorch alone: %s", error)
        return None
    if not _is_right(library):
        logger.warning("compiled transforms of tiles are wrong on this machine; PyTorch computes them")
        return None
    return library


def _loaded() -> ctypes.CDLL:
    library = _library()
    assert library is not None
    return library


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
    return _patches(_loaded(), source, table, first, count)


def _patches(library: ctypes.CDLL, source: Tensor, table: Tensor, first: int, count: int) -> Tensor:
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
    return _outputs(_loaded(), products, step, place, which, batch, tiles, bias)


def _outputs(
    library: ctypes.CDLL,
    products: Sequence[Tensor],
    step: int,
    place: Tensor,
    which: Tensor,
    batch: int,
    tiles: int,
    bias: Tensor | None,
) -> Tensor:
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
