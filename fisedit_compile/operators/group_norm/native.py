"""Group norm of rows by compiled code: what ``aten.py`` computes, with its shapes (``native.cpp`` says how)."""

from __future__ import annotations

import ctypes
import logging
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from fisedit_compile.operators.group_norm.spec import (
    NORM_APPLY,
    NORM_PARTIALS,
    NORM_TOTALS,
    NormApply,
    NormPartials,
    NormTotals,
)
from fisedit_compile.operators.library import Implementation
from fisedit_compile.operators.native.compiling import DTYPES, NotCompiledError, load_library, undisturbed

logger = logging.getLogger(__name__)

#: Most channels.
CHANNELS = 1 << 14


@undisturbed()
def _is_right(library: ctypes.CDLL, dtype: torch.dtype) -> bool:
    """Whether the code computes a norm of some rows, of which one is changed, like PyTorch's."""
    tolerance = DTYPES[dtype][1]
    generator = torch.Generator().manual_seed(0)
    before, rows = (torch.randn(2, 40, 60, generator=generator, dtype=torch.float32).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(60, generator=generator, dtype=torch.float32).to(dtype) for _ in range(2))
    center = torch.randn(2, 20, generator=generator, dtype=torch.float32)
    index = torch.arange(40)[None]
    recorded, fresh = (_partials(library, tensor, center) for tensor in (before, rows))
    totals = _updated_totals(library, recorded.sum(1), recorded, fresh, index, index < 39)
    result = _normalise(library, rows, center, totals, weight, bias, 1e-5, 40 * 3)
    mixed = torch.cat((rows[:, :39], before[:, 39:]), 1).double().transpose(1, 2)
    exact = functional.group_norm(mixed, 20, weight.double(), bias.double()).transpose(1, 2)
    return torch.allclose(result[:, :39].double(), exact[:, :39], rtol=tolerance, atol=10 * tolerance)


@lru_cache(maxsize=8)
def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled code for a dtype, once it was compared with exact results; None where there is none."""
    try:
        library = load_library("group_norm", *DTYPES[dtype][0], f"CHANNELS={CHANNELS}")
    except NotCompiledError as error:
        logger.info("group norms are computed by PyTorch alone: %s", error)
        return None
    if not _is_right(library, dtype):
        logger.warning("compiled group norms of %s are wrong on this machine; PyTorch computes them", dtype)
        return None
    return library


def _loaded(dtype: torch.dtype) -> ctypes.CDLL:
    library = _library(dtype)
    assert library is not None
    return library


def _plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether compiled code reads a tensor: it lies in the host's memory, without gaps."""
    return tensor.device.type == "cpu" and tensor.dtype == dtype and tensor.is_contiguous()


def _refusal(rows: Tensor, statistics: tuple[Tensor, ...], parameters: tuple[Tensor | None, ...]) -> str | None:
    """Why compiled code does not compute with rows, statistics (float32), weight and bias (of the rows' dtype)."""
    if rows.dtype not in DTYPES:
        return "there is no code for this dtype"
    if rows.dim() != 3 or rows.numel() == 0 or rows.shape[2] > CHANNELS:
        return f"there are no rows, or more than {CHANNELS} channels"
    if not _plain(rows, rows.dtype) or not all(_plain(tensor, torch.float32) for tensor in statistics):
        return "rows or statistics do not lie in the host's memory without gaps, or statistics are not float32"
    if not all(tensor is None or _plain(tensor, rows.dtype) for tensor in parameters):
        return "weight or bias do not lie in the host's memory without gaps, in the dtype of the rows"
    return None if _library(rows.dtype) is not None else "nothing is compiled on this machine"


def supports_partials(given: NormPartials) -> str | None:
    """Why compiled code does not sum these rows; None when it does."""
    return _refusal(given.rows, (given.center,), ())


def supports_totals(given: NormTotals) -> str | None:
    """Why compiled code does not update these totals; None when it does: all are float32 without gaps."""
    if not all(_plain(tensor, torch.float32) for tensor in given[:3]):
        return "totals or sums do not lie in the host's memory without gaps, or are not float32"
    return None if _library(torch.float32) is not None else "nothing is compiled on this machine"


def supports_apply(given: NormApply) -> str | None:
    """Why compiled code does not normalise these rows; None when it does."""
    return _refusal(given.rows, (given.center, given.totals), (given.weight, given.bias))


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def partials(given: NormPartials) -> Tensor:
    """Sums of rows."""
    return _partials(_loaded(given.rows.dtype), *given)


def _partials(library: ctypes.CDLL, rows: Tensor, center: Tensor) -> Tensor:
    batch, count, channels = rows.shape
    groups = center.shape[1]
    result = torch.empty((batch, count, 2, groups), dtype=torch.float32)
    sizes = map(ctypes.c_int64, (batch, count, groups, channels // groups))
    library.partials(_pointer(rows), _pointer(center), _pointer(result), *sizes, torch.get_num_threads())
    return result


def updated_totals(given: NormTotals) -> Tensor:
    """New totals."""
    return _updated_totals(_loaded(torch.float32), *given)


def _updated_totals(
    library: ctypes.CDLL, totals: Tensor, recorded: Tensor, fresh: Tensor, index: Tensor, valid: Tensor | None
) -> Tensor:
    result = torch.empty_like(totals)
    index, valid = index.contiguous(), None if valid is None else valid.contiguous()
    batch, positions = recorded.shape[:2]
    count = fresh.shape[1]
    strides = [ctypes.c_int64(0 if given is None or given.shape[0] == 1 else count) for given in (index, valid)]
    library.totals(
        *map(_pointer, (totals, recorded, fresh, index)),
        strides[0],
        _pointer(valid),
        strides[1],
        _pointer(result),
        *map(ctypes.c_int64, (batch, positions, count, totals[0].numel())),
    )
    return result


def normalise(given: NormApply) -> Tensor:
    """Normalised rows."""
    return _normalise(_loaded(given.rows.dtype), *given)


def _normalise(
    library: ctypes.CDLL,
    rows: Tensor,
    center: Tensor,
    totals: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    count: int,
) -> Tensor:
    batch, number, channels = rows.shape
    groups = center.shape[1]
    result = torch.empty_like(rows)
    library.normalise(
        *map(_pointer, (rows, center, totals, weight, bias)),
        ctypes.c_float(eps),
        ctypes.c_double(count),
        _pointer(result),
        *map(ctypes.c_int64, (batch, number, groups, channels // groups)),
        torch.get_num_threads(),
    )
    return result


IMPLEMENTATIONS = (
    Implementation(NORM_PARTIALS, "compiled", partials, supports_partials, rank=1),
    Implementation(NORM_TOTALS, "compiled", updated_totals, supports_totals, rank=1),
    Implementation(NORM_APPLY, "compiled", normalise, supports_apply, rank=1),
)
