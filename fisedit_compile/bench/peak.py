"""What the machine reaches in products of large matrices: the measure of what else it computes."""

from __future__ import annotations

import torch
from torch import Tensor

from fisedit_compile.bench.timing import timed
from fisedit_compile.operators import linear_rows, pack_matrix
from fisedit_compile.operators.products.aten import packs

#: Rows and columns of the matrices, by type of device.
SIDES = {"cpu": 2048, "cuda": 8192}
#: Runs, of which the fastest counts.
RUNS = 5


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations a second of a product with a square matrix, packed where that is possible."""
    side = SIDES.get(device.type, 2048)
    rows, weight = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    orders = [weight, pack_matrix(weight)] if packs(device.type, dtype) else [weight]
    seconds = []
    for order in orders * RUNS:

        def multiply(order: Tensor = order) -> None:
            linear_rows(rows, order, None)

        seconds.append(timed(multiply, device))
    return 2 * side**3 / min(seconds)
