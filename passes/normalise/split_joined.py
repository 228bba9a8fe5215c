"""What is joined along a dimension and cut apart again later is computed part by part.

Why: transformers join tokens of a prompt, or class and register tokens, with those of the picture, treat all of them
alike, and cut them apart at their end (Stable Diffusion 3, AuraFlow, vision transformers) or return them. Joined, they
are not the positions of a picture, and everything would stay dense, and what is returned would not be masked; part by
part, those of the picture are rows.

Before: ``j = cat([t, x], 1)``; ``y = linear(j, w)``; ``z = scaled_dot_product_attention(y, y, y)``;
        ``r = slice(z, 1, T, T + S)``
After:  ``a = linear(t, w)``; ``b = linear(x, w)``; ``k = cat([a, b], 1)``;
        ``r = scaled_dot_product_attention(b, k, k)``

Conditions:
1. Values are joined along another dimension than the first.
2. Between the join and the cut, operators treat the indices of that dimension alike: elementwise operators, linear
   layers and norms over other dimensions, permutations, reshapes that keep it, and attention, where it counts the
   queries and where a mask made of joined values is the same for all of them; or overwrite exactly one of the parts
   (rotary positions written into those of the picture).
3. The cut takes some of the elements. Or tokens ``[B, T, C]`` are joined and the graph returns the value as it is (a
   class token in front of the picture's), or attention is among the operators and something that is not reads their
   result: then the parts are joined again there.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from fisedit_compile.passes.common.arguments import read_arguments
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.ir import eliminate_dead_code, insert_call, shape_of
from fisedit_compile.passes.common.meta import VALUE
from fisedit_compile.passes.common.targets import RESHAPES, WRITES, aten, is_elementwise
from fisedit_compile.passes.normalise.matching.joined import Cut, Joined, behind, find_cuts, find_ends, written_part

NAME = "split_joined"
CATS = {aten.cat.default, aten.concat.default}


def _root(node: fx.Node) -> Joined | None:
    """A join of values (condition 1)."""
    values = node.args[0] if node.target in CATS else ()
    if not isinstance(values, (list, tuple)) or len(values) < 2 or math.prod(shape_of(node)) == 0:
        return None
    dim = int(read_arguments(node)["dim"]) % len(shape_of(node))
    if any(len(shape_of(value)) != len(shape_of(node)) for value in values):
        return None
    return Joined(dim, tuple(shape_of(value)[dim] for value in values)) if dim > 0 else None


class _Splitter:
    """Makes the parts of joined values where they are asked for, each once."""

    def __init__(self, joined: dict[fx.Node, Joined | list[Joined]], roots: set[fx.Node]) -> None:
        self.joined, self.roots = joined, roots
        self.parts: dict[tuple[fx.Node, int], fx.Node] = {}
        self.wholes: dict[fx.Node, fx.Node] = {}

    def whole(self, node: fx.Node) -> fx.Node:
        """All parts of a value, joined."""
        joined = self.joined.get(node)
        if not isinstance(joined, Joined) or node in self.roots:
            return node
        if node not in self.wholes:
            parts = [self.part(node, number) for number in range(len(joined.sizes))]
            self.wholes[node] = insert_call(node, aten.cat.default, parts, joined.dim)
        return self.wholes[node]

    def part(self, node: fx.Node, number: int) -> fx.Node:
        """One part of a value."""
        if node in self.roots:
            return node.args[0][number]  # type: ignore[index, return-value]
        if (node, number) not in self.parts:
            self.parts[node, number] = self._make(node, number)
        return self.parts[node, number]

    def _make(self, node: fx.Node, number: int) -> fx.Node:
        joined = self.joined[node]
        if node.target is aten.scaled_dot_product_attention.default:
            given = read_arguments(node)
            operands = (self.part(given["query"], number), self.whole(given["key"]), self.whole(given["value"]))
            mask = () if given["attn_mask"] is None else (self._mask(node, given["attn_mask"], number),)
            keywords = {"enable_gqa": True} if given.get("enable_gqa") else {}
            return insert_call(node, node.target, *operands, *mask, scale=given["scale"], **keywords)
        if node.target in RESHAPES or node.target is aten.expand.default:
            assert isinstance(joined, Joined)
            sizes = list(shape_of(node))
            sizes[joined.dim] = joined.sizes[number]
            target = aten.expand.default if node.target is aten.expand.default else aten.reshape.default
            return insert_call(node, target, self.part(node.args[0], number), sizes)  # type: ignore[arg-type]

        if node.target in WRITES and isinstance(joined, Joined) and written_part(node, joined) == number:
            return node.args[1]  # type: ignore[return-value]
        if node.target in WRITES:
            return self.part(node.args[0], number)  # type: ignore[arg-type]

        def convert(value: Any) -> Any:
            if not isinstance(value, fx.Node):
                return value
            if value in self.joined:
                return self.part(value, number)
            if is_elementwise(node.target) and isinstance(joined, Joined) and isinstance(value.meta.get(VALUE), Tensor):
                return self._share(node, value, joined, number)
            return value

        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), convert)
        return insert_call(node, node.target, *args, **kwargs)

    def _share(self, node: fx.Node, value: fx.Node, joined: Joined, number: int) -> fx.Node:
        """The share of a part in an operand that is not joined itself: positions of tokens, for one."""
        dim = joined.dim - len(shape_of(node)) + len(shape_of(value))
        if dim < 0 or shape_of(value)[dim] == 1:
            return value
        start = sum(joined.sizes[:number])
        return insert_call(node, aten.slice.Tensor, value, dim, start, start + joined.sizes[number])

    def _mask(self, node: fx.Node, mask: fx.Node, number: int) -> fx.Node:
        """What an attention's mask says of the queries of a part."""
        joined, rank = self.joined[node], len(shape_of(mask))
        assert isinstance(joined, Joined)
        whole = self.whole(mask)
        if rank < 2 or shape_of(mask)[-2] == 1:
            return whole
        start = sum(joined.sizes[:number])
        return insert_call(node, aten.slice.Tensor, whole, rank - 2, start, start + joined.sizes[number])

    def replace(self, cut: Cut) -> None:
        """Take a cut from its parts."""
        node, joined = cut.node, self.joined[cut.source]
        assert isinstance(joined, Joined)
        if node.target is aten.select.int:
            (elements,) = cut.elements
            part = self.part(cut.source, elements.number)
            node.replace_all_uses_with(insert_call(node, aten.select.int, part, joined.dim, elements.start))
            return
        pieces = []
        for number, start, stop in cut.elements:
            part = self.part(cut.source, number)
            if (start, stop) != (0, joined.sizes[number]):
                part = insert_call(node, aten.slice.Tensor, part, joined.dim, start, stop)
            pieces.append(part)
        new = pieces[0] if len(pieces) == 1 else insert_call(node, aten.cat.default, pieces, joined.dim)
        node.replace_all_uses_with(new)


