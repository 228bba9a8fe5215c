"""Triton kernels for the sparse operators on CUDA, made from templates; see ``docs/kernels.md``."""

from fisedit_compile.kernels.fusion import fuse
from fisedit_compile.kernels.providers import implementation

__all__ = ["fuse", "implementation"]
