"""The field of every value of a graph: links and sheets by the rules of ``movement.py``, or by trying the operator."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from support.canvas import Sheet, join, meet
from support.fields import Field, Link, cones_of
from support.movement import Moves, arguments_of, moves_of
from support.places import Place

#: Operators that leave every position where it is and read nothing else: next to those that PyTorch calls pointwise.
LAYOUT = {
    "alias", "cat", "clone", "contiguous", "detach", "dropout", "expand", "expand_as", "feature_dropout", "flatten",
    "lift_fresh_copy", "permute", "repeat", "reshape", "slice", "split", "chunk", "split_with_sizes", "squeeze",
    "stack", "to", "transpose", "type_as", "unbind", "unflatten", "unsqueeze", "view", "_to_copy", "_unsafe_view",
    "select", "narrow", "movedim", "swapaxes",
}  # fmt: skip
#: Products whose output has the positions of one operand, which is not the first.
OPERAND = {"baddbmm": 1, "addmm": 1, "addbmm": 1}
PRODUCTS = {"bmm", "matmul", "mm", "einsum", "scaled_dot_product_attention", *OPERAND}


Source = tuple[str, int, Field, Place | None]


def name_of(node: fx.Node) -> str:
    """The operator's name without its namespace and overload."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[1] if schema is not None else str(node.target)


def everything(target: tuple[int, int], source: Field) -> tuple[Tensor, Tensor]:
    """Reads of every position by every position."""
    sizes = zip(target, (source.height, source.width), strict=True)
    rows, columns = (torch.ones(pair, dtype=torch.bool) for pair in sizes)
    return rows, columns


