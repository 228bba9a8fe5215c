"""Returned values of which neither their making nor their sizes prove where their positions are.

Why: inside the graph such a value is treated as not spatial, which is right for every use; but what the graph returns
must be masked. Most often it is a product of a map and of something that is none, such as masks made of queries and a
map (``einsum("bqc,bchw->bqhw")``), where queries, channels and positions are equal numbers. Its positions are then
those of the map; were the queries positions as well, they would come in other dimensions only, and outside the mask
the recording is kept either way. Only the returned value is a map: what else reads it reads it whole.

Before: ``return reshape(matmul(q, x), [B, Q, H, W])``, where nothing is known of ``q``
After:  ``return alias(reshape(...))``, and the alias is a map
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import fx

from fisedit_compile.passes.common.family import Family
from fisedit_compile.passes.common.ir import shape_of, spatial_of
from fisedit_compile.passes.common.layouts import Spatial
from fisedit_compile.passes.common.meta import SPATIAL
from fisedit_compile.passes.common.targets import PERMUTES, RESHAPES, SLICES, SQUEEZES, aten, is_elementwise
from fisedit_compile.passes.domains.geometry.size_probe import SizeProbe

#: What changes names of dimensions, or leaves something out.
LAYOUTS = PERMUTES | RESHAPES | SLICES | SQUEEZES | {aten.real.default, aten.imag.default}


def layout_of_returned(
    node: fx.Node, families: Sequence[Family], probe: SizeProbe, derived: Collection[fx.Node]
) -> Spatial | None:
    """The layout of a returned value by the maps that it was made from; None when those do not tell either.

    Args:
        node: not annotated.
        families: whose rules tell what becomes of a layout.
        probe: has been asked about all nodes.
        derived: all nodes that depend on a spatial input.
    """
    chain = [node]
    while (source := _carried(chain[-1], derived)) is not None:
        chain.append(source)
    layout = probe.layout_by_maps(chain.pop())
    for behind in reversed(chain):
        if layout is None:
            return None
        layout = _inferred(behind, layout, families)
    return layout


def maker(node: fx.Node, derived: Collection[fx.Node]) -> fx.Node:
    """The operator that decides what a value is: the one behind which only dimensions are renamed or elements computed
    one by one."""
    while (source := _carried(node, derived)) is not None:
        node = source
    return node


def _carried(node: fx.Node, derived: Collection[fx.Node]) -> fx.Node | None:
    """The operand whose layout decides that of a value, if it is one of which nothing is known."""
    if not (node.target in LAYOUTS or is_elementwise(node.target)):
        return None
    unknown = [value for value in node.all_input_nodes if value in derived and spatial_of(value) is None]
    return unknown[0] if len(unknown) == 1 and unknown[0] is node.args[0] else None


def _inferred(node: fx.Node, layout: Spatial, families: Sequence[Family]) -> Spatial | None:
    """What the rules say of a value if its first operand had a layout."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    family = next((family for family in families if family.matches(node.target)), None)
    if family is None:
        return None
    source.meta[SPATIAL] = layout
    try:
        found = family.infer(node)
    finally:
        del source.meta[SPATIAL]
    return found if isinstance(found, Spatial) and len(found.dims) == len(shape_of(node)) else None
