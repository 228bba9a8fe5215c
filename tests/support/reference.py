"""The masked reference: what an edit must compute, by definition and without any cleverness.

A network is traced with ``torch.export``, which the package itself does not use, and interpreted node by node.  Every
operator runs densely on whole maps; after each one, positions outside the active set get their recorded value back.
The resolution of a value is recognised from its shape, so that test networks use heights, widths, their products,
channel counts and token counts that differ from each other.  Which positions of it are active is not decided by its
resolution, but by what they stand for: see ``canvas.py``.

Only values computed from a spatial input can be spatial.  A value is spatial when its first dimension is the batch and
two neighbouring dimensions are a known height and width, or one dimension is their product; when the heads of an
attention are folded into the batch, only the product is recognised.  Every other value is taken as it comes.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from support.exporting import exported
from support.fields import Field, input_field
from support.fields_of_graph import FieldFinder, permutation
from support.places import AmbiguousShapeError, Place, locate

__all__ = ["AmbiguousShapeError", "Place", "Recording", "Reference", "flatten", "locate", "reduce_mask"]

aten = torch.ops.aten

# Operators whose result may have a resolution that no input had, next to slices of maps; it is always [B, C, H, W].
RESAMPLING = (
    "conv2d",
    "conv_transpose2d",
    "pool2d",
    "upsample_",
    "pad",
    "pixel_shuffle",
    "pixel_unshuffle",
)


def covering(fine: int, coarse: int) -> Tensor:
    """``[coarse, fine]`` booleans: whether a coarse cell covers a fine one, also when there are more coarse cells."""
    first = [cell * fine // coarse for cell in range(coarse)]
    last = [-(-(cell + 1) * fine // coarse) for cell in range(coarse)]
    cells = torch.arange(fine)
    return torch.stack([(cells >= begin) & (cells < end) for begin, end in zip(first, last, strict=True)])


def reduce_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Positions of ``[B, height, width]`` that cover any active cell of the mask ``[B, H, W]``."""
    rows = covering(mask.shape[1], height).double()
    columns = covering(mask.shape[2], width).double()
    return (rows @ mask.double() @ columns.T) > 0


@dataclass
class Recording:
    """What one call computed: every node's value, and the statistics its group norms used.

    ``active`` are the active positions of each result of each node, None where it has no positions.
    """

    values: dict[str, Any]
    statistics: dict[str, tuple[Tensor, Tensor]]
    outputs: tuple[Tensor, ...]
    active: dict[str, tuple[Tensor | None, ...]] = field(default_factory=dict)


def height_and_width(value: Tensor) -> tuple[int, int]:
    """Resolution of ``[B, C, H, W]``."""
    return value.shape[2], value.shape[3]


def flatten(value: Any) -> tuple[Tensor, ...]:
    """The tensors of a result, in order."""
    if isinstance(value, Tensor):
        return (value,)
    if isinstance(value, dict):
        value = value.values()
    if isinstance(value, (tuple, list)) or hasattr(value, "__iter__"):
        return tuple(tensor for item in value for tensor in flatten(item))
    return ()


def flatten_nodes(value: Any) -> list[fx.Node]:
    """The nodes of an output, in order."""
    if isinstance(value, fx.Node):
        return [value]
    return [node for item in value for node in flatten_nodes(item)]


def group_norm_arguments(node: fx.Node, arguments: Sequence[Any]) -> tuple[int, Tensor | None, Tensor | None, float]:
    """Groups, weight, bias and epsilon of a group or instance norm node."""
    if node.target is aten.group_norm.default:
        padded = [*arguments, *(None, None, 1e-5)[len(arguments) - 2 :]]
        return padded[1], padded[2], padded[3], padded[4]
    return arguments[0].shape[1], arguments[1], arguments[2], arguments[7]


