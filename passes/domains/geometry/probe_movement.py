"""Try out how an operator without a rule moves positions.

Why: behind such an operator a mask keeps its place only if every position of the result depends on the same position of
the map. No shape tells. So the operator, and what lies between it and the nearest maps, is run while compiling, at its
real sizes: positions are marked with NaN, one pattern for each bit of their numbers and one for its opposite, and the
result shows which of them it depends on.

A result has moved when each of its positions depends on a single one; it stays where it is when each depends on its
own one, whatever else it reads. Where neither holds, where two runs on different values differ, or where indices or an
order come from tensors that may be others at the next call, the movement is unknown.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fisedit_compile.passes.common.ir import shape_of, spatial_of
from fisedit_compile.passes.common.layouts import Spatial
from fisedit_compile.passes.common.meta import VALUE
from fisedit_compile.passes.common.targets import OVERLOAD
from fisedit_compile.passes.domains.geometry.marked_runs import (
    REFUSALS,
    MarkedRun,
    Seen,
    Tables,
    coarse_size,
    evaluate,
    size_of,
)
from fisedit_compile.runtime.spec import Domain


@dataclass(frozen=True)
class Found:
    """What was seen.

    Attributes:
        sources: the maps that the result was made from and whose positions it keeps.
        tables: the row of each row and the column of each column, -1 where nothing is read; None: it stays in place.
    """

    sources: tuple[fx.Node, ...]
    tables: Tables | None = None


class MovementProbe:
    """Tries out operators of one graph.

    Args:
        derived: all nodes that depend on a spatial input.
    """

    #: What was seen, by what was run.
    _seen: dict[str, Seen | str] = {}

    def __init__(self, derived: Collection[fx.Node]) -> None:
        self._derived = derived
        self._constant: dict[fx.Node, bool] = {}

    def movement(self, node: fx.Node, layout: Spatial) -> Found | str:
        """How the positions of a densely computed value moved, or why that is unknown."""
        region, sources = self._region(node)
        target = layout.domain.whole
        sizes = [size_of(source) for source in sources]
        chosen = [at for at, size in enumerate(sizes) if size == target]
        chosen = chosen or [at for at, size in enumerate(sizes) if coarse_size(size, target) is not None]
        if not chosen:
            return "it changes the size, and no rule says how"
        key = self._description(region, sources, layout)
        found = self._seen.get(key)  # another thread may clear it
        if found is None:
            if len(self._seen) > 1024:
                self._seen.clear()
            run = MarkedRun(region, sources, layout, self._derived, self.constant)
            found = self._seen[key] = run.reason() or run.look([sources[at] for at in chosen])
        return found if isinstance(found, str) else Found(tuple(sources[at] for at in chosen), found.tables)

    def resize_reads(self, node: fx.Node, source: Domain, target: Domain) -> tuple[Tensor, Tensor] | None:
        """Which rows each row of a resize reads, bool ``[target, source]``, and which columns each column.

        None where the operator cannot be run on maps of another width.
        """
        found = []
        for axis, (size, result) in enumerate(((source.height, target.height), (source.width, target.width))):
            own = torch.eye(size, dtype=torch.bool)[:, None, :, None]
            marks = torch.zeros(size, 1, size, 2).masked_fill_(own, math.nan)
            marks = marks.mT if axis else marks
            try:
                output = node.target(marks, *node.args[1:], **node.kwargs)  # type: ignore[operator]
            except REFUSALS:
                return None
            output = output[0] if isinstance(output, (tuple, list)) else output
            seen = output.isnan().flatten(0, 1).any(1 if axis else 2)  # [source, target]
            if seen.shape != (size, result):
                return None
            found.append(seen.T)
        return found[0], found[1]

    def _region(self, node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
        """What lies between a value and the nearest maps, in the order of the graph, and those maps."""
        region, sources = {node}, dict[fx.Node, None]()
        stack = [node]
        while stack:
            for value in stack.pop().all_input_nodes:
                if spatial_of(value) is not None:
                    sources[value] = None
                elif value in self._derived and value not in region:
                    region.add(value)
                    stack.append(value)
        ordered = [other for other in self._derived if other in region]
        return ordered, [other for other in self._derived if other in sources]

    def constant(self, node: fx.Node) -> bool:
        """Whether a value is the same at every call."""
        stack = [node]
        while stack:
            value = stack[-1]
            if value in self._constant:
                stack.pop()
                continue
            if value.op != "call_function":
                self._constant[value] = value.op == "get_attr" and _has_values(value)
                continue
            open_ones = [other for other in value.all_input_nodes if other not in self._constant]
            if open_ones:
                stack += open_ones
                continue
            random = isinstance(value.target, OVERLOAD) and torch.Tag.nondeterministic_seeded in value.target.tags
            self._constant[value] = not random and all(self._constant[other] for other in value.all_input_nodes)
        return self._constant[node]

    def _description(self, region: Sequence[fx.Node], sources: Sequence[fx.Node], layout: Spatial) -> str:
        """What would be run, in words that are the same for the same operators, arguments, constants and shapes."""
        names = {node: f"%{number}" for number, node in enumerate([*sources, *region])}

        def name(node: Any) -> Any:
            if not isinstance(node, fx.Node):
                return node
            if node in names:
                return _Name(names[node])
            value = node.meta.get(VALUE)
            if self.constant(node):
                return _Name(_content(evaluate(node)))
            return _Name(f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(value))

        lines = [f"{shape_of(source)} {source.meta[VALUE].dtype} {spatial_of(source)}" for source in sources]
        lines += [f"{node.target} {fx.node.map_aggregate((node.args, node.kwargs), name)}" for node in region]
        return "\n".join([*lines, str(layout)])


def _has_values(node: fx.Node) -> bool:
    """Whether an attribute of the graph's module is a tensor with values, or no tensor."""
    owner = node.graph.owning_module
    value = None if owner is None else operator.attrgetter(str(node.target))(owner)
    return not isinstance(value, Tensor) or type(value) in (Tensor, torch.nn.Parameter)


def _content(value: Any) -> str:
    """A constant in words."""
    if not isinstance(value, Tensor):
        return repr(value)
    flat = value.contiguous().reshape(-1).view(torch.uint8)
    return f"{tuple(value.shape)} {value.dtype} {hashlib.sha256(flat.numpy().tobytes()).hexdigest()}"


class _Name:
    """Stands for a node in text."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text
