"""Which code runs an operator: a Triton kernel where one supports the arguments, else the ATen implementation.

A provider is registered for an operator with a check of the arguments. The first one whose check passes runs; the ATen
implementation, which runs on every device, is what remains. Nothing here imports Triton before a kernel is launched.
"""

from __future__ import annotations

import functools
import logging
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.operators import IMPLEMENTATIONS
from fisedit_compile.operators.attention import triton as attention
from fisedit_compile.operators.convolution import triton as conv
from fisedit_compile.operators.group_norm import triton as norm
from fisedit_compile.operators.rows import triton as rows
from fisedit_compile.operators.triton import devices

logger = logging.getLogger(__name__)

fisedit = torch.ops.fisedit


@dataclass(frozen=True)
class Provider:
    """One way to compute an operator.

    Attributes:
        name: for messages and tests.
        supports: takes the operator's arguments; whether ``run`` computes them.
        run: takes the same and computes.
    """

    name: str
    supports: Callable[..., bool]
    run: Callable[..., Any]


PROVIDERS: dict[Any, list[Provider]] = {}


def register(overload: Any, provider: Provider) -> None:
    """Add a provider for an operator; it is asked after those registered before.

    Raises:
        KeyError: there is no such operator.
    """
    if overload not in IMPLEMENTATIONS:
        raise KeyError(f"{overload} is no operator of fisedit")
    PROVIDERS.setdefault(overload, []).append(provider)


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
        right = torch.equal(rows.gather_rows(source, index), source[:, index[0]])
        reason = "they compute something else"
    except (TritonError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        right, reason = False, f"{type(error).__name__}: {error}"
    if not right:
        logger.warning("no kernels are used on %s, but operators of PyTorch: %s", device, reason)
    return right


def _on_triton(supports: Callable[..., bool]) -> Callable[..., bool]:
    """The check for kernels: all tensors on one device that runs them."""

    @functools.wraps(supports)
    def check(*arguments: Any) -> bool:
        first = arguments[0]
        if not devices.runs_on(first):
            return False
        device = first.device
        if device.type == "cuda" and not kernels_work(first):
            return False
        return all(part.device == device for part in arguments if isinstance(part, Tensor)) and supports(*arguments)

    return check


for _overload, _supports, _run in (
    (fisedit.attention_rows.default, attention.supports_attention, attention.attention_rows),
    (fisedit.conv_choice.default, conv.supports_choice, conv.conv_choice),
    (fisedit.conv_rows.default, conv.supports_conv, conv.conv_rows),
    (fisedit.gather_rows.default, rows.supports_gather, rows.gather_rows),
    (fisedit.gather_taps.default, rows.supports_taps, rows.gather_taps),
    (fisedit.norm_apply.default, norm.supports_apply, norm.norm_apply),
    (fisedit.norm_partials.default, norm.supports_partials, norm.norm_partials),
    (fisedit.scatter_rows.default, rows.supports_scatter, rows.scatter_rows),
):
    register(_overload, Provider("triton", _on_triton(_supports), _run))


def provider_of(overload: Any, *arguments: Any) -> Provider:
    """Who computes an operator with these arguments."""
    for provider in PROVIDERS.get(overload, ()):
        if provider.supports(*arguments):
            return provider
    return Provider("aten", lambda *_: True, IMPLEMENTATIONS[overload])


@functools.cache
def dispatching(overload: Any) -> Callable[..., Any]:
    """A function with the operator's positional arguments that asks the providers at each call."""
    fallback, providers = IMPLEMENTATIONS[overload], tuple(PROVIDERS.get(overload, ()))

    @functools.wraps(fallback)
    def dispatch(*arguments: Any) -> Any:
        for provider in providers:
            if provider.supports(*arguments):
                return provider.run(*arguments)
        return fallback(*arguments)

    return dispatch


def implementation(overload: Any) -> Callable[..., Any]:
    """What a lowered graph calls for an operator: the ATen implementation itself where no kernel can ever run."""
    if overload not in PROVIDERS or not devices.triton_usable():
        return IMPLEMENTATIONS[overload]
    return dispatching(overload)


def _register_for_cuda() -> torch.library.Library:
    """Make the dispatcher use the providers on CUDA, so that graphs compiled by inductor do as well."""
    library = torch.library.Library("fisedit", "IMPL", "CUDA")
    for overload in PROVIDERS:
        library.impl(overload, dispatching(overload))
    return library


#: Holds the registration; the operators fall back to ATen when it dies.
LIBRARY = _register_for_cuda()
