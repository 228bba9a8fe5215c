"""Fusing what kernels compute in one pass: pointwise operators behind convolutions, SiLU behind norms, statistics.

Works on a lifted graph in place, before it becomes code. Each fused node calls a function that decides by the tensors
it gets: a kernel where one supports all of them, else the nodes it stands for, one after the other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fisedit_compile.operators.convolution import triton as conv
from fisedit_compile.operators.group_norm import triton as norm
from fisedit_compile.operators.triton import devices
from fisedit_compile.operators.triton.pointwise import (
    CURRENT,
    Argument,
    Chain,
    Operand,
    Step,
    operand_kind,
    operator_name,
)
from fisedit_compile.operators.triton.providers import dispatching, provider_of

logger = logging.getLogger(__name__)

aten, fisedit = torch.ops.aten, torch.ops.fisedit

#: Convolutions that take what follows into their kernel, and how many arguments they have. The first six are alike.
CONVOLUTIONS: dict[Any, int] = {fisedit.conv_rows.default: 7, fisedit.conv_choice.default: 13}


def fuse(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Fuse in place what kernels can compute in one pass, where any kernel can run; returns the same module."""
    if not devices.triton_usable():
        return graph_module
    count = 0
    for node in list(graph_module.graph.nodes):
        if node.target in CONVOLUTIONS:
            count += _fuse_conv(node)
        elif node.target is fisedit.norm_apply.default:
            count += _fuse_activation(node)
        elif node.target is fisedit.norm_totals.default:
            count += _fuse_statistics(node)
    logger.debug("fused %d times", count)
    return graph_module


def _positional(node: fx.Node, count: int) -> bool:
    """Whether a node has all its arguments by position; nothing here makes others."""
    return len(node.args) == count and not node.kwargs


def _only_user(node: fx.Node) -> fx.Node | None:
    if len(node.users) != 1:
        return None
    (user,) = node.users
    return user if user.op == "call_function" else None


def _step(user: fx.Node, current: fx.Node, operands: list[fx.Node]) -> Step | None:
    """What ``user`` does to ``current``; its other nodes are added to ``operands``."""
    name = operator_name(user.target, dict(user.kwargs))
    arguments: list[Argument] = []
    for argument in user.args:
        if argument is current:
            arguments.append(CURRENT)
        elif isinstance(argument, fx.Node):
            arguments.append(Operand(len(operands)))
            operands.append(argument)
        elif isinstance(argument, int | float) and abs(argument) < 1e30:
            arguments.append(float(argument))
        else:
            return None
    return None if name is None else Step(name, tuple(arguments))


def _fuse_conv(node: fx.Node) -> int:
    if not _positional(node, CONVOLUTIONS[node.target]):
        return 0
    current, steps, replaced = node, [], []
    operands: list[fx.Node] = []
    while (user := _only_user(current)) is not None:
        before = len(operands)
        step = _step(user, current, operands)
        if step is None:
            del operands[before:]
            break
        steps.append(step)
        replaced.append(user)
        current = user
    if not steps:
        return 0
    function = fused_conv(node.target, tuple(steps), tuple((_operator(user), dict(user.kwargs)) for user in replaced))
    _replace(current, function, (*node.args, *operands), [*reversed(replaced), node])
    return 1


def _operator(node: fx.Node) -> Callable[..., Any]:
    if not callable(node.target):
        raise TypeError(f"{node} calls {node.target!r}, which is no function")
    return node.target


def _replace(last: fx.Node, function: Callable[..., Any], arguments: Sequence[Any], dead: Sequence[fx.Node]) -> None:
    """Put a call where ``last`` is and erase the nodes it stands for, last one first."""
    graph = last.graph
    with graph.inserting_before(last):
        fused = graph.call_function(function, tuple(arguments))
    fused.meta = dict(last.meta)
    last.replace_all_uses_with(fused)
    for node in dead:
        graph.erase_node(node)


Replaced = tuple[tuple[Callable[..., Any], dict[str, Any]], ...]


