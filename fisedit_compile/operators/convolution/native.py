"""The transforms of convolutions by tiles by compiled code (``native.cpp`` says how)."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fisedit_compile.operators.convolution.aten import multiply
from fisedit_compile.operators.convolution.spec import CONV_CHOICE, CONV_TILES, ConvChoice, ConvTiles
from fisedit_compile.operators.convolution.tiles import INPUT, OUTPUT, by_tiles, chunks_of
from fisedit_compile.operators.library import Implementation
from fisedit_compile.operators.native.compiling import NotCompiledError, load_library, undisturbed
from fisedit_compile.operators.products.spec import outputs_of

logger = logging.getLogger(__name__)

#: Channels are a multiple of so many, the lanes of the widest vectors.
LANES = 16


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


def supports(dtype: torch.dtype, device: torch.device, inputs: int, outputs: int) -> str | None:
    """Why compiled code does not transform tiles of so many input and output channels; None when it does."""
    if dtype != torch.float32 or device.type != "cpu":
        return "there is code for float32 on a processor only"
    if inputs % LANES or outputs % LANES:
        return f"channels are no multiple of {LANES}"
    return None if _library() is not None else "nothing is compiled on this machine"


def _patches(library: ctypes.CDLL, source: Tensor, table: Tensor, first: int, count: int) -> Tensor:
    """Transformed patches of some tiles.

    Args:
        library: the compiled code.
        source: float32 ``[B, L, C]``, contiguous.
        table: int64 ``[1 or B, T, 16]``, positions of the source that a tile reads.
        first, count: which of the tiles of all samples.

    Returns:
        ``[16, count, C]``.
    """
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
    """Rows of a convolution from products of transformed patches.

    Args:
        library: the compiled code.
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


def supports_tiles(given: ConvTiles) -> str | None:
    """Why compiled code does not transform these tiles; None when it does."""
    return supports(given.rows.dtype, given.rows.device, given.rows.shape[2], outputs_of(given.weights[0]))


def conv_tiles(given: ConvTiles) -> Tensor:
    """Convolution by tiles with compiled transforms."""
    library, chunks = _loaded(), chunks_of(given)
    batch, tiles = chunks.source.shape[0], given.table.shape[1]
    multiplied: list[Tensor] = []
    for first in chunks.starts:
        count = min(chunks.step, chunks.total - first)
        transformed = _patches(library, chunks.source, given.table, first, count)
        multiplied += [multiply(*pair) for pair in zip(transformed, given.weights, strict=True)]
    place, which = given.place[..., 0], given.subposition
    return _outputs(library, multiplied, chunks.step, place, which, batch, tiles, given.bias)


def _supports_choice(given: ConvChoice) -> str | None:
    outputs, inputs = given.dense_weight.shape[:2]
    if not given.tile_weights:
        return "there is no transformed weight"
    return supports(given.rows.dtype, given.rows.device, inputs, outputs)


IMPLEMENTATIONS = (
    Implementation(CONV_TILES, "compiled", conv_tiles, supports_tiles, rank=1),
    # Of another name than tiles transformed by PyTorch, as they take another time.
    Implementation(CONV_CHOICE, "compiled tiles", by_tiles, _supports_choice, rank=2, replaces="tiles"),
)
