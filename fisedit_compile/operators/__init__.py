"""The sparse operators, ``torch.ops.fisedit.*``; importing this package registers them."""

from fisedit_compile.operators.attention.aten import attention_rows
from fisedit_compile.operators.convolution.aten import conv_rows, gather_taps, pack_conv_weight, pixel_select
from fisedit_compile.operators.convolution.choice import conv_choice, conv_dense
from fisedit_compile.operators.convolution.maps import conv_map, conv_map_tiles
from fisedit_compile.operators.convolution.tiles import conv_tiles, pack_tile_weights
from fisedit_compile.operators.group_norm.aten import norm_apply, norm_partials, norm_record, norm_totals
from fisedit_compile.operators.library import IMPLEMENTATIONS
from fisedit_compile.operators.products.aten import linear_map, linear_rows, pack_matrix
from fisedit_compile.operators.rows.aten import contiguous_rows, gather_rows, scatter_rows
from fisedit_compile.operators.strides.aten import as_strided, complex_of_pairs, reinterpreted

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
