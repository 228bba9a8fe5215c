"""From here on there are two graphs: one that is recorded, and one that becomes sparse.

Why: a recorded call computes everything, as an edit does not; what edits need is found in the one and stored by the
other. Both name their nodes alike, so that a value of one is found in the other.

Before: the traced graph
After:  the same graph, and the record graph, with the same names and annotations

Conditions: none; it runs once.
"""

from __future__ import annotations

from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.deferred import copy_graph


def copy_record(compilation: Compilation) -> None:
    """Run the pass: makes ``compilation.record``."""
    compilation.record = copy_graph(compilation.edit)
