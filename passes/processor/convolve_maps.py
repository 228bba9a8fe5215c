"""Let recorded and dense calls convolve whole maps by tiles, with the transformed weights that edits use.

Why: recording a picture, and the dense steps before a mask is found, take most of the time of a whole edit. Tiles of
2x2 positions need four products for each position and pair of channels where a direct convolution needs nine, and the
transformed weights are there anyway.

Before: record: ``y = conv2d(x, w, b, 1, 1)``, ``r = contiguous_rows(x as [B, S, C])``
After:  record: ``y = conv_map(x, r, w, b, [tile weights], channels_last)``, which takes the faster of both ways, or
        ``y = conv_map_tiles(x, r, [tile weights], b, channels_last)`` where tiles were asked for; ``r`` is None where
        the rows of ``x`` are not recorded. Tile weights are further inputs of the graph, outputs of the prologue.

Conditions:
1. The edit graph has the transformed weight (see ``choose_convolution``).
2. The kernel is 3x3 with stride, padding and dilation 1 and one group; height and width of the map are even.
3. Map, weight and result have the same dtype: under autocast they have not.
4. The result is contiguous, or contiguous with channels last.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from fisedit_compile.operators.convolution.spec import SIDE
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.ir import RowsBuilder, shape_of, store
from fisedit_compile.passes.common.meta import HOISTED, VALUE
from fisedit_compile.passes.common.reading.convolutions import Convolution, read_convolution
from fisedit_compile.passes.common.targets import CONVOLUTIONS, aten

NAME = "convolve_maps"
ONE = (1, 1)
CONTIGUOUS = (torch.ops.fisedit.contiguous_rows.default, aten.contiguous.default)


def tile_weights(edit: fx.Graph) -> dict[str, list[int]]:
    """Outputs of the prologue that hold the transformed weight, by the name of the weight."""
    found = {}
    for node in edit.nodes:
        if node.target is torch.ops.fisedit.pack_tile_weights.default:
            pieces = {user.args[1]: user for user in node.users if user.target is operator.getitem}
            if all(HOISTED in piece.meta for piece in pieces.values()):
                found[node.args[0].name] = [pieces[number].meta[HOISTED] for number in sorted(pieces)]
    return found


def _recorded_rows(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Stored rows of maps of dimensions (batch, channel, height, width), by the map."""
    found: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        rows = node.args[0] if node.target is store else None
        if not isinstance(rows, fx.Node) or rows.target not in CONTIGUOUS:
            continue
        (flat,) = rows.all_input_nodes
        if flat.target is aten.flatten.using_ints:
            (moved,) = flat.all_input_nodes
            if moved.target is aten.permute.default and moved.args[1] == [0, 2, 3, 1]:
                found[moved.all_input_nodes[0]] = rows
    return found


def refusal(node: fx.Node, convolution: Convolution) -> str | None:
    """Why a convolution with a transformed weight is computed directly; None when there are two ways."""
    kernel = shape_of(convolution.weight)[2:]
    steps = (convolution.stride, convolution.padding, convolution.dilation)
    if kernel != (3, 3) or any(step != ONE for step in steps) or convolution.groups != 1 or convolution.transposed:
        return "not a 3x3 kernel with stride, padding and dilation 1 and one group"
    shape = shape_of(convolution.x)
    if len(shape) != 4:
        return "the map has no dimension of samples"
    if shape[2] % SIDE or shape[3] % SIDE:
        return "the map has an odd height or width"
    result = node.meta[VALUE]
    if len({value.meta[VALUE].dtype for value in (convolution.x, convolution.weight, node)}) > 1:
        return "map, weight and result have different dtypes"
    if not result.is_contiguous() and not result.is_contiguous(memory_format=torch.channels_last):
        return "the result is not contiguous"
    return None


def convolve_maps(compilation: Compilation) -> None:
    """Run the pass on the record graph, which has its stores, behind ``hoist_parameters`` on the edit graph.

    The option ``convolution`` may ask for tiles. What the record graph takes as further inputs joins ``dense_inputs``.
    """
    record, report = compilation.module("record"), compilation.report
    graph = record.graph
    weights, rows = tile_weights(compilation.edit.graph), _recorded_rows(graph)
    inputs: dict[int, fx.Node] = {}
    if not weights:
        return
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in list(graph.nodes):
        if node.target not in CONVOLUTIONS:
            continue
        convolution = read_convolution(node)
        if isinstance(convolution, str) or convolution.weight.name not in weights:
            continue
        reason = refusal(node, convolution)
        if reason is not None:
            report.miss(NAME, node, reason)
            continue
        for number in weights[convolution.weight.name]:
            if number not in inputs:
                with graph.inserting_after(last):
                    last = inputs[number] = graph.placeholder(f"hoisted_{number}")
        tiles = [inputs[number] for number in weights[convolution.weight.name]]
        x, weight, bias = convolution.x, convolution.weight, convolution.bias
        channels_last = not node.meta[VALUE].is_contiguous()
        fisedit, builder = torch.ops.fisedit, RowsBuilder(node)
        if compilation.options.convolution == "tiles":
            result = builder.call(fisedit.conv_map_tiles.default, x, rows.get(x), tiles, bias, channels_last)
        else:
            result = builder.call(fisedit.conv_map.default, x, rows.get(x), weight, bias, tiles, channels_last)
        result.meta.update(node.meta)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
        report.match(NAME)
    record.recompile()
    compilation.dense_inputs += tuple(inputs)