def group_statistics(value: Tensor, groups: int, epsilon: float) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal deviation ``[B, groups, 1]`` of a map ``[B, C, ...]``, in at least float32."""
    grouped = value.to(torch.promote_types(value.dtype, torch.float32)).reshape(value.shape[0], groups, -1)
    mean = grouped.mean(dim=2, keepdim=True)
    return mean, (grouped.var(dim=2, keepdim=True, unbiased=False) + epsilon).rsqrt()


def normalise(value: Tensor, groups: int, statistics: tuple[Tensor, Tensor], weight: Any, bias: Any) -> Tensor:
    """Group normalisation of a map ``[B, C, ...]`` with given statistics."""
    mean, reciprocal = statistics
    grouped = value.to(mean.dtype).reshape(value.shape[0], groups, -1)
    result = ((grouped - mean) * reciprocal).reshape(value.shape)
    channels = (1, -1) + (1,) * (value.dim() - 2)
    if weight is not None:
        result = result * weight.to(mean.dtype).reshape(channels)
    if bias is not None:
        result = result + bias.to(mean.dtype).reshape(channels)
    return result.to(value.dtype)


class Reference:
    """Runs a network as its dense self (``record``) and as an edit is defined (``edit``).

    Args:
        model: takes tensors by position and returns tensors, in any nesting.
        inputs: example inputs; their sizes are fixed.
        spatial: positions of the inputs that are maps.
        channels_last: whether those are ``[B, H, W, C]`` instead of ``[B, C, H, W]``.
        tokens: their resolution (H, W), when they are ``[B, H * W, C]``.
        norm: ``"exact"``, or ``"cached"`` for group norms that keep the recorded statistics.
        graph: the network as a graph of operators, with ``meta["val"]`` on every node; made from ``model`` otherwise.
        maps: the values that have positions are those of rank 4, ``[B, C, H, W]``, whatever their sizes.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Sequence[Tensor],
        spatial: Sequence[int] = (0,),
        norm: str = "exact",
        channels_last: bool = False,
        tokens: tuple[int, int] | None = None,
        graph: fx.GraphModule | None = None,
        maps: bool = False,
    ) -> None:
        self.module = exported(model, inputs) if graph is None else graph
        self.norm, self.maps = norm, maps
        self.nodes = list(self.module.graph.nodes)
        placeholders = [node for node in self.nodes if node.op == "placeholder"]
        assert len(placeholders) == len(inputs), "networks under test take tensors by position only"
        self.batch = inputs[spatial[0]].shape[0]
        maps = [inputs[position].movedim(-1, 1) if channels_last else inputs[position] for position in spatial]
        sizes = [tokens or height_and_width(value) for value in maps]
        self.finest = max(sizes, key=lambda size: size[0] * size[1])
        self.places = self._find_places({placeholders[position] for position in spatial}, set(sizes))
        self.fields = self._find_fields({placeholders[position] for position in spatial})
        self.results = flatten_nodes(self.module.graph.output_node().args[0])
        self.outputs = [(self.places.get(node.name, (None,))[0], node.meta["val"].dim()) for node in self.results]

    def _find_places(
        self, sources: set[fx.Node], resolutions: set[tuple[int, int]]
    ) -> dict[str, tuple[Place | None, ...]]:
        derived = set(sources)
        for node in self.nodes:
            if any(source in derived for source in node.all_input_nodes):
                derived.add(node)
        for node in self.nodes:
            if node not in derived or node.op != "call_function":
                continue
            results = [value for value in flatten(node.meta.get("val")) if value.dim() == 4]
            last = self._keeps_channels_last(node, resolutions)
            if last or self._leads_to_a_resolution(node, resolutions):
                resolutions |= {tuple(value.shape[1:3]) if last else height_and_width(value) for value in results}
        self.resolutions = sorted(resolutions)
        places: dict[str, tuple[Place | None, ...]] = {}
        joins: set[tuple[int, int, int, int]] = set()
        for node in self.nodes:
            if node not in derived or node.op == "output" or node.meta.get("val") is None:  # assertions have none
                continue
            if node.target is aten.cat.default:
                joins |= self._joins(node, places)
            places[node.name] = tuple(self._place(value, sorted(joins)) for value in flatten(node.meta["val"]))
        return places

    def _place(self, value: Tensor, joins: Sequence[tuple[int, int, int, int]]) -> Place | None:
        if self.maps:
            return Place(*height_and_width(value), 2, flattened=False) if value.dim() == 4 else None
        return locate(value.shape, self.batch, self.resolutions, joins)

    @staticmethod
    def _leads_to_a_resolution(node: fx.Node, resolutions: set[tuple[int, int]]) -> bool:
        """Whether the result of a node may have a resolution that no value had before."""
        if any(name in str(node.target) for name in RESAMPLING):
            return True
        first = node.args[0] if node.args else None
        first = first[0] if isinstance(first, (tuple, list)) and first else first
        value = first.meta.get("val") if isinstance(first, fx.Node) else None
        if not isinstance(value, Tensor) or value.dim() != 4 or height_and_width(value) not in resolutions:
            return False
        joins = node.target is aten.cat.default and node.args[1:] and node.args[1] % 4 > 1
        return joins or permutation(node) == [0, 1, 3, 2] or node.target is aten.slice.Tensor

    @staticmethod
    def _keeps_channels_last(node: fx.Node, resolutions: set[tuple[int, int]]) -> bool:
        """Whether a node pads or cuts a map ``[B, H, W, C]``."""
        source = node.args[0] if node.args else None
        value = source.meta.get("val") if isinstance(source, fx.Node) else None
        if "pad" not in str(node.target) and node.target is not aten.slice.Tensor:
            return False
        if not isinstance(value, Tensor) or value.dim() != 4:
            return False
        return tuple(value.shape[1:3]) in resolutions and height_and_width(value) not in resolutions

    def _find_fields(self, sources: set[fx.Node]) -> dict[str, tuple[Field, ...]]:
        """What the positions of each value stand for."""
        finder = FieldFinder(self.places, self.finest)
        for node in self.nodes:
            if node in sources:
                place = self.places[node.name][0]
                assert place is not None
                finder.fields[node.name] = (input_field(place.height, place.width, self.finest),)
            elif node.name in self.places:
                finder.add(node, flatten(node.meta["val"]))
        return finder.fields

    @staticmethod
    def _joins(node: fx.Node, places: dict[str, tuple[Place | None, ...]]) -> set[tuple[int, int, int, int]]:
        """Flattened positions joined with other tokens: (height, width, tokens before, tokens after)."""
        values = node.args[0]
        dimension = (node.args[1] if len(node.args) > 1 else 0) % node.meta["val"].dim()
        found = [places.get(value.name, (None,))[0] for value in values]
        known = [number for number, place in enumerate(found) if place is not None]
        if len(known) != 1 or not found[known[0]].flattened or found[known[0]].dimension != dimension:
            return set()
        lengths = [value.meta["val"].shape[dimension] for value in values]
        place = found[known[0]]
        return {(place.height, place.width, sum(lengths[: known[0]]), sum(lengths[known[0] + 1 :]))}

    def prepared(self, mask: Tensor) -> Tensor:
        """A mask ``[H, W]`` or ``[Bm, H, W]`` of any resolution as booleans ``[B, h, w]`` of the finest input's."""
        mask = mask.float() > 0
        mask = mask if mask.dim() == 3 else mask[None]
        assert self.batch % mask.shape[0] == 0
        return reduce_mask(mask, *self.finest).repeat(self.batch // mask.shape[0], 1, 1)

    def active(self, mask: Tensor) -> dict[str, tuple[Tensor | None, ...]]:
        """Active positions ``[B, h, w]`` of each result of each node, for a mask ``[H, W]`` or ``[Bm, H, W]``."""
        fine = self.prepared(mask)
        return {
            name: tuple(field.active(fine) if field.placed else None for field in fields)
            for name, fields in self.fields.items()
        }

    def returned(self, mask: Tensor) -> list[Tensor | None]:
        """For each output, the positions ``[B, h, w]`` that may change; None if it has none."""
        active, fine = self.active(mask), self.prepared(mask)
        return [
            None if place is None else active[node.name][0] & self.allowed(self.fields[node.name][0], fine)
            for node, (place, _) in zip(self.results, self.outputs, strict=True)
        ]

    def allowed(self, field: Field, fine: Tensor) -> Tensor:
        """The positions ``[B, h, w]`` of an output that the user's mask lets change: all, if it is not the picture."""
        alike = (field.height, field.width) == self.finest
        if any(sheet.is_whole or (alike and sheet.ends_near(*self.finest)) for sheet in field.sheets):
            return reduce_mask(fine, field.height, field.width)
        return torch.ones((len(fine), field.height, field.width), dtype=torch.bool)

    def with_norm(self, norm: str) -> Reference:
        """The same traced network under another ``norm`` option."""
        other = copy.copy(self)
        other.norm = norm
        return other

    def inside(self, mask: Tensor) -> list[Tensor | None]:
        """For each output, a boolean that broadcasts against it and is True in the active set; None if not spatial."""
        return [
            None if place is None or returned is None else place.view(returned, rank)
            for returned, (place, rank) in zip(self.returned(mask), self.outputs, strict=True)
        ]

    def record(self, inputs: Sequence[Tensor]) -> Recording:
        """The dense run."""
        return self._run(inputs, None, {})

    def edit(self, recording: Recording, inputs: Sequence[Tensor], mask: Tensor | None) -> Recording:
        """The masked run; its result can itself be edited. Without a mask, a dense run."""
        if mask is None:
            return self.record(inputs)
        if not self.prepared(mask).any():
            return recording
        edited = self._run(inputs, recording, self.active(mask))
        kept = zip(edited.outputs, recording.outputs, self.inside(mask), strict=True)
        edited.outputs = tuple(
            new if inside is None else new.clone().copy_(torch.where(inside, new, old)) for new, old, inside in kept
        )
        return edited

    def keep(self, name: str, new: Any, recorded: Any, active: Sequence[Tensor | None]) -> Any:
        """Put the recorded value of a node back outside the active set."""
        if isinstance(new, (tuple, list)):
            pieces = zip(new, recorded, self.places[name], active, strict=True)
            return tuple(self._keep_one(*piece) for piece in pieces)
        return self._keep_one(new, recorded, self.places[name][0], active[0])

    @staticmethod
    def _keep_one(new: Tensor, recorded: Tensor, place: Place | None, active: Tensor | None) -> Tensor:
        if place is None or active is None:
            return new
        kept = torch.where(place.view(active, new.dim()), new, recorded)
        return new.clone().copy_(kept)  # with the strides of the operator's result, which a later view relies on

    @torch.no_grad()
    def _run(
        self, inputs: Sequence[Tensor], recording: Recording | None, active: dict[str, tuple[Tensor | None, ...]]
    ) -> Recording:
        values: dict[str, Any] = {}
        statistics: dict[str, tuple[Tensor, Tensor]] = {}
        remaining = iter(inputs)
        for node in self.nodes:
            if node.op == "placeholder":
                value: Any = next(remaining).detach().clone()
            elif node.op == "get_attr":
                value = operator.attrgetter(str(node.target))(self.module)
            elif node.op == "output":
                outputs = fx.map_arg(node.args[0], lambda source: values[source.name])
                return Recording(values, statistics, flatten(outputs), active)
            else:
                value = self._call(node, values, statistics, recording)
            if recording is not None and node.name in self.places:
                value = self.keep(node.name, value, recording.values[node.name], active[node.name])
            values[node.name] = value
        raise AssertionError("a graph ends with its output")

    def _call(
        self,
        node: fx.Node,
        values: dict[str, Any],
        statistics: dict[str, tuple[Tensor, Tensor]],
        recording: Recording | None,
    ) -> Any:
        target: Any = node.target
        arguments: Any = fx.map_arg(node.args, lambda source: values[source.name])
        keywords: Any = fx.map_arg(node.kwargs, lambda source: values[source.name])
        if self.norm == "cached" and target in (aten.group_norm.default, aten.instance_norm.default):
            source = node.args[0]
            if isinstance(source, fx.Node) and self.places.get(source.name, (None,))[0] is not None:
                groups, weight, bias, epsilon = group_norm_arguments(node, arguments)
                known = None if recording is None else recording.statistics[node.name]
                statistics[node.name] = known or group_statistics(arguments[0], groups, epsilon)
                if recording is not None:
                    return normalise(arguments[0], groups, statistics[node.name], weight, bias)
        return target(*arguments, **keywords)
