"""Where kernels can run: on CUDA with Triton installed, or anywhere in Triton's interpreter when a test asks for it."""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

_interpreting = False
_capture = threading.Lock()


@functools.cache
def triton_installed() -> bool:
    """Whether Triton can be imported; it is not imported for that."""
    return importlib.util.find_spec("triton") is not None


def triton_usable() -> bool:
    """Whether any tensor of this process may reach a Triton kernel."""
    return triton_installed() and (_interpreting or torch.cuda.is_available())


def runs_on(tensor: Tensor) -> bool:
    """Whether Triton kernels take this tensor."""
    if tensor.device.type == "cuda":
        # AMD's GPUs have this device type too; nothing here was made for them.
        return triton_installed() and torch.version.hip is None
    return _interpreting and tensor.device.type == "cpu"


@contextmanager
def interpreter() -> Iterator[None]:
    """Run kernels on CPU tensors, in Triton's interpreter: for tests, about ten thousand times slower than a GPU.

    Raises:
        RuntimeError: ``TRITON_INTERPRET=1`` was not set when the process started.
    """
    global _interpreting
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("set TRITON_INTERPRET=1 before anything imports triton")
    before, _interpreting = _interpreting, True
    try:
        yield
    finally:
        _interpreting = before


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Makes the tensor's GPU the current one: Triton launches on the current one, wherever its arguments are."""
    if tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


@contextmanager
def one_capture() -> Iterator[None]:
    """One capture at a time in the whole process, and no garbage is collected meanwhile: a dead CUDA graph or Triton
    kernel among it would end the capture, because what frees them is not allowed then."""
    with _capture:
        collects = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collects:
                gc.enable()


def captured(tensor: Tensor) -> bool:
    """Whether what is launched for this tensor now becomes part of a CUDA graph and computes nothing yet."""
    if tensor.device.type != "cuda":
        return False
    with on_device(tensor):
        return torch.cuda.is_current_stream_capturing()
