"""Which small inputs of a graph name something, such as a class, and are content that an edit may change.

A timestep and a class label look alike: numbers of rank 0 or 1. An edit must keep the timestep of its recorded call,
and may change the label, which is the prompt of a class-conditional network. What the graph does with them tells them
apart: a label is a name, a time is a number.

An input is a label when
1. it is a tensor of integers or booleans;
2. it is used as a name only: to look up rows of a table of parameters or to be compared for equality, after casts
   between integers, changes of shape, joins, cuts, and selections (``where``) between it and other names; a boolean
   also selects;
3. the graph computes sines or cosines of another small input: that one is the time. Without it a looked-up number may
   itself be the time, since some networks embed their timesteps by a table; it then stays what an edit must keep.

Numbers that are content as well, such as the guidance scale that a distilled network takes as an input, look like times
in everything that is done with them. The option ``content`` names them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from fisedit_compile.passes.common.meta import VALUE
from fisedit_compile.passes.common.program import InputInfo
from fisedit_compile.passes.common.targets import NO_OPERATION, RESHAPES, aten

WAVES = {aten.sin.default, aten.cos.default}
EQUALITIES = {aten.eq.Scalar, aten.eq.Tensor, aten.ne.Scalar, aten.ne.Tensor, aten.one_hot.default}
SELECTIONS = {aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar}
FILLS = {aten.masked_fill.Scalar, aten.masked_fill.Tensor}
#: Position of the indices among the arguments of operators that look rows up in the tensor that comes first.
LOOKUPS: dict[Any, int] = {aten.embedding.default: 1, aten.index_select.default: 2, aten.index.Tensor: 1}
LOGIC = {aten.logical_not.default, aten.logical_and.default, aten.logical_or.default, aten.bitwise_not.default,
         aten.bitwise_and.Tensor, aten.bitwise_or.Tensor}  # fmt: skip
#: Operators that read no element of their operand.
SHAPES_ONLY = {aten.full_like.default, aten.zeros_like.default, aten.ones_like.default, aten.empty_like.default,
               aten.new_zeros.default, aten.new_ones.default, aten.new_full.default}  # fmt: skip
#: Operators whose results are elements of their operands. Casts among them count if they lead to integers.
CARRIERS = RESHAPES | NO_OPERATION | SELECTIONS | FILLS | {
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default, aten.type_as.default,
    aten.expand.default, aten.repeat.default, aten.repeat_interleave.self_int, aten.unsqueeze.default,
    aten.squeeze.default, aten.squeeze.dim, aten.permute.default, aten.transpose.int, aten.cat.default,
    aten.stack.default, aten.slice.Tensor, aten.select.int,
}  # fmt: skip

_Dependencies = dict[fx.Node, frozenset[fx.Node]]


def _dependencies(graph: fx.Graph, given: set[fx.Node]) -> _Dependencies:
    """For each node, those of the given inputs that it depends on."""
    found: _Dependencies = {}
    for node in graph.nodes:
        own = frozenset((node,)) if node in given else frozenset()
        found[node] = own.union(*(found[source] for source in node.all_input_nodes))
    return found


def _is_name(value: object) -> bool:
    """Condition 1."""
    return isinstance(value, Tensor) and not value.dtype.is_floating_point and not value.dtype.is_complex


def _looks_up(reader: fx.Node, value: fx.Node, depends: _Dependencies) -> bool:
    """Whether a reader takes rows that the value names from a table of parameters."""
    place = LOOKUPS.get(reader.target)
    if place is None or len(reader.args) <= place:
        return False
    table, indices = reader.args[0], reader.args[place]
    named = indices is value or (isinstance(indices, (list, tuple)) and value in indices)
    return named and isinstance(table, fx.Node) and not depends[table] and table.meta[VALUE].dim() == 2


def _is_used_as_name(source: fx.Node, depends: _Dependencies) -> bool:
    """Condition 2."""
    stack, seen, named = [source], {source}, False
    while stack:
        value = stack.pop()
        boolean = value.meta[VALUE].dtype is torch.bool
        for reader in value.users:
            if reader.target in SHAPES_ONLY:
                continue
            selected_by = reader.args[:1] if reader.target in SELECTIONS else reader.args[1:2]
            if reader.target in EQUALITIES or _looks_up(reader, value, depends):
                named = True
            elif reader.target in SELECTIONS | FILLS and boolean and selected_by == (value,):
                named = True
            elif reader.target in CARRIERS or (reader.target in LOGIC and boolean):
                if not _is_name(reader.meta[VALUE]):
                    return False
                if reader not in seen:
                    seen.add(reader)
                    stack.append(reader)
            else:
                return False
    return named


def find_labels(graph: fx.Graph, infos: Sequence[InputInfo]) -> frozenset[int]:
    """Positions of the scalar inputs of a traced graph that are labels.

    Args:
        graph: functional ATen graph, placeholders first; tensor nodes carry ``meta["val"]``.
        infos: what each placeholder is.
    """
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    scalars = {node: at for at, (node, info) in enumerate(zip(inputs, infos, strict=True)) if info.kind == "scalar"}
    names = [node for node in scalars if _is_name(node.meta.get(VALUE))]
    if not names:
        return frozenset()
    users = {node for node, info in zip(inputs, infos, strict=True) if info.kind == "user"}
    depends = _dependencies(graph, users | set(scalars))
    labels = {node for node in names if _is_used_as_name(node, depends)}
    waves = [depends[node] for node in graph.nodes if node.target in WAVES]
    # Condition 3. What also depends on the picture is an activation.
    if not any(wave and not wave & (users | labels) for wave in waves):
        return frozenset()
    return frozenset(scalars[node] for node in labels)


def declare_content(infos: Iterable[InputInfo], names: Sequence[str]) -> tuple[InputInfo, ...]:
    """The inputs' descriptions; small inputs of these names are content, not compared with the recording. A name that
    no input has is left out of account: a network may have it or not."""
    return tuple(replace(info, kind="user") if info.kind == "scalar" and info.name in names else info for info in infos)
