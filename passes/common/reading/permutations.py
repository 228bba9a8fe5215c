"""Permutations of dimensions, whatever operator makes them."""

from __future__ import annotations

from torch import fx

from fisedit_compile.passes.common.arguments import read_arguments
from fisedit_compile.passes.common.targets import aten


def permutation(node: fx.Node, rank: int) -> tuple[int, ...]:
    """Which input dimension each output dimension of a permute-like node comes from."""
    given = read_arguments(node)
    order = list(range(rank))
    if node.target is aten.permute.default:
        return tuple(int(dim) % rank for dim in given["dims"])
    if node.target is aten.transpose.int:
        first, second = given["dim0"] % rank, given["dim1"] % rank
        order[first], order[second] = order[second], order[first]
        return tuple(order)
    source, destination = given["source"], given["destination"]
    sources = [dim % rank for dim in ([source] if isinstance(source, int) else source)]
    destinations = [dim % rank for dim in ([destination] if isinstance(destination, int) else destination)]
    rest = [dim for dim in order if dim not in sources]
    for place, dim in sorted(zip(destinations, sources, strict=True)):
        rest.insert(place, dim)
    return tuple(rest)
