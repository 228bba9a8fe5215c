"""A network as one functional graph of whole operators, by ``torch.export``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import fx, nn
from torch.export import exported_program

_split = exported_program._split_decomp_table_to_cia_and_python_decomp
_whole: dict[Any, Callable[..., Any]] = {}
"""Every operator that PyTorch would take to pieces and that stays whole, and what keeps it so."""


@torch.no_grad()
def exported(model: nn.Module, inputs: Sequence[Any]) -> fx.GraphModule:
    """The graph of a network, without the function of its guards, which is no operator.

    PyTorch prepares all of its 500 composite operators to stay whole, whatever the network uses, which takes several
    times as long as the rest. Here it prepares those in the graph.
    """
    program = torch.export.export(model, tuple(inputs), strict=False)
    used = {node.target for node in program.graph.nodes if node.op == "call_function"}
    if not _whole:
        _whole.update(_split({})[0])
    kept = {operator: keep for operator, keep in _whole.items() if operator in used}
    with mock.patch.object(exported_program, _split.__name__, lambda table: (kept, table)):
        return program.run_decompositions({}).module(check_guards=False)
