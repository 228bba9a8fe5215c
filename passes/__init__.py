"""FX graph to FX graph: one pass a file. ``build_program`` runs them in order.

README.md beside this file lists what holds before and after each of them.
"""

if __name__ == "passes":
    raise ImportError("import this package as fisedit_compile.passes; the bare name 'passes' is not installed")

from fisedit_compile.passes.common.program import DenseProgram, GraphInput, InputInfo, Program, SparseProgram
from fisedit_compile.passes.common.report import Miss, Report
from fisedit_compile.passes.manager import build_program, disabled_passes

__all__ = [
    "DenseProgram",
    "GraphInput",
    "InputInfo",
    "Miss",
    "Program",
    "Report",
    "SparseProgram",
    "build_program",
    "disabled_passes",
]
