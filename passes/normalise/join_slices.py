"""What is computed slice by slice of the batch, and written into one tensor, is computed at once.

Why: attention slicing folds the heads into the batch and computes a few of them at a time, to save memory. The slices
are no samples, and so no pictures. At once it is eager attention, which ``normalise_attention`` makes one operator that
needs no memory for the scores either.

Before: ``s_i = softmax(baddbmm(e_i, slice(q, 0, a, b), transpose(slice(k, 0, a, b), -1, -2)), -1)``
        ``y_i = slice_scatter(y_(i-1), copy(slice(y_(i-1), 0, a, b), bmm(s_i, slice(v, 0, a, b))), 0, a, b)``
After:  ``y = bmm(softmax(baddbmm(e, q, transpose(k, -1, -2)), -1), v)``

Conditions, looked at for the last of each chain of ``slice_scatter``:
1. All of them write slices along the first dimension, without steps, which do not overlap and cover the tensor.
2. What is written has the slice's shape and dtype.
3. All slices are computed by the same operators with the same other arguments.
4. Each operator computes an index of the first dimension from the same index of its operands: batched products,
   softmax over another dimension, permutations that keep the first, elementwise operators, new tensors.
5. They start at the same slices of one tensor each, or at tensors that are the same for all of the first dimension.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor, fx

from fisedit_compile.passes.common.arguments import read_arguments
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.ir import eliminate_dead_code, insert_call, shape_of
from fisedit_compile.passes.common.meta import VALUE
from fisedit_compile.passes.common.reading.permutations import permutation
from fisedit_compile.passes.common.targets import PERMUTES, SOFTMAXES, aten, is_elementwise
from fisedit_compile.passes.normalise.matching.matrix_products import Unmatched, tensor_argument

NAME = "join_slices"
SCATTER = aten.slice_scatter.default
NEW_TENSORS = {aten.empty.memory_format, aten.zeros.default, aten.ones.default, aten.full.default}
BATCHED = {aten.bmm.default, aten.matmul.default}

#: First and last (exclusive) index of a slice along the first dimension.
Bounds = tuple[int, int]


def _bounds(node: fx.Node) -> Bounds | None:
    """Which part of the first dimension a slice takes or a slice_scatter writes, or None for another dimension."""
    given, shape = read_arguments(node), shape_of(tensor_argument(node))
    if given["dim"] % len(shape) != 0 or given["step"] != 1:
        return None
    start, stop, _ = slice(given["start"], given["end"]).indices(shape[0])
    return start, stop


def _written(node: fx.Node) -> fx.Node:
    """What a slice_scatter writes (condition 2)."""
    value = tensor_argument(node, 1)
    if value.target is not aten.copy.default:
        return value
    before, after = tensor_argument(value, 1), value.meta[VALUE]
    if shape_of(before) != tuple(after.shape) or before.meta[VALUE].dtype != after.dtype:
        raise Unmatched("what is written into a slice is cast or broadcast to it")
    return before


def _pieces(end: fx.Node) -> dict[Bounds, fx.Node]:
    """The slices of a chain in their order, and what is written there (conditions 1 and 2)."""
    found: dict[Bounds, fx.Node] = {}
    node, size = end, shape_of(end)[0]
    while node.target is SCATTER:
        bounds = _bounds(node)
        if bounds is None:
            raise Unmatched("a slice is written along another dimension than the first, or with steps")
        if bounds in found:
            raise Unmatched("the slices that are written overlap")
        found[bounds] = _written(node)
        if sum(stop - start for start, stop in found) >= size:
            break
        node = tensor_argument(node)
    ordered = dict(sorted(found.items()))
    edges = [(0, 0), *ordered, (size, size)]
    if any(before[1] != after[0] for before, after in pairwise(edges)):
        raise Unmatched(f"the slices that are written overlap, or do not cover all {size}")
    return ordered


def _inputs(node: fx.Node) -> list[fx.Node]:
    """The tensors a node reads, in the order of its arguments, each as often as it is read."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return found


def _structure(node: fx.Node) -> tuple[Any, ...]:
    """The operator and all of its arguments but the tensors."""
    if node.target in NEW_TENSORS:
        return node.target, shape_of(node)[1:], node.args[1:], node.kwargs
    return node.target, fx.node.map_arg((node.args, node.kwargs), lambda _: "tensor")


