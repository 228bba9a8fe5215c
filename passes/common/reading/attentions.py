"""Attention: whether it looks at other positions."""

from __future__ import annotations

from torch import fx

from fisedit_compile.passes.common.arguments import read_arguments
from fisedit_compile.passes.common.ir import spatial_of
from fisedit_compile.passes.common.layouts import BATCH, CHANNEL, SPACE

#: Dimensions of a query whose positions attend to others, with heads and without.
HEADS = (BATCH, CHANNEL, SPACE, CHANNEL)
SINGLE = (BATCH, SPACE, CHANNEL)


def is_within(node: fx.Node) -> bool:
    """Whether an attention is that of tokens which each position has of its own."""
    query = spatial_of(read_arguments(node)["query"])
    return query is not None and query.dims[-2:] == (CHANNEL, CHANNEL) and query.dims != HEADS