def identity(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Reads of the same position."""
    return torch.eye(size[0], dtype=torch.bool), torch.eye(size[1], dtype=torch.bool)


class FieldFinder:
    """Makes the fields of one node after the other.

    Args:
        places: where each value keeps its positions, by node name, one for each of its results.
        cells: height and width of the mask.
    """

    def __init__(self, places: Mapping[str, Sequence[Place | None]], cells: tuple[int, int]) -> None:
        self.places, self.cells = places, cells
        self.fields: dict[str, tuple[Field, ...]] = {}

    def add(self, node: fx.Node, results: Sequence[Tensor]) -> None:
        """Find the fields of a node that reads a value with one."""
        places = self.places[node.name]
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            number = node.args[1]
            source = self.fields[node.args[0].name][number]  # type: ignore[index]
            place = places[0]
            if source.placed and place is not None:
                link = Link(node.args[0].name, number, *identity((source.height, source.width)))  # type: ignore[arg-type]
                self.fields[node.name] = (self._field(place, source.sheets, (link,)),)
                return
        sources: list[Source] = [
            (value.name, number, field, self.places[value.name][number])
            for value in node.all_input_nodes
            if value.name in self.fields
            for number, field in enumerate(self.fields[value.name])
        ]
        self.fields[node.name] = tuple(
            self._one(node, number, place, results, sources) for number, place in enumerate(places)
        )

    def _field(self, place: Place | None, sheets: Sequence[Sheet], links: Sequence[Link]) -> Field:
        cones = cones_of(links, (self.fields[link.source][link.number] for link in links))
        height, width = (place.height, place.width) if place is not None else (1, 1)
        for sheet in sheets if place is not None else ():
            lengths = (sheet.rows.length, sheet.columns.length)
            assert lengths == (height, width), f"canvases of {lengths} positions for a map of {height}x{width}"
        return Field(height, width, tuple(sheets), cones, tuple(links), self.cells, placed=place is not None)

    def _one(
        self, node: fx.Node, number: int, place: Place | None, results: Sequence[Tensor], sources: Sequence[Source]
    ) -> Field:
        if place is None:
            links = [Link(name, at, *everything((1, 1), field)) for name, at, field, _ in sources]
            same = [sheet for *_, field, _ in sources for sheet in field.sheets]
            sizes = {(sheet.rows.size, sheet.columns.size) for sheet in same}
            height, width = max(sizes)
            return self._field(None, meet(sheet.resized(height, width) for sheet in same), links)
        first = next((source for source in sources if source[0] == getattr(first_argument(node), "name", None)), None)
        if first is not None and first[3] is not None:
            found = self._swapped(node, place, first)
            found = found or self._moved(node, number, place, results, first, sources)
            if found is not None:
                return found
        if name_of(node) == "cat":
            found = self._joined(node, place)
            if found is not None:
                return found
        if name_of(node) == "slice_scatter":
            found = self._written(node, place)
            if found is not None:
                return found
        return self._stays(node, place, results[number], sources)

    def _swapped(self, node: fx.Node, place: Place, first: Source) -> Field | None:
        """An exchange of the axes."""
        name, number, field, source = first
        order = permutation(node)
        if order is None or source is None or source.flattened or place.flattened:
            return None
        row, column = order.index(source.dimension), order.index(source.dimension + 1)
        if (row, column) != (place.dimension + 1, place.dimension):
            return None
        link = Link(name, number, *identity((field.width, field.height)), swapped=True)
        return self._field(place, [sheet.swapped() for sheet in field.sheets], (link,))

    def _moved(
        self,
        node: fx.Node,
        number: int,
        place: Place,
        results: Sequence[Tensor],
        first: Source,
        sources: Sequence[Source],
    ) -> Field | None:
        """What a rule says of operators that move positions or change their number."""
        name, at, field, source = first
        moves = moves_of(node, results)
        if moves is None or source is None:
            return None
        found: Moves = moves[number]
        if source.flattened:
            if not place.flattened or name_of(node) != "flip" or source.dimension not in found:
                return None
            sheets = [
                replace(sheet, rows=sheet.rows.reversed(), columns=sheet.columns.reversed()) for sheet in field.sheets
            ]
            rows, columns = (reads.flip(0) for reads in identity((field.height, field.width)))
            return self._field(place, sheets, (Link(name, at, rows, columns),))
        axes = [found.get(source.dimension), found.get(source.dimension + 1)]
        if place.flattened or axes == [None, None]:
            return None
        same = identity((field.height, field.width))
        reads = [same[axis] if move is None else move.reads for axis, move in enumerate(axes)]
        if (len(reads[0]), len(reads[1])) != (place.height, place.width):
            return None
        sheets = [
            replace(
                sheet,
                rows=axes[0].canvas(sheet.rows) if axes[0] is not None else sheet.rows,
                columns=axes[1].canvas(sheet.columns) if axes[1] is not None else sheet.columns,
            )
            for sheet in field.sheets
        ]
        others = [
            Link(other, count, *everything((place.height, place.width), value))
            for other, count, value, _ in sources
            if (other, count) != (name, at)
        ]
        return self._field(place, meet(sheets), (Link(name, at, reads[0], reads[1]), *others))

    def _joined(self, node: fx.Node, place: Place) -> Field | None:
        """A concatenation along an axis of the map."""
        given = arguments_of(node)
        values = given["tensors"]
        dimension = given["dim"] % values[0].meta["val"].dim()
        if place.flattened or dimension not in (place.dimension, place.dimension + 1):
            return None
        fields = [self.fields.get(value.name, (None,))[0] for value in values]
        if any(field is None or not field.placed for field in fields):
            return None
        along_rows = dimension == place.dimension
        links, start = [], 0
        for value, field in zip(values, fields, strict=True):
            assert field is not None
            same = list(identity((field.height, field.width)))
            axis = 0 if along_rows else 1
            total = place.height if along_rows else place.width
            longer = torch.zeros((total, len(same[axis])), dtype=torch.bool)
            longer[start : start + len(same[axis])] = same[axis]
            start += len(same[axis])
            same[axis] = longer
            links.append(Link(value.name, 0, *same))
        return self._field(place, join([field.sheets for field in fields if field is not None], along_rows), links)

    def _written(self, node: fx.Node, place: Place) -> Field | None:
        """A map of which rows or columns without gaps between them are written over by another map: what is left on
        both sides and that map, joined."""
        given = arguments_of(node)
        names = [value.name for value in node.args[:2] if isinstance(value, fx.Node)]
        whole, part = (self.fields.get(name, (None,))[0] for name in names)
        if whole is None or part is None or not (whole.placed and part.placed) or place.flattened:
            return None
        axis = given["dim"] % node.meta["val"].dim() - place.dimension
        if axis not in (0, 1) or given["step"] != 1:
            return None
        size = (place.height, place.width)[axis]
        start, end, _ = slice(given["start"], given["end"]).indices(size)
        before, after = (
            [self._cropped(sheet, axis, size, *ends) for sheet in whole.sheets] if ends[0] < ends[1] else []
            for ends in ((0, start), (end, size))
        )
        inside = torch.zeros(size, dtype=torch.bool)
        inside[start:end] = True
        everywhere = torch.eye(size, dtype=torch.bool)
        links = []
        for name, field, kept in (
            (names[0], whole, everywhere & ~inside[:, None]),
            (names[1], part, everywhere[:, start:end]),
        ):
            reads = list(identity((field.height, field.width)))
            reads[axis] = kept
            links.append(Link(name, 0, *reads))
        sheets = join([sheets for sheets in (before, list(part.sheets), after) if sheets], axis == 0)
        return self._field(place, sheets, links)

    @staticmethod
    def _cropped(sheet: Sheet, axis: int, size: int, start: int, end: int) -> Sheet:
        """A stretch of a sheet along an axis."""
        if axis == 0:
            return replace(sheet, rows=sheet.rows.extended(-start, end - size))
        return replace(sheet, columns=sheet.columns.extended(-start, end - size))

    def _stays(self, node: fx.Node, place: Place, result: Tensor, sources: Sequence[Source]) -> Field:
        """An operator without a rule: its positions are those of the inputs of its size."""
        size = (place.height, place.width)
        alike = [source for source in sources if source[2].placed and (source[2].height, source[2].width) == size]
        kept = alike or [source for source in sources if source[2].placed] or list(sources)
        if name_of(node) in PRODUCTS:
            wanted = getattr(node.args[OPERAND.get(name_of(node), 0)], "name", None)
            kept = [source for source in kept if source[0] == wanted] or kept[:1]
        links = []
        for name, number, field, source in sources:
            reads = everything(size, field)
            if source is not None and (field.height, field.width) == size:
                known = name_of(node) in LAYOUT or torch.Tag.pointwise in getattr(node.target, "tags", ())
                reads = identity(size) if known else tried(node, name, source, place, result)
            links.append(Link(name, number, *reads))
        sheets = meet(sheet.resized(*size) for source in kept for sheet in source[2].sheets)
        return self._field(place, sheets, links)


def first_argument(node: fx.Node) -> Any:
    """The first argument, or None."""
    return node.args[0] if node.args else None


def permutation(node: fx.Node) -> list[int] | None:
    """Where the dimensions of a transposition come from; None for other operators."""
    name, source = name_of(node), first_argument(node)
    if name not in ("transpose", "permute", "swapaxes") or not isinstance(source, fx.Node):
        return None
    rank = source.meta["val"].dim()
    if name == "permute":
        return [dimension % rank for dimension in arguments_of(node)["dims"]]
    order = list(range(rank))
    first, second = (int(dimension) % rank for dimension in node.args[1:3])  # type: ignore[arg-type]
    order[first], order[second] = order[second], order[first]
    return order


def example(value: Any) -> Any:
    """Values for a node's arguments: random ones between 0.5 and 1.5, zeros for integers."""
    if not isinstance(value, Tensor):
        return value
    if not value.dtype.is_floating_point:
        return torch.zeros(value.shape, dtype=value.dtype)
    return (torch.rand(value.shape) + 0.5).to(value.dtype)


def positions_first(value: Tensor, place: Place) -> Tensor | None:
    """``[h, w, ...]``; None where tokens were added or heads folded."""
    if place.folds != 1 or place.before or place.after or value.dim() <= place.dimension:
        return None
    if place.flattened:
        return value.movedim(place.dimension, 0).unflatten(0, (place.height, place.width))
    return value.movedim((place.dimension, place.dimension + 1), (0, 1))


def tried(node: fx.Node, name: str, source: Place, place: Place, result: Tensor) -> tuple[Tensor, Tensor]:
    """How an operator without a rule reads an input of its own size: a NaN at some positions shows.

    What reaches no other position reads the same position; what stays in its row or column reads that; everything else
    counts as reading everything.
    """
    size = (place.height, place.width)
    ones = torch.ones(size[0], size[0], dtype=torch.bool), torch.ones(size[1], size[1], dtype=torch.bool)
    same = identity(size)
    in_row, in_column = True, True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        for row, column in ((0, 0), (size[0] // 2, size[1] // 2), (size[0] - 1, size[1] // 3)):
            values = {
                value.name: fx.node.map_aggregate(value.meta["val"], example)  # type: ignore[arg-type]
                for value in node.all_input_nodes
            }
            marked = positions_first(values[name], source) if isinstance(values[name], Tensor) else None
            if marked is None or not marked.dtype.is_floating_point:
                return ones
            marked[row, column] = float("nan")
            arguments = fx.map_arg((node.args, node.kwargs), lambda value: values[value.name])  # noqa: B023
            outcome = node.target(*arguments[0], **arguments[1])  # type: ignore[operator]
            outcome = outcome if isinstance(outcome, Tensor) else outcome[0]
            seen = positions_first(outcome, place) if outcome.shape == result.shape else None
            if seen is None or not outcome.dtype.is_floating_point:
                return ones
            reached = seen.isnan().flatten(2).any(2)
            reached[row, column] = False
            in_row &= not bool(reached.sum() - reached[row].sum())
            in_column &= not bool(reached.sum() - reached[:, column].sum())
    return (same[0] if in_row else ones[0], same[1] if in_column else ones[1])