class _Joiner:
    """Makes values of whole tensors from those of their slices."""

    def __init__(self, bounds: list[Bounds], end: fx.Node) -> None:
        self.bounds, self.end = bounds, end
        self.size = bounds[-1][1]
        self.made: dict[tuple[fx.Node, ...], fx.Node] = {}

    def whole(self, values: tuple[fx.Node, ...]) -> fx.Node:
        """What the values of all slices are together.

        Raises:
            Unmatched: a condition does not hold.
        """
        if values not in self.made:
            self.made[values] = self._source(values) or self._computed(values)
        return self.made[values]

    def _source(self, values: tuple[fx.Node, ...]) -> fx.Node | None:
        """The tensor whose slices the values are, where they are slices (condition 5)."""
        if any(value.target is not aten.slice.Tensor for value in values):
            return None
        source = tensor_argument(values[0])
        if any(value.args[0] is not source for value in values) or shape_of(source)[0] != self.size:
            raise Unmatched("the slices are those of several tensors, or of one of another size")
        if [_bounds(value) for value in values] != self.bounds:
            raise Unmatched("slices are read in another place than they are written")
        return source

    def _computed(self, values: tuple[fx.Node, ...]) -> fx.Node:
        """The same operator over whole tensors (conditions 3 and 4)."""
        first = values[0]
        if first.op != "call_function" or not isinstance(first.meta.get(VALUE), Tensor):
            raise Unmatched(f"a slice is computed from {first.name}, which is no slice")
        if any(_structure(value) != _structure(first) for value in values[1:]):
            raise Unmatched("the slices are computed in different ways")
        if first.target in NEW_TENSORS:
            return self._new_tensor(values)
        operands = list(zip(*map(_inputs, values), strict=True))
        shared = [len(set(group)) == 1 for group in operands]
        self._check(first, shared)
        wholes = iter(
            group[0] if same and self._is_common(group[0], first) else self.whole(group)
            for group, same in zip(operands, shared, strict=True)
        )
        args, kwargs = fx.node.map_arg((first.args, first.kwargs), lambda _: next(wholes))
        return insert_call(self.end, first.target, *args, **kwargs)

    def _new_tensor(self, values: tuple[fx.Node, ...]) -> fx.Node:
        node = values[0]
        if [shape_of(value)[:1] for value in values] != [(stop - start,) for start, stop in self.bounds]:
            raise Unmatched("new tensors have other sizes than the slices")
        sizes = [self.size, *shape_of(node)[1:]]
        return insert_call(self.end, node.target, sizes, *node.args[1:], **node.kwargs)

    @staticmethod
    def _is_common(value: fx.Node, reader: fx.Node) -> bool:
        """Whether a value is the same for every index of the first dimension (condition 5)."""
        shape, rank = shape_of(value), len(shape_of(reader))
        return len(shape) < rank or shape[0] == 1

    @staticmethod
    def _check(node: fx.Node, shared: list[bool]) -> None:
        """Condition 4."""
        target, rank = node.target, len(shape_of(node))
        batched = False
        if target in BATCHED:
            batched = not any(shared) and rank > 2 and all(len(shape_of(value)) == rank for value in _inputs(node))
        elif target is aten.baddbmm.default:
            batched = not any(shared[1:])
        elif target is aten.einsum.default:
            inputs, _, result = str(node.args[0]).replace(" ", "").partition("->")
            batched = not any(shared) and "." not in inputs and {term[:1] for term in inputs.split(",")} == {result[:1]}
        elif target in SOFTMAXES:
            batched = read_arguments(node)["dim"] % rank != 0
        elif target in PERMUTES:
            batched = permutation(node, rank)[0] == 0
        elif is_elementwise(target):
            ranks = [len(shape_of(value)) for value in _inputs(node)]
            batched = all(same or size == rank for same, size in zip(shared, ranks, strict=True))
        if not batched:
            raise Unmatched(f"a slice is computed by {target}, which may mix the indices of the first dimension")


def _is_end(node: fx.Node) -> bool:
    return node.target is SCATTER and not any(user.target is SCATTER and user.args[0] is node for user in node.users)


def join_slices(compilation: Compilation) -> None:
    """Run the pass on the traced graph."""
    graph_module, report = compilation.edit, compilation.report
    for end in [node for node in graph_module.graph.nodes if _is_end(node)]:
        try:
            pieces = _pieces(end)
            values = tuple(pieces.values())
            whole = values[0] if len(values) == 1 else _Joiner(list(pieces), end).whole(values)
        except Unmatched as reason:
            report.miss(NAME, end, str(reason))
            continue
        end.replace_all_uses_with(whole)
        report.match(NAME)
    eliminate_dead_code(graph_module.graph)
    graph_module.recompile()