def fused_conv(overload: Any, steps: tuple[Step, ...], replaced: Replaced) -> Callable[..., Tensor]:
    """A function of a convolution's arguments and the operands of what follows it.

    Args:
        overload: the convolution, one of ``CONVOLUTIONS``.
        steps: what follows, for the kernel.
        replaced: the same as operators and keyword arguments.
    """
    plain, count = dispatching(overload), CONVOLUTIONS[overload]
    chooses = overload is fisedit.conv_choice.default

    def conv_rows_and_more(*arguments: Any) -> Tensor:
        own, operands = arguments[:count], arguments[count:]
        kinds = _kinds(own, operands)
        if kinds is not None and provider_of(overload, *own).name == "triton":
            rows, recorded, halo, table, weight, bias = own[:6]
            if not chooses or not conv.prefers_dense(rows, recorded, table, weight):
                chain, groups = Chain(steps, kinds), 1 if chooses else own[6]
                return conv.conv_rows_fused(rows, recorded, halo, table, weight, bias, groups, chain, operands)
            value = conv.conv_whole_map(rows, recorded, bias, *own[8:])
        else:
            value = plain(*own)
        for step, (operator, keywords) in zip(steps, replaced, strict=True):
            parts = [operands[part.number] if isinstance(part, Operand) else part for part in step.arguments]
            value = operator(*[value if part is CURRENT else part for part in parts], **keywords)
        return value

    return conv_rows_and_more


def _kinds(own: Sequence[Any], operands: Sequence[Any]) -> tuple[str, ...] | None:
    """How the operands broadcast to the convolution's result; None when a kernel cannot read them all."""
    rows, table, weight = own[0], own[3], own[4]
    shape = rows.shape[0], table.shape[1], weight.shape[0]
    kinds = []
    for tensor in operands:
        kind = operand_kind(tensor, *shape) if isinstance(tensor, Tensor) else None
        # Another dtype would change that of the result.
        if kind is None or tensor.dtype != rows.dtype or tensor.device != rows.device:
            return None
        if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
            return None
        kinds.append(kind)
    return tuple(kinds)


def _fuse_activation(node: fx.Node) -> int:
    user = _only_user(node)
    if user is None or user.target is not aten.silu.default or not _positional(node, 7):
        return 0
    _replace(user, norm_apply_and_silu, node.args, [user, node])
    return 1


def norm_apply_and_silu(*arguments: Any) -> Tensor:
    """SiLU of the operator ``norm_apply``."""
    if provider_of(fisedit.norm_apply.default, *arguments).name == "triton":
        rows, center, totals, weight, bias, eps, count = arguments
        return norm.norm_apply(rows, center, totals, weight, bias, eps, count, silu=True)
    return torch.nn.functional.silu(dispatching(fisedit.norm_apply.default)(*arguments))


def _fuse_statistics(node: fx.Node) -> int:
    partials = node.args[2] if _positional(node, 5) else None
    if not isinstance(partials, fx.Node) or partials.target is not fisedit.norm_partials.default:
        return 0
    if len(partials.users) != 1 or not _positional(partials, 2):
        return 0
    totals, recorded, _, index, valid = node.args
    _replace(node, totals_of_rows, (*partials.args, totals, recorded, index, valid), [node, partials])
    return 1


def totals_of_rows(
    rows: Tensor, center: Tensor, totals: Tensor, recorded: Tensor, index: Tensor, valid: Tensor | None
) -> Tensor:
    """The operator ``norm_totals`` of the operator ``norm_partials``."""
    runs = provider_of(fisedit.norm_partials.default, rows, center).name == "triton"
    if runs and norm.supports_update(rows, center, totals, recorded, index, valid):
        return norm.norm_update(rows, center, totals, recorded, index, valid)[0]
    partials = dispatching(fisedit.norm_partials.default)(rows, center)
    return dispatching(fisedit.norm_totals.default)(totals, recorded, partials, index, valid)
