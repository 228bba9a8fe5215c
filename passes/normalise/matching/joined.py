"""Where the parts of joined values lie behind operators that treat the indices of one dimension alike, and who cuts
them apart again."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, fx

from fisedit_compile.passes.common.arguments import read_arguments
from fisedit_compile.passes.common.ir import shape_of
from fisedit_compile.passes.common.meta import VALUE
from fisedit_compile.passes.common.reading.permutations import permutation
from fisedit_compile.passes.common.targets import (
    COMPLEX,
    CUTS,
    JOINS,
    LAST_DIMENSION_NORMS,
    LAST_DIMENSION_PRODUCTS,
    PERMUTES,
    REDUCTIONS,
    RESHAPES,
    SLICES,
    WRITES,
    aten,
    is_elementwise,
)


@dataclass(frozen=True)
class Joined:
    """A value whose dimension ``dim`` holds parts of ``sizes``, one behind the other."""

    dim: int
    sizes: tuple[int, ...]


Known = Mapping[fx.Node, Joined | list[Joined]]


def _elementwise(node: fx.Node, known: Known) -> Joined | None:
    if not isinstance(node.meta.get(VALUE), Tensor):
        return None
    rank = len(shape_of(node))
    found: set[Joined | None] = set()
    for value in node.all_input_nodes:
        joined = known.get(value)
        if isinstance(joined, Joined):
            found.add(Joined(joined.dim + rank - len(shape_of(value)), joined.sizes))
        elif joined is not None:
            found.add(None)
    return found.pop() if len(found) == 1 else None


def _reshaped(node: fx.Node, joined: Joined) -> Joined | None:
    before, after = shape_of(node.args[0]), shape_of(node)  # type: ignore[arg-type]
    leading = math.prod(before[: joined.dim])
    for dim, size in enumerate(after):
        if size == before[joined.dim] and math.prod(after[:dim]) == leading:
            return Joined(dim, joined.sizes)
    return None


def _attended(node: fx.Node, known: Known) -> Joined | None:
    given = read_arguments(node)
    query, mask = known.get(given["query"]), given["attn_mask"]
    if not isinstance(query, Joined) or query.dim != len(shape_of(node)) - 2:
        return None
    if given["dropout_p"] or given["is_causal"]:
        return None
    if mask is None:
        return query
    keys = known.get(mask)  # all parts read all keys
    if mask in known and (shape_of(mask)[-2:-1] != (1,) or keys != Joined(len(shape_of(mask)) - 1, query.sizes)):
        return None
    return query


def written_part(node: fx.Node, joined: Joined) -> int | None:
    """Which part of its first operand a write into a slice replaces as a whole; None when it does something else."""
    given = read_arguments(node)
    if node.target is not aten.slice_scatter.default or given["step"] != 1:
        return None
    if int(given["dim"]) % len(shape_of(node)) != joined.dim:
        return None
    start, stop, _ = slice(given["start"], given["end"]).indices(sum(joined.sizes))
    ends = list(itertools.accumulate(joined.sizes, initial=0))
    parts = [at for at in range(len(joined.sizes)) if (ends[at], ends[at + 1]) == (start, stop)]
    return parts[0] if parts and stop > start else None


def _written(node: fx.Node, known: Known) -> Joined | None:
    joined = known.get(node.args[0])  # type: ignore[arg-type]
    return joined if isinstance(joined, Joined) and written_part(node, joined) is not None else None


def behind(node: fx.Node, known: Known) -> Joined | list[Joined] | None:
    """How the result of an operator is joined, or None when it mixes the parts or nothing is known."""
    target = node.target
    if is_elementwise(target):
        return _elementwise(node, known)
    if target is aten.scaled_dot_product_attention.default:
        return _attended(node, known)
    if target in JOINS:
        values = node.args[0]
        assert isinstance(values, (list, tuple))
        alike = {known.get(value) for value in values if not isinstance(known.get(value), list)}  # type: ignore[arg-type]
        joined = alike.pop() if len(alike) == 1 else None
        rank = len(shape_of(node))
        dim = int(read_arguments(node)["dim"]) % rank
        if not isinstance(joined, Joined) or (target is not aten.stack.default and dim == joined.dim):
            return None
        return Joined(joined.dim + (target is aten.stack.default and dim <= joined.dim), joined.sizes)
    if target in WRITES:
        return _written(node, known)
    joined = known.get(node.args[0]) if isinstance(node.args[0], fx.Node) else None
    if not isinstance(joined, Joined) or any(value in known for value in node.all_input_nodes if value != node.args[0]):
        return None
    return _of_first(node, joined)


def _of_first(node: fx.Node, joined: Joined) -> Joined | list[Joined] | None:
    """The same for operators of which only the first operand is joined."""
    target, before = node.target, shape_of(node.args[0])  # type: ignore[arg-type]
    rank, dim, sizes = len(before), joined.dim, joined.sizes
    if target in RESHAPES:
        return _reshaped(node, joined)
    if target in PERMUTES:
        return Joined(permutation(node, rank).index(dim), sizes)
    given = read_arguments(node)
    if target in LAST_DIMENSION_PRODUCTS:
        return joined if dim != rank - 1 and len(shape_of(node.args[1])) == 2 else None  # type: ignore[arg-type]
    if target in COMPLEX:
        return joined if target is aten.view_as_real.default or dim != rank - 1 else None
    if target in LAST_DIMENSION_NORMS:
        return joined if dim < rank - len(given["normalized_shape"]) else None
    if target is aten.expand.default:
        return joined if len(shape_of(node)) == rank and shape_of(node)[dim] == before[dim] else None
    if target is aten.unsqueeze.default:
        return Joined(dim + (int(given["dim"]) % (rank + 1) <= dim), sizes)
    if target in REDUCTIONS and given["dim"] is not None:
        dims = {int(d) % rank for d in ([given["dim"]] if isinstance(given["dim"], int) else given["dim"])}
        if dim in dims or not dims:
            return None
        removed = REDUCTIONS[target] and not given.get("keepdim")
        return Joined(dim - sum(other < dim for other in dims) * removed, sizes)
    if target in CUTS | SLICES:
        other = int(given["dim"]) % rank
        if other == dim:
            return None
        dropped = target in (aten.unbind.int, aten.select.int) and other < dim
        found = Joined(dim - dropped, sizes)
        return [found] * len(node.meta[VALUE]) if target in CUTS else found
    return None


class Elements(NamedTuple):
    """Elements ``start`` to ``stop`` of part ``number``."""

    number: int
    start: int
    stop: int


@dataclass(frozen=True)
class Cut:
    """Elements of one part of ``source``, or of several that follow each other; ``node`` stands for them."""

    node: fx.Node
    source: fx.Node
    elements: tuple[Elements, ...]


def _bounds(node: fx.Node, joined: Joined) -> list[tuple[fx.Node, int, int]]:
    """What a cut along the joined dimension takes: (node, start, stop) for each result that is read."""
    if node.target not in CUTS | SLICES:
        return []
    given = read_arguments(node)
    if int(given["dim"]) % len(shape_of(node.args[0])) != joined.dim:  # type: ignore[arg-type]
        return []
    total = sum(joined.sizes)
    if node.target is aten.slice.Tensor:
        start, stop, _ = slice(given["start"], given["end"]).indices(total)
        return [(node, start, stop)] if given["step"] == 1 else []
    if node.target is aten.select.int:
        return [(node, int(given["index"]) % total, int(given["index"]) % total + 1)]
    if node.target in CUTS - {aten.unbind.int}:
        ends = list(itertools.accumulate((value.shape[joined.dim] for value in node.meta[VALUE]), initial=0))
        numbers = {user: int(user.args[1]) for user in node.users if isinstance(user.args[1], int)}
        return [(user, ends[number], ends[number + 1]) for user, number in numbers.items()]
    return []


def find_cuts(node: fx.Node, joined: Joined, root: bool) -> list[Cut]:
    """The readers of a joined value that take some of its elements; those of one part, where it is the join itself."""
    found = []
    for reader in node.users:
        for result, start, stop in _bounds(reader, joined) if reader.args and reader.args[0] is node else ():
            if start >= stop or (start, stop) == (0, sum(joined.sizes)):
                continue
            ends = list(itertools.accumulate(joined.sizes, initial=0))
            elements = [
                Elements(number, max(start, first) - first, min(stop, last) - first)
                for number, (first, last) in enumerate(itertools.pairwise(ends))
                if max(start, first) < min(stop, last)
            ]
            if len(elements) == 1 or not root:
                found.append(Cut(result, node, tuple(elements)))
    return found


def find_ends(nodes: Collection[fx.Node], known: Known, roots: Collection[fx.Node]) -> list[fx.Node]:
    """The values that are read as they are, joined, at the end of what treats their parts alike.

    Where attention reads them, that is whatever reads them; where tokens ``[B, T, C]`` are joined, the graph's output.
    """
    attended = any(node.target is aten.scaled_dot_product_attention.default for node in known)
    tokens = any(len(shape_of(root)) == 3 and known[root] == Joined(1, known[root].sizes) for root in roots)  # type: ignore[union-attr]

    def reads(user: fx.Node, joined: Joined) -> bool:
        if user.op == "output":
            return attended or tokens
        return attended and user not in known and not _bounds(user, joined)

    found = []
    for node in nodes:
        joined = known.get(node)
        if isinstance(joined, Joined) and node not in roots and any(reads(user, joined) for user in node.users):
            found.append(node)
    return found
