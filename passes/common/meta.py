"""The keys of ``node.meta``: what is noted of a node, by whom, and who reads it.

All code uses these names; a test finds keys that are written out elsewhere.
"""

from __future__ import annotations

# What tracing and PyTorch note.

VALUE = "val"
"""What the node returns: a fake tensor, a number, None, or a list of such. Row operators have none."""

EXAMPLE_VALUE = "example_value"
"""The same in Dynamo's graph, before tracing."""

MODULE_PATH = "module_path"
"""str, noted by tracing: the module that the node comes from, dotted as in ``named_modules``, "" outside of any. Names
cache sites."""

MODULE_STACK = "nn_module_stack"
"""The modules around the call, as PyTorch notes them."""

STACK_TRACE = "stack_trace"
"""The lines of the user's code that made the call, as PyTorch notes them."""

SOURCE_STACK = "source_fn_stack"
"""The functions of the user's code that made the call, as PyTorch notes them."""

PROVENANCE = (MODULE_STACK, STACK_TRACE, SOURCE_STACK)
"""What ``ir.copy_provenance`` carries over to nodes that take the place of another."""

# What propagate_domains notes.

SPATIAL = "spatial"
"""``Spatial``: the layout of a spatial value. Markers ``to_map`` carry it as well."""

SPATIAL_OUTPUTS = "spatial_outputs"
"""list of ``Spatial``: the layouts of the outputs of an operator that has several."""

ORIGIN = "origin"
"""str: the name of the node of the dense graph whose value this one stands for. Recorded values are named by it."""

DENSE_REASON = "dense_reason"
"""str: why an operator that reads a spatial value, or what was made of one, is not rewritten. Families note it too."""

# What later passes note.

CHANGED = "changed"
"""True on inputs that an opaque graph changes in place; noted by collapse, read by densify."""

PLAN_INPUT = "plan_input"
"""``PlanInput``: what a marker ``plan`` stands for; noted by ``RowsBuilder.plan``."""

LIKELY_ROWS = "likely_rows"
"""int: how many rows a row operator is likely to compute, all samples; noted by ``RowsBuilder.replace``, read where
packed and transformed weights are measured."""

INVARIANT = "invariant"
"""int: the number of the node among the outputs of the invariants graph; noted by hoist_invariants."""

HOISTED = "hoisted"
"""int: the number of the node among the outputs of the prologue; noted by hoist_parameters."""
