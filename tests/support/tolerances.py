"""How far a result may lie from the reference: one table by data type, used by every test."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """``absolute`` is a share of the largest magnitude of the expected tensor, so that it fits any scale."""

    relative: float
    absolute: float


TOLERANCES = {
    torch.float64: Tolerance(relative=1e-9, absolute=1e-10),
    torch.float32: Tolerance(relative=2e-4, absolute=5e-5),
    torch.float16: Tolerance(relative=2e-2, absolute=1e-2),
    torch.bfloat16: Tolerance(relative=8e-2, absolute=5e-2),
}


def assert_near(actual: Tensor, expected: Tensor, what: str = "", dtype: torch.dtype | None = None) -> None:
    """Compare two tensors by the table's row of ``dtype`` (by default that of the expected tensor)."""
    tolerance = TOLERANCES[dtype or expected.dtype]
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    scale = float(expected.detach().abs().max()) if expected.numel() else 0.0

    def explain(message: str) -> str:
        return f"{what}: {message}"

    torch.testing.assert_close(
        actual.double(),
        expected.double(),
        rtol=tolerance.relative,
        atol=tolerance.absolute * max(scale, 1e-6),
        msg=explain,
    )


def assert_identical(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Compare two tensors bit by bit (NaN equals NaN)."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    different = (actual != expected) & ~(actual.isnan() & expected.isnan())
    count = int(different.sum())
    assert count == 0, f"{what}: {count} of {expected.numel()} elements differ from what must be bit-identical"
