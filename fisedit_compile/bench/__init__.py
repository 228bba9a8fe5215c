"""Measure dense and sparse calls side by side: ``fisedit bench``."""

from fisedit_compile.bench.masks import SHAPES, make_mask

__all__ = ["SHAPES", "make_mask"]
