"""Run a part of a graph on values in which positions are marked with NaN, to see what depends on what; a part of
probe_movement.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fisedit_compile.passes.common.ir import shape_of, spatial_of
from fisedit_compile.passes.common.layouts import Spatial
from fisedit_compile.passes.common.meta import VALUE
from fisedit_compile.passes.common.targets import OVERLOAD
from fisedit_compile.private.operators import short_name
from fisedit_compile.runtime.spec import Domain

#: What operators raise for values they cannot work with.
REFUSALS = (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError)
#: Most elements that all runs may make together; what would take more is not tried.
MOST_ELEMENTS = 1 << 32
#: Operators whose result has an order, or lies at places, that their values tell.
ORDERING = {
    "argsort",
    "grid_sampler",
    "grid_sampler_2d",
    "grid_sampler_3d",
    "histc",
    "kthvalue",
    "masked_select",
    "median",
    "mode",
    "msort",
    "nonzero",
    "searchsorted",
    "sort",
    "topk",
    "unique",
}
#: Operators that take indices.
INDEXING = {
    "embedding",
    "gather",
    "index",
    "index_add",
    "index_copy",
    "index_fill",
    "index_put",
    "index_select",
    "masked_scatter",
    "scatter",
    "scatter_add",
    "scatter_reduce",
    "take",
    "take_along_dim",
}
#: Operators behind which a NaN may be none.
FORGETTING = {"fmax", "fmin", "nan_to_num", "nanmean", "nanmedian", "nanquantile", "nansum"}
SEEDS = (0, 1)
#: The row of each row and the column of each column, -1 where nothing is read.
Tables = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Seen:
    """How a result's positions moved; ``tables`` None: they stay in place."""

    tables: Tables | None = None


