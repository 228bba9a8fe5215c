"""What is folded into the batch stays a dimension of its own.

Why: transformers with windows cut the map, put the windows of all samples one behind the other,
``[B * windows, T, C]``, and take them apart again behind their attention. A value whose samples are merged with
something else has no layout that rows know. Kept apart, the windows are the positions of a coarser resolution (see
patches.py), and what lies within one are channels.

Before: ``y = linear(reshape(x, [B * n, T, C]), w)``; ``z = reshape(y, [B, n, T, C])``     (x ``[B, n, T, C]``)
After:  ``z = linear(x, w)``

Conditions:
1. The fold merges the samples, which are the first dimension or were permuted from there, with what is behind them; it
   is made from an input that is no parameter, and has as many samples as that.
2. An operator behind it treats the indices of the folded dimension alike: elementwise operators, linear layers,
   products, norms and reductions over other dimensions, attention, permutations, reshapes that keep it. Operands that
   are not folded have one element there, or all of them.
3. What any other operator reads is folded again; a reshape that does not keep the folded dimension reads the elements
   as they are.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from fisedit_compile.passes.common.arguments import read_arguments
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.ir import eliminate_dead_code, insert_call, shape_of
from fisedit_compile.passes.common.meta import VALUE
from fisedit_compile.passes.common.reading.permutations import permutation
from fisedit_compile.passes.common.targets import (
    CUTS,
    JOINS,
    LAST_DIMENSION_NORMS,
    PERMUTES,
    REDUCTIONS,
    RESHAPES,
    SLICES,
    SOFTMAXES,
    aten,
    is_elementwise,
)
from fisedit_compile.private.operators import schema_of

NAME = "unfold_windows"
PRODUCTS = {aten.matmul.default, aten.bmm.default}


@dataclass(frozen=True)
class Unfolded:
    """A value whose dimension ``dim`` is two here, of ``sizes``: samples, and what was merged with them.

    ``node`` has those two dimensions; its value is a list for operators with several results.
    """

    node: fx.Node
    dim: int
    sizes: tuple[int, int]

    @property
    def length(self) -> int:
        """Of the folded dimension."""
        return math.prod(self.sizes)

    def shape(self, folded: Sequence[int]) -> list[int]:
        """A shape with the folded dimension apart."""
        return [*folded[: self.dim], *self.sizes, *folded[self.dim + 1 :]]

    def of(self, dim: int) -> int:
        """Where another dimension of the folded value is."""
        return dim + (dim > self.dim)


def _samples(node: fx.Node) -> int:
    """Which dimension of a value are the samples: the first, unless it was permuted."""
    return permutation(node, len(shape_of(node))).index(0) if node.target in PERMUTES else 0


def _fold(node: fx.Node) -> tuple[int, int] | None:
    """The dimension in which a reshape merges samples with what is behind them, and with how much (condition 1)."""
    if node.target not in RESHAPES or not isinstance(node.args[0], fx.Node):
        return None
    before, after = shape_of(node.args[0]), shape_of(node)
    dim = _samples(node.args[0])
    if len(before) < dim + 3 or len(after) < dim + 2 or before[:dim] != after[:dim] or math.prod(before) == 0:
        return None
    merged = before[dim]
    for size in before[dim + 1 : -1]:
        merged *= size
        if merged == after[dim] and merged > before[dim]:
            return dim, merged // before[dim]
    return None


class _Unfolder:
    """Makes the unfolded values of one graph, in its order."""

    def __init__(self, batches: set[int], derived: set[fx.Node]) -> None:
        self.batches, self.derived = batches, derived
        self.known: dict[fx.Node, Unfolded] = {}
        self.folds: list[fx.Node] = []

    def visit(self, node: fx.Node) -> None:
        """Make a node's unfolded value if it has one, and let it read the unfolded values of its operands."""
        fold = _fold(node)
        source = node.args[0] if node.args else None
        if fold is not None and isinstance(source, fx.Node) and source not in self.known and source in self.derived:
            dim, count = fold
            batch, after = shape_of(source)[dim], shape_of(node)
            if batch in self.batches:
                sizes = (batch, count)
                new = insert_call(node, aten.reshape.default, source, [*after[:dim], *sizes, *after[dim + 1 :]])
                self.known[node] = Unfolded(new, dim, sizes)
                self.folds.append(node)
            return
        if not any(value in self.known for value in node.all_input_nodes):
            return
        if node.target in RESHAPES:
            self._reshape(node)
            return
        found = self._made(node)
        if found is not None:
            self.known[node] = found

    def _reshape(self, node: fx.Node) -> None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        found, before, after = self.known[source], shape_of(source), shape_of(node)
        leading = math.prod(before[: found.dim])
        for dim, size in enumerate(after):
            if math.prod(after[:dim]) != leading:
                continue
            if size == found.sizes[0] != found.length:
                break  # samples stand alone again
            if size == found.length:
                kept = Unfolded(found.node, dim, found.sizes)
                new = insert_call(node, aten.reshape.default, found.node, kept.shape(after))
                self.known[node] = Unfolded(new, dim, found.sizes)
                return
        new = insert_call(node, aten.reshape.default, found.node, list(after))
        node.replace_all_uses_with(new)
        self.derived.add(new)
        if _fold(new) is not None:  # more is merged with it
            self.visit(new)

    def _made(self, node: fx.Node) -> Unfolded | None:
        """The unfolded value of an operator (condition 2), or None."""
        target = node.target
        if target is operator.getitem:
            source = self.known[node.args[0]]  # type: ignore[index]
            new = insert_call(node, operator.getitem, source.node, node.args[1])
            return Unfolded(new, source.dim, source.sizes)
        if is_elementwise(target):
            return self._broadcast(node)
        if target in PRODUCTS:
            return self._product(node)
        if target is aten.scaled_dot_product_attention.default:
            return self._attention(node)
        if target in JOINS:
            return self._joined(node)
        first = node.args[0] if node.args else None
        others = [value for value in node.all_input_nodes if value is not first]
        if first not in self.known or any(value in self.known for value in others):
            return None
        return self._of_first(node, self.known[first])  # type: ignore[index]

    def _broadcast(self, node: fx.Node) -> Unfolded | None:
        """An elementwise operator: operands that are not folded are brought to the same dimensions."""
        if not isinstance(node.meta.get(VALUE), Tensor):
            return None
        rank = len(shape_of(node))
        operands = [value for value in node.all_input_nodes if isinstance(value.meta.get(VALUE), Tensor)]
        places = {
            (found.dim + rank - len(shape_of(value)), found.sizes)
            for value in operands
            if (found := self.known.get(value)) is not None
        }
        if len(places) != 1:
            return None
        ((dim, sizes),) = places
        changed = {value: self._aligned(node, value, dim, sizes, rank) for value in operands}
        if any(value is None for value in changed.values()):
            return None
        return self._called(node, changed, dim, sizes)  # type: ignore[arg-type]

    def _aligned(self, node: fx.Node, value: fx.Node, dim: int, sizes: tuple[int, int], rank: int) -> fx.Node | None:
        """An operand of a result of ``rank`` dimensions, of which ``dim`` is folded."""
        if (found := self.known.get(value)) is not None:
            return found.node
        shape = shape_of(value)
        place = dim - rank + len(shape)
        if place < 0:
            return value
        if shape[place] not in (1, math.prod(sizes)):
            return None
        parts = (1, 1) if shape[place] == 1 else sizes
        return insert_call(node, aten.reshape.default, value, [*shape[:place], *parts, *shape[place + 1 :]])

    def _called(self, node: fx.Node, changed: dict[fx.Node, fx.Node], dim: int, sizes: tuple[int, int]) -> Unfolded:
        def convert(value: Any) -> Any:
            return changed.get(value, value) if isinstance(value, fx.Node) else value

        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), convert)
        return Unfolded(insert_call(node, node.target, *args, **kwargs), dim, sizes)

    def _product(self, node: fx.Node) -> Unfolded | None:
        """A product of matrices, of which there is one for each index, or one for all."""
        left, right = node.args[:2]
        assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
        rank = len(shape_of(node))
        if min(len(shape_of(left)), len(shape_of(right))) < 2:
            return None
        if left in self.known and len(shape_of(right)) == 2:
            known = self.known[left]
            if right in self.known or known.dim == rank - 1:
                return None
            new = insert_call(node, aten.matmul.default, known.node, right)
            return Unfolded(new, known.dim, known.sizes)
        places = {
            (found.dim + rank - len(shape_of(value)), found.sizes)
            for value in (left, right)
            if (found := self.known.get(value)) is not None
        }
        if len(places) != 1:
            return None
        ((dim, sizes),) = places
        operands = [self._aligned(node, value, dim, sizes, rank) for value in (left, right)]
        if dim >= rank - 2 or any(value is None for value in operands):
            return None
        return Unfolded(insert_call(node, aten.matmul.default, *operands), dim, sizes)

    def _attention(self, node: fx.Node) -> Unfolded | None:
        """Attention with samples and windows in front; without heads, or with heads behind them."""
        given = read_arguments(node)
        operands = [given[name] for name in ("query", "key", "value")]
        found = [self.known.get(value) for value in operands]
        rank = len(shape_of(node))
        if any(value is None or (value.dim, value.sizes) != (0, found[0].sizes) for value in found):  # type: ignore[union-attr]
            return None
        if given["dropout_p"] or given.get("enable_gqa") or rank < 3 or len({len(shape_of(v)) for v in operands}) > 1:
            return None
        first = found[0]
        assert first is not None
        mask, masks = given["attn_mask"], []
        if mask is not None:
            if len(shape_of(mask)) > rank:
                return None
            aligned = self._aligned(node, mask, 0, first.sizes, rank)
            if aligned is None:
                return None
            masks = [aligned]
        nodes = [value.node for value in found if value is not None]
        options = {"is_causal": True} if given["is_causal"] else {}
        new = insert_call(node, node.target, *nodes, *masks, scale=given["scale"], **options)
        return Unfolded(new, 0, first.sizes)

    def _joined(self, node: fx.Node) -> Unfolded | None:
        values, rank = node.args[0], len(shape_of(node))
        assert isinstance(values, (list, tuple))
        found = [self.known.get(value) for value in values]  # type: ignore[arg-type]
        places = {None if value is None else (value.dim, value.sizes) for value in found}
        first = found[0]
        if len(places) != 1 or first is None:
            return None
        dim, stacked = int(read_arguments(node)["dim"]) % rank, node.target is aten.stack.default
        if dim == first.dim and not stacked:
            return None
        moved = first.dim + (stacked and dim <= first.dim)
        new = insert_call(node, node.target, [value.node for value in found if value], dim + (dim > moved))
        return Unfolded(new, moved, first.sizes)

    def _of_first(self, node: fx.Node, found: Unfolded) -> Unfolded | None:
        """An operator of which only the first operand is folded."""
        target, source = node.target, node.args[0]
        rank, given = len(shape_of(source)), read_arguments(node)  # type: ignore[arg-type]
        dim, sizes, rest = found.dim, found.sizes, list(given.values())[1:]
        if target in PERMUTES:
            order = permutation(node, rank)
            new_order = [place for old in order for place in ((dim, dim + 1) if old == dim else (found.of(old),))]
            return Unfolded(insert_call(node, aten.permute.default, found.node, new_order), order.index(dim), sizes)
        if target is aten.linear.default:
            return None if dim == rank - 1 else Unfolded(insert_call(node, target, found.node, *rest), dim, sizes)
        if target in LAST_DIMENSION_NORMS:
            whole = dim < rank - len(given["normalized_shape"])
            return self._called(node, {source: found.node}, dim, sizes) if whole else None  # type: ignore[dict-item]
        if target is aten.expand.default:
            if len(shape_of(node)) != rank or shape_of(node)[dim] != found.length:
                return None
            return Unfolded(insert_call(node, target, found.node, found.shape(shape_of(node))), dim, sizes)
        if target is aten.unsqueeze.default:
            place = int(given["dim"]) % (rank + 1)
            moved = dim + (place <= dim)
            return Unfolded(insert_call(node, target, found.node, place + (place > dim)), moved, sizes)
        if target in REDUCTIONS or target in SOFTMAXES or target in CUTS | SLICES or target is aten.squeeze.dim:
            return self._along(node, found, rank)
        return None

    def _along(self, node: fx.Node, found: Unfolded, rank: int) -> Unfolded | None:
        """Operators along named dimensions, which may vanish."""
        given, dim, target = read_arguments(node), found.dim, node.target
        named = given["dim"]
        dims = [int(named) % rank] if isinstance(named, int) else [int(other) % rank for other in named or ()]
        if not dims or dim in dims:
            return None
        given["dim"] = found.of(dims[0]) if isinstance(named, int) else [found.of(other) for other in dims]
        vanishing = target in (aten.unbind.int, aten.select.int) or bool(
            REDUCTIONS.get(target) and not given.get("keepdim")
        )
        if target is aten.squeeze.dim:
            vanishing = shape_of(node.args[0])[dims[0]] == 1  # type: ignore[arg-type]
        schema = schema_of(node.target).arguments
        args = [given[argument.name] for argument in schema[1:] if not argument.kwarg_only]
        kwargs = {argument.name: given[argument.name] for argument in schema if argument.kwarg_only}
        new = insert_call(node, target, found.node, *args, **kwargs)
        return Unfolded(new, dim - vanishing * sum(other < dim for other in dims), found.sizes)

    def fold_again(self) -> None:
        """Let everything else read folded values (condition 3); a fold that nothing reads apart stays as it is."""
        idle = {node for node in self.folds if not self.known[node].node.users}
        self.folds = [node for node in self.folds if node not in idle]
        for node, found in self.known.items():
            if isinstance(node.meta.get(VALUE), Tensor) and node not in idle:
                readers = [user for user in node.users if user not in self.known]
                if readers:
                    folded = insert_call(node, aten.reshape.default, found.node, list(shape_of(node)))
                    node.replace_all_uses_with(folded, delete_user_cb=readers.__contains__)


def unfold_windows(compilation: Compilation) -> None:
    """Run the pass on the traced graph; the report gets a match for each fold."""
    graph_module, report = compilation.edit, compilation.report
    graph = graph_module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    derived = {
        node
        for node, info in zip(placeholders, compilation.inputs, strict=True)
        if info.kind == "user" and isinstance(node.meta.get(VALUE), Tensor) and len(shape_of(node)) > 2
    }
    unfolder = _Unfolder({shape_of(node)[0] for node in derived}, derived)
    for node in list(graph.nodes):
        if node.op == "call_function":
            if any(value in derived for value in node.all_input_nodes):
                derived.add(node)
            unfolder.visit(node)
    unfolder.fold_again()
    for _ in unfolder.folds:
        report.match(NAME)
    eliminate_dead_code(graph)
    graph.lint()
    graph_module.recompile()