def _analyse(
    nodes: Sequence[fx.Node], sizes: tuple[int, ...]
) -> tuple[dict[fx.Node, Joined | list[Joined]], set[fx.Node]]:
    """Which values hold parts of these sizes (condition 2), and the joins that they come from."""
    joined: dict[fx.Node, Joined | list[Joined]] = {}
    roots: set[fx.Node] = set()
    for node in nodes:
        if node.op != "call_function":
            continue
        found: Joined | list[Joined] | None = None
        if any(value in joined for value in node.all_input_nodes):
            source = joined.get(node.args[0]) if isinstance(node.args[0], fx.Node) else None
            several = node.target is operator.getitem and isinstance(source, list)
            found = source[node.args[1]] if several else behind(node, joined)  # type: ignore[index]
        if found is None and (root := _root(node)) is not None and root.sizes == sizes:
            found = root
            roots.add(node)
        if found is not None:
            joined[node] = found
    return joined, roots


def _split(nodes: Sequence[fx.Node], sizes: tuple[int, ...]) -> int:
    """Compute part by part what is joined of parts of these sizes; returns the number of cuts and ends."""
    joined, roots = _analyse(nodes, sizes)
    splitter = _Splitter(joined, roots)
    ends = find_ends(nodes, joined, roots)
    cuts = [
        cut
        for node, value in joined.items()
        if isinstance(value, Joined)
        for cut in find_cuts(node, value, node in roots)
    ]
    for cut in cuts:
        splitter.replace(cut)
    for node in ends:
        splitter.whole(node)
    # Whoever else reads a value that is now made part by part reads the parts joined: nothing is computed twice.
    made: set[fx.Node] = set()
    while missing := {node for node, _ in splitter.parts} - made:
        made |= missing
        for node in sorted(missing):  # in the order of the graph
            splitter.whole(node)
    for node, whole in splitter.wholes.items():
        node.replace_all_uses_with(whole)
    return len(cuts) + len(ends)


def split_joined(compilation: Compilation) -> None:
    """Run the pass on the traced graph."""
    graph_module, report = compilation.edit, compilation.report
    graph = graph_module.graph
    found = [root.sizes for node in graph.nodes if (root := _root(node)) is not None]
    # One way of joining at a time: a value may be made of parts in several dimensions (rotary embeddings in channels).
    for sizes in dict.fromkeys(found):
        for _ in range(_split(list(graph.nodes), sizes)):
            report.match(NAME)
        eliminate_dead_code(graph)
    graph.lint()
    graph_module.recompile()
