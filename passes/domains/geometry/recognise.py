"""Tell what a value is that no rule inferred: a map again, or not spatial, or one that could be either.

Why: a map that is taken for something else is computed anew as a whole, and an edit would then change positions outside
the mask. Shapes alone do not tell: 64 channels at 8x8 may be positions, 8 channels may be a height.

What counts, the strongest first:
1. The result of padding, pooling or resizing a map is a map. A reshape that a rule refused is none, unless the graph
   returns it: then what comes next decides.
2. Sizes that follow those of the operands (size_probe.py): proof for it or against it.
3. The nearest spatial value that it was made from and that has the same shape has the same layout.
4. Its readers: a convolution has the channels in dimension 1, a linear layer in the last one, an addition has operands
   of one layout.
5. Its shape, when it fits one layout only and no number of channels can be taken for a height, a width or positions.

What never counts: a value whose first dimension is samples merged with something else (heads folded into the batch), or
was cut out of such a one, however long it is.

A value that passes none of them although its shape fits is ``doubtful``: it is treated as not spatial, which is right
for every use but one. A graph that returns such a value stays dense as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from itertools import combinations

from torch import Tensor, fx

from fisedit_compile.passes.common.arguments import read_arguments
from fisedit_compile.passes.common.ir import reads_spatial, shape_of, spatial_of
from fisedit_compile.passes.common.layouts import CHANNEL, NCHW, SPACE, Dimension, Spatial, candidate_layouts
from fisedit_compile.passes.common.meta import SPATIAL, VALUE
from fisedit_compile.passes.common.reading.permutations import permutation
from fisedit_compile.passes.common.targets import (
    ANCHORS,
    JOINS,
    PERMUTES,
    RESHAPES,
    RESOLUTION_CHANGES,
    aten,
    is_elementwise,
)
from fisedit_compile.passes.domains.geometry.size_probe import SizeProbe, Unknown
from fisedit_compile.runtime.spec import Domain

#: Anchors that work on the last dimensions, whatever these are.
PADS = {aten.pad.default, aten.constant_pad_nd.default}


def _sources(node: fx.Node, derived: Collection[fx.Node]) -> list[fx.Node]:
    """The nearest spatial values a node was made from, nearest first."""
    found: list[fx.Node] = []
    seen = {node}
    level = [node]
    while level:
        behind: list[fx.Node] = []
        for value in dict.fromkeys(value for other in level for value in other.all_input_nodes):
            if value in seen or value not in derived:
                continue
            seen.add(value)
            (behind if spatial_of(value) is None else found).append(value)
        level = behind
    return found


def _may_be_channels(candidate: Spatial, sources: Collection[fx.Node]) -> bool:
    """Whether a size that ``candidate`` takes for one of space may be one of channels, or of channels and space."""
    domain = candidate.domain
    for source in sources:
        spatial, shape = spatial_of(source), shape_of(source)
        if spatial is None:
            continue
        channels = [shape[dim] for dim in spatial.channel_dims if shape[dim] > 1]
        if candidate.space_rank == 2:
            if {domain.height, domain.width} & set(channels):
                return True
            continue
        sizes = [*channels, *(shape[dim] for dim in spatial.space_dims)]
        space = set(range(len(channels), len(sizes)))
        for count in range(1, len(sizes) + 1):
            for chosen in combinations(range(len(sizes)), count):
                if set(chosen) != space and math.prod(sizes[at] for at in chosen) == domain.size:
                    return True
    return False


def _agrees(reader: fx.Node, value: fx.Node, candidate: Spatial, dims: tuple[Dimension, ...]) -> bool | None:
    """Whether a reader takes the dimensions of ``value`` for what ``dims`` says; None when it shows nothing."""
    if reader.target in (aten.linear.default, aten.layer_norm.default, aten.rms_norm.default):
        if reader.args[0] is not value:
            return None
        count = 1 if reader.target is aten.linear.default else len(read_arguments(reader)["normalized_shape"])
        return all(name == CHANNEL for name in dims[-count:])
    if reader.target is aten.scaled_dot_product_attention.default and value in reader.args[:3]:
        return dims[-2:] == (SPACE, CHANNEL)
    if reader.target in ANCHORS - PADS and reader.args[0] is value:
        return dims == NCHW if len(dims) == 4 else dims[1] == CHANNEL
    if is_elementwise(reader.target) or reader.target in JOINS:
        others = [other.at() for other in map(spatial_of, reader.all_input_nodes) if other is not None]
        same_rank = [other for other in others if len(other.dims) == len(dims)]
        return any(other == candidate.with_dims(dims) for other in same_rank) if same_rank else None
    return None


def _supported(node: fx.Node, candidate: Spatial) -> bool | None:
    """Whether all readers that show something, behind elementwise operators and permutations, agree with a layout."""
    stack = [(node, candidate.dims)]
    seen: set[tuple[fx.Node, tuple[str, ...]]] = set()
    answers: list[bool] = []
    while stack:
        value, dims = stack.pop()
        if (value, dims) in seen:
            continue
        seen.add((value, dims))
        for reader in value.users:
            answer = _agrees(reader, value, candidate, dims)
            if answer is not None:
                answers.append(answer)
            elif reader.target in PERMUTES:
                stack.append((reader, tuple(dims[dim] for dim in permutation(reader, len(dims)))))
            elif is_elementwise(reader.target) and len(shape_of(reader)) == len(dims):
                stack.append((reader, dims))
    return all(answers) if answers else None


class Recogniser:
    """Recognises the values of one graph that were computed densely.

    Args:
        derived: all nodes that depend on a spatial input, these included.
        batch: of the spatial values.
        domains: known resolutions; a recognised one is added.

    Attributes:
        batch: of the spatial values.
        probe: has been asked about every node that was to be recognised.
        doubtful: values that may be maps or not.
    """

    def __init__(self, derived: Collection[fx.Node], batch: int, domains: set[Domain]) -> None:
        self._derived, self._domains = derived, domains
        self.batch, self.probe = batch, SizeProbe(derived, batch, domains)
        self._folded: set[fx.Node] = set()
        self.doubtful: list[fx.Node] = []

    def recognise(self, node: fx.Node) -> None:
        """Annotate a node that no rule inferred, when it is a map again. In the order of the graph."""
        proof = self.probe.layout(node)
        if self._is_folded(node):
            self._folded.add(node)
            return
        if not isinstance(node.meta.get(VALUE), Tensor):
            return
        layout = self._resized(node)
        refused = node.target in RESHAPES and reads_spatial(node)
        if layout is None and not (refused and all(user.op != "output" for user in node.users)):
            layout = self._guess(node) if isinstance(proof, Unknown) else proof
        if layout is not None:
            node.meta[SPATIAL] = layout
            self._domains.add(layout.domain)

    def _is_folded(self, node: fx.Node) -> bool:
        """Whether the first dimension is samples merged with something else, or cut out of that."""
        if node.target in RESHAPES:
            source = node.args[0]
            before, after = shape_of(source), shape_of(node)  # type: ignore[arg-type]
            if before[:1] != after[:1]:
                return before[:1] == (self.batch,) and after[:1] > before[:1]
            return source in self._folded
        if node.target in PERMUTES:
            return node.args[0] in self._folded and permutation(node, len(shape_of(node)))[0] == 0
        return any(value in self._folded for value in node.all_input_nodes)

    def _resized(self, node: fx.Node) -> Spatial | None:
        source = spatial_of(node.args[0]) if node.args else None
        shape = shape_of(node)
        if node.target not in RESOLUTION_CHANGES or len(shape) != 4 or shape[0] != self.batch:
            return None
        domain = Domain(*shape[2:])
        is_map = domain in self._domains if source is None else source.dims == NCHW
        return Spatial(domain, NCHW) if is_map and domain.size > 1 else None

    def _guess(self, node: fx.Node) -> Spatial | None:
        candidates = candidate_layouts(shape_of(node), self.batch, self._domains)
        if not candidates:
            return None
        sources = _sources(node, self._derived)
        for source in sources:
            known = spatial_of(source)
            if known is not None and shape_of(source) == shape_of(node) and known.at() in candidates:
                return known.at()
        support = {candidate: _supported(node, candidate) for candidate in candidates}
        chosen = [candidate for candidate in candidates if support[candidate]]
        if not chosen and len(candidates) == 1 and support[candidates[0]] is None:
            chosen = [candidate for candidate in candidates if not _may_be_channels(candidate, sources)]
        if len(chosen) == 1:
            return chosen[0]
        self.doubtful.append(node)
        return None
