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

from fisedit_compile.operators.choosing import call, choose, compute
from fisedit_compile.operators.convolution import triton as conv
from fisedit_compile.operators.convolution.spec import CONV_CHOICE, CONV_ROWS, ConvChoice, ConvRows
from fisedit_compile.operators.group_norm import triton as norm
from fisedit_compile.operators.group_norm.spec import (
    NORM_APPLY,
    NORM_PARTIALS,
    NORM_TOTALS,
    NormApply,
    NormPartials,
    NormTotals,
)
from fisedit_compile.operators.library import Operator
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

logger = logging.getLogger(__name__)

aten = torch.ops.aten

#: Convolutions that take what follows into their kernel.
CONVOLUTIONS: dict[Any, Operator[Any]] = {operator.overload: operator for operator in (CONV_ROWS, CONV_CHOICE)}


def fuse(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Fuse in place what kernels can compute in one pass, where any kernel can run; returns the same module."""
    if not devices.triton_usable():
        return graph_module
    count = 0
    for node in list(graph_module.graph.nodes):
        if node.target in CONVOLUTIONS:
            count += _fuse_conv(node)
        elif node.target is NORM_APPLY.overload:
            count += _fuse_activation(node)
        elif node.target is NORM_TOTALS.overload:
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
    operator = CONVOLUTIONS[node.target]
    if not _positional(node, len(operator.arguments._fields)):
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
    function = fused_conv(operator, tuple(steps), tuple((_operator(user), dict(user.kwargs)) for user in replaced))
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


def fused_conv(convolution: Operator[Any], steps: tuple[Step, ...], replaced: Replaced) -> Callable[..., Tensor]:
    """A function of a convolution's arguments and the operands of what follows it.

    Args:
        convolution: one of ``CONVOLUTIONS``.
        steps: what follows, for the kernel.
        replaced: the same as operators and keyword arguments.
    """
    count = len(convolution.arguments._fields)

    def conv_rows_and_more(*arguments: Any) -> Tensor:
        given, operands = convolution.arguments(*arguments[:count]), arguments[count:]
        chosen, kinds = choose(convolution, given), _kinds(given, operands)
        if chosen.name == "triton" and kinds is not None:
            own: ConvRows = given.by_rows() if isinstance(given, ConvChoice) else given
            return conv.conv_rows_fused(*own, epilogue=Chain(steps, kinds), operands=operands)
        value: Tensor = compute(chosen, given)
        for step, (operator, keywords) in zip(steps, replaced, strict=True):
            parts = [operands[part.number] if isinstance(part, Operand) else part for part in step.arguments]
            value = operator(*[value if part is CURRENT else part for part in parts], **keywords)
        return value

    return conv_rows_and_more


def _kinds(given: ConvRows | ConvChoice, operands: Sequence[Any]) -> tuple[str, ...] | None:
    """How the operands broadcast to the convolution's result; None when a kernel cannot read them all."""
    rows = given.rows
    shape = rows.shape[0], given.table.shape[1], given.weight.shape[0]
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
    given = NormApply(*arguments)
    chosen = choose(NORM_APPLY, given)
    if chosen.name == "triton":
        return norm.norm_apply(*given, silu=True)
    return torch.nn.functional.silu(compute(chosen, given))


def _fuse_statistics(node: fx.Node) -> int:
    partials = node.args[2] if _positional(node, 5) else None
    if not isinstance(partials, fx.Node) or partials.target is not NORM_PARTIALS.overload:
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
    given = NormPartials(rows, center)
    chosen = choose(NORM_PARTIALS, given)
    if chosen.name == "triton" and norm.supports_update(rows, center, totals, recorded, index, valid):
        return norm.norm_update(rows, center, totals, recorded, index, valid)[0]
    partials = compute(chosen, given)
    updated: Tensor = call(NORM_TOTALS, NormTotals(totals, recorded, partials, index, valid))
    return updated
