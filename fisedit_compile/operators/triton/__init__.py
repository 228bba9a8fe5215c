"""Triton kernels for the sparse operators on CUDA, made from templates; see ``docs/kernels.md``."""

from fisedit_compile.operators.triton.fusion import fuse
from fisedit_compile.operators.triton.providers import implementation

__all__ = ["fuse", "implementation"]
