"""The sparse operators, ``torch.ops.fisedit.*``; importing this package registers them."""

from fisedit_compile.ops.attention import attention_rows
from fisedit_compile.ops.library import IMPLEMENTATIONS
from fisedit_compile.ops.maps import conv_map, conv_map_tiles
from fisedit_compile.ops.norm import norm_apply, norm_partials, norm_record, norm_totals
from fisedit_compile.ops.packed import linear_map, linear_rows, pack_matrix
from fisedit_compile.ops.paths import conv_choice, conv_dense
from fisedit_compile.ops.rows import contiguous_rows, gather_rows, scatter_rows
from fisedit_compile.ops.stencils import conv_rows, gather_taps, pack_conv_weight, pixel_select
from fisedit_compile.ops.strides import as_strided, complex_of_pairs, reinterpreted
from fisedit_compile.ops.tiles import conv_tiles, pack_tile_weights

__all__ = [
    "IMPLEMENTATIONS",
    "as_strided",
    "attention_rows",
    "complex_of_pairs",
    "contiguous_rows",
    "conv_choice",
    "conv_dense",
    "conv_map",
    "conv_map_tiles",
    "conv_rows",
    "conv_tiles",
    "gather_rows",
    "gather_taps",
    "linear_map",
    "linear_rows",
    "norm_apply",
    "norm_partials",
    "norm_record",
    "norm_totals",
    "pack_conv_weight",
    "pack_matrix",
    "pack_tile_weights",
    "pixel_select",
    "reinterpreted",
    "scatter_rows",
]
