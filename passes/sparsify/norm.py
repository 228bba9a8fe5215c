"""Group and instance normalisation on rows.

Why: statistics over all positions would end locality. The recorded run keeps partial sums for each position and
group, centred on the recorded mean; an edit subtracts the old sums of the active rows and adds their new ones, so
exact statistics cost as much as the active rows. With ``norm="cached"`` the recorded statistics are used as they are
(FISEdit section 4.2, SIGE section 3.3).

Before: ``y = group_norm(x, groups, w, b, eps)``
After:  ``new = norm_partials(rows, center)``;
        ``totals = norm_totals(recorded totals, recorded partials, new, index, valid)``;
        ``y = to_map(norm_apply(rows, center, totals, w, b, eps, count))``
        and with cached statistics ``y = to_map(norm_apply(rows, center, recorded totals, w, b, eps, count))``

Conditions:
1. x is spatial; its dimension 1 is its only channel dimension and dimension 0 is the batch.
2. Weight and bias are not spatial.
3. An instance norm computes its statistics from the input.
"""

from __future__ import annotations

import functools

import torch
from torch import fx

from fisedit_compile.passes.common.arguments import read_arguments
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.family import Family, Inferred, rewrite_nodes
from fisedit_compile.passes.common.ir import RowsBuilder, shape_of, spatial_of, update
from fisedit_compile.passes.common.targets import GROUP_NORMS

NAME = "sparsify_norm"


def infer(node: fx.Node) -> Inferred:
    """The layout of the input."""
    given = read_arguments(node)
    spatial = spatial_of(given["input"])
    if spatial is None or spatial.batch_dim != 0 or spatial.channel_dims != (1,):
        return "the input is not a spatial value with the channels alone in dimension 1"
    if spatial_of(given["weight"]) or spatial_of(given["bias"]):
        return "weight or bias is a spatial value"
    if not given.get("use_input_stats", True):
        return "the statistics are running ones"
    return spatial


def rewrite(node: fx.Node, builder: RowsBuilder, cached: bool) -> str | None:
    """Replace the node by incremental statistics and ``norm_apply``."""
    given = read_arguments(node)
    x = given["input"]
    spatial = spatial_of(x)
    assert spatial is not None
    channels = shape_of(x)[1]
    groups = int(given.get("num_groups", channels))
    rows = builder.rows(x)
    center = builder.recorded(x, "norm_center", groups)
    totals = builder.recorded(x, "norm_totals", groups)
    if not cached:
        fresh = builder.call(torch.ops.fisedit.norm_partials.default, rows, center)
        partials = builder.recorded(x, "norm_partials", groups)
        builder.call(update, partials, fresh)
        index, valid = builder.plan("index", spatial.domain), builder.plan("valid", spatial.domain)
        changed = builder.call(torch.ops.fisedit.norm_totals.default, totals, partials, fresh, index, valid)
        builder.call(update, totals, changed)
        totals = changed
    count = spatial.domain.size * channels // groups
    builder.replace(
        builder.call(
            torch.ops.fisedit.norm_apply.default,
            rows,
            center,
            totals,
            given["weight"],
            given["bias"],
            given["eps"],
            count,
        )
    )
    return None


def family(cached: bool) -> Family:
    """The family with recorded (``cached``) or exact statistics."""
    return Family(NAME, GROUP_NORMS.__contains__, infer, functools.partial(rewrite, cached=cached))


def sparsify_norm(compilation: Compilation) -> None:
    """Run the pass on the edit graph; the option ``norm`` says which statistics."""
    rewrite_nodes(family(compilation.options.norm == "cached"), compilation.edit.graph, compilation.report)
