"""Which dimensions of a densely computed value follow the height and the width of the maps it was made from.

Why: behind an operator that no rule knows, a shape alone may fit several layouts (64 channels at 8x8). Run on empty
tensors of other heights, then of other widths, the operator shows which dimensions of its result are which. Nothing is
computed: the tensors are on the meta device.

A result is no proof where sizes are written into the operator, such as the target of a reshape, or come with an operand
that is not made from a map, such as a table of positions.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from fisedit_compile.passes.common.arguments import read_arguments
from fisedit_compile.passes.common.ir import spatial_of
from fisedit_compile.passes.common.layouts import HEIGHT, SPACE, WIDTH, Spatial, named_layout
from fisedit_compile.passes.common.meta import VALUE
from fisedit_compile.passes.common.targets import CONVOLUTIONS, OVERLOAD, RESHAPES, aten
from fisedit_compile.runtime.spec import Domain

#: A prime, so that a stretched size is none of the others.
STRETCH = 101
#: What operators raise for sizes they cannot work with.
REFUSALS = (RuntimeError, ValueError, IndexError, TypeError)

#: Operators whose numbers and weights are those of channels or windows; at a stretched size they refuse all others.
WEIGHTED = CONVOLUTIONS | {
    aten.batch_norm.default,
    aten.bmm.default,
    aten.einsum.default,
    aten.group_norm.default,
    aten.instance_norm.default,
    aten.layer_norm.default,
    aten.linear.default,
    aten.matmul.default,
    aten.rms_norm.default,
}
#: Arguments that count dimensions, not elements.
NAMES_OF_DIMENSIONS = {"dim", "dims", "dim0", "dim1", "source", "destination", "start_dim", "end_dim"}


class Unknown:
    """The answer when a probe proves nothing."""


UNKNOWN = Unknown()


def _leaves(value: Any) -> Iterator[Any]:
    """What lists and tuples hold, however nested."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


class SizeProbe:
    """Shapes of the values of one graph in stretched maps.

    Args:
        derived: all nodes that depend on a spatial input, these included.
        batch: of the spatial values.
        domains: known resolutions; may grow from outside.
    """

    def __init__(self, derived: Collection[fx.Node], batch: int, domains: Collection[Domain]) -> None:
        self._derived, self._batch, self._domains = derived, batch, domains
        # Results on maps of another height, and of another width; None where that is not known.
        self._results: dict[fx.Node, tuple[Any, Any] | None] = {}

    def layout(self, node: fx.Node) -> Spatial | Unknown | None:
        """Layout of a node that is computed densely, None when it is proven not to be spatial, or ``UNKNOWN``.

        Nodes must be asked in the order of the graph.
        """
        self._results[node] = self._run(node)
        return self._layout(node, self._results[node])

    def layout_by_maps(self, node: fx.Node) -> Spatial | None:
        """Layout of a node by those of its operands that are maps, whatever the sizes of the others may stand for.

        That is no proof: an operand of which nothing is known may follow the map as well, in dimensions of its own.
        None where no operand is a map, or the sizes of the result do not follow it.
        """
        if not any(spatial_of(value) is not None for value in node.all_input_nodes):
            return None
        found = self._layout(node, self._run(node, assume=True))
        return None if isinstance(found, Unknown) else found

    def _layout(self, node: fx.Node, results: tuple[Any, Any] | None) -> Spatial | Unknown | None:
        value = node.meta.get(VALUE)
        if results is None or not isinstance(value, Tensor):
            return UNKNOWN
        shape = tuple(map(int, value.shape))
        stretched = [tuple(result.shape) for result in results]
        if any(len(other) != len(shape) for other in stretched):
            return UNKNOWN
        return self._read(shape, *stretched)

    def _read(
        self, shape: tuple[int, ...], taller: tuple[int, ...], wider: tuple[int, ...]
    ) -> Spatial | Unknown | None:
        vertical = [dim for dim, size in enumerate(shape) if taller[dim] != size]
        horizontal = [dim for dim, size in enumerate(shape) if wider[dim] != size]
        both = [dim for dim in vertical if dim in horizontal]
        rows = [dim for dim in vertical if dim not in both]
        columns = [dim for dim in horizontal if dim not in both]
        if 0 in vertical or 0 in horizontal or shape[:1] != (self._batch,):
            return None
        # Of two dimensions of positions the first one counts: scores of attention are [..., queries, keys].
        if rows and columns:
            domain = Domain(shape[rows[0]], shape[columns[0]])
            names = {rows[0]: HEIGHT, columns[0]: WIDTH}
            return named_layout(domain, len(shape), names) if domain in self._domains else None
        if not both:
            return None
        fitting = [domain for domain in self._domains if domain.size == shape[both[0]]]
        if len(fitting) > 1:
            return UNKNOWN
        return named_layout(fitting[0], len(shape), {both[0]: SPACE}) if fitting else None

    def _run(self, node: fx.Node, assume: bool = False) -> tuple[Any, Any] | None:
        """Results of the node at both stretched sizes; None when they show nothing. With ``assume`` operands of which
        nothing is known keep their sizes."""
        target: Any = node.target
        runs = isinstance(target, OVERLOAD) or target is operator.getitem
        if not runs or target in RESHAPES or self._fixes_sizes(node):
            return None
        results = []
        for which in range(2):
            unknown: list[fx.Node] = []

            def operand(value: fx.Node, which: int = which, unknown: list[fx.Node] = unknown) -> Any:
                found = self._operand(value, which)
                given = value.meta.get(VALUE)
                if isinstance(found, Unknown) and assume and isinstance(given, Tensor):
                    return torch.empty(tuple(map(int, given.shape)), dtype=given.dtype, device="meta")
                if isinstance(found, Unknown):
                    unknown.append(value)
                return found

            args, kwargs = fx.map_arg((node.args, node.kwargs), operand)
            if unknown:
                return None
            try:
                results.append(target(*args, **kwargs))
            except REFUSALS:
                return None
        return results[0], results[1]

    def _operand(self, node: fx.Node, which: int) -> Any:
        """An operand at a stretched size: a tensor on the meta device, or several."""
        value, spatial = node.meta.get(VALUE), spatial_of(node)
        if spatial is None and node in self._derived:
            results = self._results.get(node)
            return UNKNOWN if results is None else results[which]
        if not isinstance(value, Tensor):
            return UNKNOWN if isinstance(value, torch.SymInt) else value
        shape = list(map(int, value.shape))
        if spatial is not None:
            dims = spatial.space_dims
            shape[dims[min(which, len(dims) - 1)]] *= STRETCH
        return torch.empty(shape, dtype=value.dtype, device="meta")

    def _fixes_sizes(self, node: fx.Node) -> bool:
        """Whether a size of a map is written into the node, or comes with an operand that was not made from a map."""
        if node.target in WEIGHTED or not isinstance(node.target, OVERLOAD):
            return False
        sizes = {size for domain in self._domains for size in (domain.height, domain.width, domain.size)} - {1}
        given = read_arguments(node)
        for value in _leaves([value for name, value in given.items() if name not in NAMES_OF_DIMENSIONS]):
            if isinstance(value, fx.Node):
                tensor = value.meta.get(VALUE)
                if value not in self._derived and isinstance(tensor, Tensor) and sizes.intersection(tensor.shape):
                    return True
            elif isinstance(value, int) and value in sizes:
                return True
        return False
