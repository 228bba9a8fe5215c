"""Give convolutions with 3x3 kernels more ways to be computed than row by row.

Why: tiles of 2x2 positions need less than half of the products of four rows, when they are full; and with most
positions active the dense operator is the cheapest. Which way is the fastest is measured, or estimated for a chip, when
the mask is known: it is decided not here, but in ``operators/choosing.py``, for the operator ``conv_choice``.

Before: ``y = conv_rows(rows, recorded, halo, table, pack_conv_weight(w), b, 1)``
After:  ``y = conv_choice(rows, recorded, halo, table, pack_conv_weight(w), b, [tile plan], [tile weights], index,
        valid, w, height, width)``, on a GPU without tiles: ``[], []``
        or, where one way is asked for, ``y = conv_tiles(...)`` or ``y = conv_dense(...)``

Conditions:
1. The kernel is 3x3 with stride, padding and dilation 1 and one group; the weight depends on parameters only and is on
   a processor or a CUDA GPU.
2. On a processor, height and width are even, so that tiles cover the map.
3. Tiles: on a processor, the dtype is float32 or wider, and with the transformed weight, copies of weights take no more
   bytes than allowed.
4. On a processor, unless a way is asked for: the map has many positions, and there are many channels. Elsewhere rows
   are as fast, and transformed weights would take memory for nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

from fisedit_compile.operators.convolution.spec import PATCH, SIDE
from fisedit_compile.operators.products.aten import TYPICAL_ROWS
from fisedit_compile.passes.caching.hoist_parameters import constant_nodes
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.ir import RowsBuilder, copy_provenance, shape_of
from fisedit_compile.passes.common.meta import LIKELY_ROWS, PLAN_INPUT, VALUE
from fisedit_compile.runtime.spec import Domain, Stencil

NAME = "choose_convolution"
CONV_ROWS = torch.ops.fisedit.conv_rows.default
MANY_POSITIONS, MANY_CHANNELS = 1024, 64
WINDOW = {"kernel_height": 3, "kernel_width": 3, "stride_y": 1, "stride_x": 1, "padding_y": 1, "padding_x": 1}


def _original_weight(packed: object) -> fx.Node | None:
    """The weight ``[Cout, Cin, 3, 3]`` that was packed for rows."""
    if isinstance(packed, fx.Node) and packed.target is torch.ops.fisedit.pack_conv_weight.default:
        weight = packed.args[0]
        if isinstance(weight, fx.Node) and isinstance(weight.meta.get(VALUE), torch.Tensor):
            return weight
    return None


def is_plain(stencil: Stencil) -> bool:
    """Whether a convolution reads a 3x3 window with stride, padding and dilation 1."""
    window = stencil.kind == "window" and all(stencil[name] == size for name, size in WINDOW.items())
    return window and stencil["dilation_y"] == stencil["dilation_x"] == 1


def refusal(node: fx.Node, stencil: Stencil, constant: set[fx.Node], way: str) -> str | None:
    """Why a convolution is computed row by row; None when there are other ways."""
    weight = _original_weight(node.args[4])
    if not is_plain(stencil) or node.args[6] != 1:
        return "not a 3x3 kernel with stride, padding and dilation 1 and one group"
    if weight is None or weight not in constant:
        return "the weight depends on the inputs"
    if weight.meta[VALUE].device.type == "cuda":
        return "tiles are made for processors" if way == "tiles" else None
    domain = stencil.source
    if domain != stencil.target:
        return "its output is active at other positions than its input"
    if domain.height % SIDE or domain.width % SIDE:
        return "the map has an odd height or width"
    if way == "tiles" and weight.meta[VALUE].dtype not in (torch.float32, torch.float64):
        return "tiles need float32"
    if way == "auto" and (domain.size < MANY_POSITIONS or min(shape_of(weight)[:2]) < MANY_CHANNELS):
        return "rows are as fast with few positions or channels"
    return None


def tile_stencils(domain: Domain) -> tuple[Stencil, Stencil]:
    """How tiles read their patches, and how rows read their tiles."""
    tiles = Domain(domain.height // SIDE, domain.width // SIDE, cover=domain.cover.of_tiles(SIDE))
    sizes = {"kernel": PATCH, "stride": SIDE, "padding": 1, "dilation": 1}
    parameters = {
        f"{name}_{axis}": size
        for name, size in sizes.items()
        for axis in (("height", "width") if name == "kernel" else ("y", "x"))
    }
    patches = Stencil.of("window", domain, tiles, **parameters)
    return patches, Stencil.of("pixel_shuffle", tiles, domain, factor=SIDE)


def _tile_weights(
    weight: fx.Node, rows: int | None, builder: RowsBuilder, known: dict[fx.Node, list[fx.Node]]
) -> list[fx.Node]:
    """The 16 matrices of a transformed weight; transformed once."""
    if weight not in known:
        transformed = builder.call(torch.ops.fisedit.pack_tile_weights.default, weight, rows)
        known[weight] = [builder.call(operator.getitem, transformed, number) for number in range(PATCH * PATCH)]
    return known[weight]


def _tile_bytes(weight: fx.Node) -> int:
    """What a transformed weight takes."""
    outputs, inputs = shape_of(weight)[:2]
    return outputs * inputs * PATCH * PATCH * int(weight.meta[VALUE].itemsize)


def _has_tiles(weight: fx.Node) -> bool:
    """Whether tiles can compute with this weight: they do not pay in half precision."""
    value = weight.meta[VALUE]
    return value.device.type == "cpu" and value.dtype in (torch.float32, torch.float64)


def _rewrite(node: fx.Node, domain: Domain, way: str, tiles: Sequence[fx.Node]) -> fx.Node:
    rows, recorded, halo, table, packed, bias, _ = node.args
    weight = _original_weight(packed)
    assert weight is not None
    builder = RowsBuilder(node)
    fisedit = torch.ops.fisedit
    whole = (builder.plan("index", domain), builder.plan("valid", domain))
    if way == "dense":
        return builder.call(
            fisedit.conv_dense.default, rows, recorded, *whole, weight, bias, domain.height, domain.width
        )
    plan: list[fx.Node] = []
    if weight.meta[VALUE].device.type == "cpu":
        patches, places = tile_stencils(domain)
        plan = [
            builder.plan("halo", patches),
            builder.plan("table", patches),
            builder.plan("table", places),
            builder.plan("subposition", places),
        ]
    if way == "tiles":
        return builder.call(fisedit.conv_tiles.default, rows, recorded, *plan, tiles, bias)
    size = (domain.height, domain.width)
    choice = fisedit.conv_choice.default
    return builder.call(choice, rows, recorded, halo, table, packed, bias, plan, tiles, *whole, weight, *size)


def choose_convolution(compilation: Compilation) -> None:
    """Run the pass on the edit graph, whose conversions are lowered.

    The option ``convolution`` asks for a way, ``packing`` is the most bytes that copies of weights may take, and
    without ``pack_all`` weights are transformed only where that is measured to be faster. The report counts what got
    other ways, and the bytes of transformed weights in ``packed_bytes``.
    """
    graph_module, options, report = compilation.edit, compilation.options, compilation.report
    way, limit = options.convolution, options.packing
    graph = graph_module.graph
    constant = constant_nodes(graph, compilation.inputs)
    weights: dict[fx.Node, list[fx.Node]] = {}
    for node in list(graph.nodes):
        if node.target is not CONV_ROWS:
            continue
        table = node.args[3]
        assert isinstance(table, fx.Node)
        weight = _original_weight(node.args[4])
        if weight is not None and weight.meta[VALUE].device.type not in ("cpu", "cuda"):
            continue
        stencil = table.meta[PLAN_INPUT].of
        reason = refusal(node, stencil, constant, way)
        if reason is not None:
            report.row_convolutions[reason] += 1
            continue
        tiles: list[fx.Node] = []
        if weight is not None and way != "dense" and _has_tiles(weight):
            needed = 0 if weight in weights else _tile_bytes(weight)
            if limit is None or report.packed_bytes + needed <= limit:
                report.packed_bytes += needed
                count = max(1, node.meta.get(LIKELY_ROWS, TYPICAL_ROWS) // SIDE**2) if not options.pack_all else None
                tiles = _tile_weights(weight, count, RowsBuilder(node), weights)
            elif way == "tiles":
                report.row_convolutions[f"copies of weights would take more than {limit} bytes"] += 1
                continue
        chosen = _rewrite(node, stencil.source, way, tiles)
        copy_provenance(node, chosen)
        node.replace_all_uses_with(chosen)
        graph.erase_node(node)
        report.match(NAME)
    graph_module.recompile()
