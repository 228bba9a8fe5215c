"""Layers that inference makes one operator become the operators that they consist of.

Why: in inference ``nn.TransformerEncoderLayer`` is a single operator, which mixes positions in its middle, so that no
rule for rows fits it; its parts have such rules. The same holds for what ``nn.MultiheadAttention`` may become.

Before: ``y = _transformer_encoder_layer_fwd(x, E, h, qkv_w, qkv_b, w, b, use_gelu, norm_first, eps, ...)``
After:  ``p = permute(reshape(linear(x, qkv_w, qkv_b), [B, T, 3, h, E / h]), [2, 0, 3, 1, 4])``
        ``a = scaled_dot_product_attention(select(p, 0, 0), select(p, 0, 1), select(p, 0, 2))``
        ``z = layer_norm(x + linear(reshape(permute(a, [0, 2, 1, 3]), [B, T, E]), w, b), ...)``
        ``y = layer_norm(z + linear(relu(linear(z, w_1, b_1)), w_2, b_2), ...)``
With ``norm_first`` the norms stand before the linear layers; with ``use_gelu`` the activation is the exact ``gelu``, as
in the layer that is trained (on a GPU the single operator may approximate it).

Before: ``y = getitem(_native_multi_head_attention(x, x, x, E, h, qkv_w, qkv_b, w, b), 0)``
After:  the first lines of the above

Conditions:
1. There is no mask.
2. The input is ``[B, T, E]``, and the heads divide its width.
3. An attention has one input, which is query, key and value.
4. Nothing reads the weights of an attention, its second result.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from fisedit_compile.passes.common.arguments import read_arguments
from fisedit_compile.passes.common.compilation import Compilation
from fisedit_compile.passes.common.ir import eliminate_dead_code, insert_call, shape_of
from fisedit_compile.passes.common.targets import aten

NAME = "expand_layers"
ENCODER_LAYER = aten._transformer_encoder_layer_fwd.default
ATTENTION = aten._native_multi_head_attention.default


def _refuse(node: fx.Node, given: dict[str, Any]) -> str | None:
    """The condition that does not hold, or None."""
    if given["mask"] is not None:
        return "it has a mask"
    if node.target is ATTENTION:
        if given["key"] is not given["query"] or given["value"] is not given["query"]:
            return "query, key and value are not one tensor"
        if any(user.target is not operator.getitem or (user.args[1] != 0 and user.users) for user in node.users):
            return "its attention weights are read"
    shape, heads = shape_of(given["src" if node.target is ENCODER_LAYER else "query"]), _heads(given)
    if len(shape) != 3 or shape[2] != given["embed_dim"] or shape[2] % heads:
        return f"its input {list(shape)} is not [B, T, {given['embed_dim']}], or {heads} heads do not divide the width"
    return None


def _heads(given: dict[str, Any]) -> int:
    return int(given["num_heads"] if "num_heads" in given else given["num_head"])


def _attention(node: fx.Node, x: fx.Node, given: dict[str, Any]) -> fx.Node:
    """Self-attention of ``x`` with its linear layers."""
    samples, tokens, width = shape_of(x)
    heads = _heads(given)
    packed = insert_call(node, aten.linear.default, x, given["qkv_weight"], given["qkv_bias"])
    packed = insert_call(node, aten.reshape.default, packed, [samples, tokens, 3, heads, width // heads])
    packed = insert_call(node, aten.permute.default, packed, [2, 0, 3, 1, 4])
    operands = [insert_call(node, aten.select.int, packed, 0, number) for number in range(3)]
    attended = insert_call(node, aten.scaled_dot_product_attention.default, *operands)
    attended = insert_call(node, aten.permute.default, attended, [0, 2, 1, 3])
    attended = insert_call(node, aten.reshape.default, attended, [samples, tokens, width])
    return insert_call(node, aten.linear.default, attended, given["proj_weight"], given["proj_bias"])


def _norm(node: fx.Node, x: fx.Node, given: dict[str, Any], number: int) -> fx.Node:
    weight, bias = given[f"norm_weight_{number}"], given[f"norm_bias_{number}"]
    return insert_call(node, aten.layer_norm.default, x, [given["embed_dim"]], weight, bias, given["eps"])


def _feed_forward(node: fx.Node, x: fx.Node, given: dict[str, Any]) -> fx.Node:
    hidden = insert_call(node, aten.linear.default, x, given["ffn_weight_1"], given["ffn_bias_1"])
    hidden = insert_call(node, aten.gelu.default if given["use_gelu"] else aten.relu.default, hidden)
    return insert_call(node, aten.linear.default, hidden, given["ffn_weight_2"], given["ffn_bias_2"])


def _encoder_layer(node: fx.Node, given: dict[str, Any]) -> fx.Node:
    x, first = given["src"], given["norm_first"]
    attended = _attention(node, _norm(node, x, given, 1) if first else x, given)
    x = insert_call(node, aten.add.Tensor, x, attended)
    x = x if first else _norm(node, x, given, 1)
    fed = _feed_forward(node, _norm(node, x, given, 2) if first else x, given)
    x = insert_call(node, aten.add.Tensor, x, fed)
    return x if first else _norm(node, x, given, 2)


def expand_layers(compilation: Compilation) -> None:
    """Run the pass on the traced graph."""
    graph_module, report = compilation.edit, compilation.report
    for node in list(graph_module.graph.nodes):
        if node.target not in (ENCODER_LAYER, ATTENTION):
            continue
        given = read_arguments(node)
        reason = _refuse(node, given)
        if reason is not None:
            report.miss(NAME, node, reason)
            continue
        if node.target is ENCODER_LAYER:
            node.replace_all_uses_with(_encoder_layer(node, given))
        else:
            attended = _attention(node, given["query"], given)
            for user in [user for user in node.users if user.args[1] == 0]:
                user.replace_all_uses_with(attended)
        report.match(NAME)
    eliminate_dead_code(graph_module.graph)
    graph_module.recompile()