class MarkedRun:
    """One region, run on values with marks.

    Args:
        region: the nodes to run, in their order; the last one is the result.
        sources: the maps that they read.
        layout: of the result.
        derived: all nodes that depend on a spatial input.
        constant: whether a value is the same at every call.
    """

    def __init__(
        self,
        region: Sequence[fx.Node],
        sources: Sequence[fx.Node],
        layout: Spatial,
        derived: Collection[fx.Node],
        constant: Callable[[fx.Node], bool],
    ) -> None:
        self._region, self._sources, self._layout = region, sources, layout
        self._derived, self._constant = derived, constant
        self._given: dict[fx.Node, Any] = {}

    def reason(self) -> str | None:
        """Why trying would not tell; None when it may."""
        value = self._region[-1].meta.get(VALUE)
        if not _has_nan(value):
            return "its result holds no floating numbers"
        for node in self._region:
            name = short_name(node.target).rstrip("_")
            if node.target is not operator.getitem and not isinstance(node.target, OVERLOAD):
                return f"{node.target} is no operator of PyTorch"
            if name in ORDERING:
                return f"its order or its places come from the values that {node.target} reads"
            if name in INDEXING and any(not self._constant(index) for index in _indices(node)):
                return f"{node.target} reads its indices from a tensor"
            if isinstance(node.target, OVERLOAD) and torch.Tag.nondeterministic_seeded in node.target.tags:
                return f"{node.target} draws random numbers"
        return None

    def look(self, chosen: Sequence[fx.Node]) -> Seen | str:
        """What the marks show, or why the movement is unknown."""
        source, target = size_of(chosen[0]), self._layout.domain.whole
        elements = sum(_elements(node) for node in (*self._region, *self._sources))
        if elements * len(SEEDS) * 2 * max(1, (source.size - 1).bit_length()) > MOST_ELEMENTS:
            return "it is too large to be tried out"
        try:
            answers = [self._once(chosen, source, target, seed) for seed in SEEDS]
        except REFUSALS as error:
            return f"trying it out failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        if answers[0] != answers[1]:
            return "it moves positions differently for other values"
        return answers[0]

    def _shows_all(self) -> bool:
        """Whether what is not NaN depends on no marked position: nothing on the way forgets that a value was NaN."""
        for node in self._region:
            values = node.meta.get(VALUE)
            several = values if isinstance(values, (list, tuple)) else (values,)
            if short_name(node.target).rstrip("_") in FORGETTING or not all(map(_has_nan, several)):
                return False
        return True

    def _once(self, chosen: Sequence[fx.Node], source: Domain, target: Domain, seed: int) -> Seen | str:
        generator = torch.Generator().manual_seed(seed)
        values = {node: self._value(node, generator) for node in self._sources}
        self._given = {
            other: self._value(other, generator)
            for node in self._region
            for other in node.all_input_nodes
            if other not in self._derived
        }
        coarse = coarse_size(source, target)
        if source != target and coarse is not None and self._keeps(chosen, values, source, target, coarse):
            return Seen()
        numbers = torch.arange(source.size).view(source.height, source.width)
        marked, seen = self._patterns(chosen, values, numbers, source.size)
        # Of several maps, what tables say of one leaves out what comes from the others.
        alone = len(self._sources) == 1 and self._shows_all()
        if alone and (tables := _tables(marked, seen, source)) is not None:
            return Seen(None if source == target and tables == _identity(target) else tables)
        if source != target:
            return "it changes the size, and no rule says how"
        return Seen() if _depends(marked, seen, numbers) else "its positions do not stay where they are"

    def _keeps(
        self, chosen: Sequence[fx.Node], values: dict[fx.Node, Tensor], source: Domain, target: Domain, coarse: Domain
    ) -> bool:
        """Whether each position of a result of another size depends on its own cell of the coarser size."""
        cells = torch.arange(coarse.size).view(coarse.height, coarse.width)
        marked, seen = self._patterns(chosen, values, _spread(cells, source), coarse.size)
        return _depends(marked, seen, _spread(cells, target))

    def _patterns(
        self, chosen: Sequence[fx.Node], values: dict[fx.Node, Tensor], numbers: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """Which positions became NaN where those are marked whose numbers have a bit, and where they have it not.

        Two bool tensors ``[bits, height, width]``.
        """
        found: list[list[Tensor]] = [[], []]
        for bit in range(max(1, (count - 1).bit_length())):
            for wanted in (1, 0):
                marks = (numbers >> bit & 1) == wanted
                marked = {node: _with_marks(values[node], node, marks) for node in chosen}
                found[1 - wanted].append(self._run({**values, **marked}))
        return torch.stack(found[0]), torch.stack(found[1])

    def _run(self, values: dict[fx.Node, Tensor]) -> Tensor:
        """Where the result is NaN in any channel of any sample, bool ``[height, width]``."""
        computed: dict[fx.Node, Any] = {**self._given, **values}
        with torch.no_grad():
            for node in self._region:
                args, kwargs = fx.map_arg((node.args, node.kwargs), computed.__getitem__)
                args, kwargs = fx.node.map_aggregate((args, kwargs), _on_processor)
                computed[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        result = computed[self._region[-1]].isnan()
        layout = self._layout
        rest = [dim for dim in range(result.dim()) if dim not in layout.space_dims]
        return result.amax(rest).view(layout.domain.height, layout.domain.width)

    def _value(self, node: fx.Node, generator: torch.Generator) -> Any:
        """A value of the kind that a node has; that of a constant."""
        value = node.meta.get(VALUE)
        if self._constant(node):
            return evaluate(node)
        if not isinstance(value, Tensor):
            return value
        shape = shape_of(node)
        if not value.is_floating_point():
            return torch.ones(shape, dtype=value.dtype) if value.is_complex() else torch.zeros(shape, dtype=value.dtype)
        return torch.rand(shape, generator=generator).add_(0.5).to(value.dtype)


def evaluate(node: fx.Node) -> Any:
    """A constant, computed."""
    owner = node.graph.owning_module
    computed: dict[fx.Node, Any] = {}
    stack = [node]
    while stack:
        value = stack[-1]
        waiting = [other for other in value.all_input_nodes if other not in computed]
        if waiting:
            stack += waiting
            continue
        if value.op == "get_attr":
            assert owner is not None
            computed[value] = _on_processor(operator.attrgetter(str(value.target))(owner))
        else:
            args, kwargs = fx.map_arg((value.args, value.kwargs), computed.__getitem__)
            args, kwargs = fx.node.map_aggregate((args, kwargs), _on_processor)
            computed[value] = value.target(*args, **kwargs)  # type: ignore[operator]
        stack.pop()
    return computed[node]


def _on_processor(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _indices(node: fx.Node) -> Iterator[fx.Node]:
    """The operands that hold integers or booleans."""
    for value in node.all_input_nodes:
        tensor = value.meta.get(VALUE)
        if isinstance(tensor, Tensor) and not (tensor.is_floating_point() or tensor.is_complex()):
            yield value


def size_of(node: object) -> Domain:
    """The size of a spatial value, wherever it lies."""
    spatial = spatial_of(node)
    assert spatial is not None
    return spatial.domain.whole


def _elements(node: fx.Node) -> int:
    values = node.meta.get(VALUE)
    several = values if isinstance(values, (list, tuple)) else (values,)
    return sum(value.numel() for value in several if isinstance(value, Tensor))


def coarse_size(source: Domain, target: Domain) -> Domain | None:
    """The coarser of two sizes of which one is a multiple of the other along each axis; None when there is none."""
    sizes = []
    for one, other in ((source.height, target.height), (source.width, target.width)):
        small, large = sorted((one, other))
        if large % small:
            return None
        sizes.append(small)
    return Domain(*sizes)


def _spread(cells: Tensor, size: Domain) -> Tensor:
    """The cell in which each position of a finer size lies."""
    rows, columns = size.height // cells.shape[0], size.width // cells.shape[1]
    return cells.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def _with_marks(value: Tensor, node: fx.Node, marks: Tensor) -> Tensor:
    """A map with NaN at the marked positions."""
    spatial = spatial_of(node)
    assert spatial is not None
    shape = [1] * value.dim()
    for dim in spatial.space_dims:
        shape[dim] = value.shape[dim]
    if not value.is_floating_point() and not value.is_complex():
        return value
    return value.masked_fill(marks.reshape(shape), math.nan)


def _has_nan(value: object) -> bool:
    """Whether a value is a tensor of a type that has NaN."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _identity(size: Domain) -> Tables:
    return tuple(range(size.height)), tuple(range(size.width))


def _tables(marked: Tensor, unmarked: Tensor, source: Domain) -> Tables | None:
    """The row of each row and the column of each column, if each position depends on one position or on none."""
    single, none = (marked ^ unmarked).all(0), ~(marked | unmarked).any(0)
    if not bool((single | none).all()) or not bool(single.any()):
        return None
    weights = (1 << torch.arange(marked.shape[0])).view(-1, 1, 1)
    position = torch.where(single, (marked * weights).sum(0), -1)
    rows = torch.where(position >= 0, position // source.width, -1)
    columns = torch.where(position >= 0, position % source.width, -1)
    table = rows.amax(1), columns.amax(0)
    inside = (table[0] >= 0)[:, None] & (table[1] >= 0)
    expected = torch.where(inside, table[0][:, None] * source.width + table[1], -1)
    if not bool((expected == position).all()):
        return None
    return tuple(table[0].tolist()), tuple(table[1].tolist())


def _depends(marked: Tensor, unmarked: Tensor, numbers: Tensor) -> bool:
    """Whether each position became NaN whenever its own number was marked."""
    bits = torch.arange(marked.shape[0]).view(-1, 1, 1)
    return bool(torch.where((numbers >> bits & 1) == 1, marked, unmarked).all())
