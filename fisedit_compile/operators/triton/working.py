"""Whether Triton kernels can compute with some tensors at all: devices that run them, and kernels that work there."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.operators.library import Arguments, Implementation, Operator
from fisedit_compile.operators.triton import devices
from fisedit_compile.operators.triton.launches import Launch

logger = logging.getLogger(__name__)

#: Above code for processors: in Triton's interpreter both would take a tensor.
RANK = 4
_working: dict[torch.device, bool] = {}


def kernels_work(tensor: Tensor) -> bool:
    """Whether kernels can be made, and compute what they should, on a tensor's GPU: tried once with a small one.

    An installed Triton may still have no C compiler, no headers of Python, or a driver or GPU that it does not know.
    """
    device = tensor.device
    if device not in _working and not devices.captured(tensor):
        _working[device] = _try(device)
    # Nothing can be tried while somebody captures.
    return _working.get(device, False)


def _try(device: torch.device) -> bool:
    from triton.errors import TritonError

    source, index = torch.arange(32.0, device=device).view(1, 8, 4), torch.tensor([[5, 2]], device=device)
    try:
        right = torch.equal(small_kernel(source, index), source[:, index[0]])
        reason = "they compute something else"
    except (TritonError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        right, reason = False, f"{type(error).__name__}: {error}"
    if not right:
        logger.warning("no kernels are used on %s, but operators of PyTorch: %s", device, reason)
    return right


def small_kernel(source: Tensor, index: Tensor) -> Tensor:
    """Rows of a contiguous map ``[1, S, C]`` at an index ``[1, N]``, by the simplest kernel there is."""
    from fisedit_compile.operators.rows.triton_kernels import gather_kernel

    count, channels = index.shape[1], source.shape[2]
    output = source.new_empty((1, count, channels))
    arguments = {
        "source": source,
        "index": index,
        "output": output,
        "count": count,
        "channels": channels,
        "source_sample": source.stride(0),
        "source_position": source.stride(1),
        "source_channel": source.stride(2),
        "index_sample": 0,
    }
    Launch(gather_kernel, (1, 1, 1), arguments, {"BLOCK_R": 16, "BLOCK_C": 16}).run()
    return output


def refusal(arguments: tuple[Any, ...]) -> str | None:
    """Why no kernel runs on these arguments, of which the first is a tensor; None when one may."""
    first = arguments[0]
    if not devices.runs_on(first):
        return "tensors are not on a GPU that kernels are made for"
    device = first.device
    if device.type == "cuda" and not kernels_work(first):
        return "kernels do not work on this GPU"
    if any(part.device != device for part in arguments if isinstance(part, Tensor)):
        return "tensors are on several devices"
    return None


def implementation(
    operator: Operator[Arguments],
    run: Callable[[Arguments], Any],
    supports: Callable[[Arguments], str | None],
    counts: bool = False,
) -> Implementation[Arguments]:
    """An operator by Triton kernels; ``supports`` is asked about arguments that are on one GPU."""

    def check(given: Arguments) -> str | None:
        return refusal(given) or supports(given)

    return Implementation(operator, "triton", run, check, RANK, devices.triton_usable, counts=counts)
