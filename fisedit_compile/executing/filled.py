"""What is kept of a call that fills what the network keeps, and given to the graph that stands in for it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.passes.common.program import InputInfo
from fisedit_compile.runtime import FillingCall, ProgramKey


def parameter_names(infos: Sequence[InputInfo]) -> tuple[str, ...]:
    """The names of the parameters of a graph."""
    return tuple(info.name for info in infos if info.kind == "parameter")


def filling_call(infos: Sequence[InputInfo], key: ProgramKey, arguments: Sequence[Any], position: int) -> FillingCall:
    """Describe a call of a graph that changes what the network keeps.

    Args:
        infos: of the graph's inputs.
        key: the graph.
        arguments: the flat inputs of the call; those that are no parameters are copied.
        position: how many graph calls were recorded before.
    """
    given: dict[str, Any] = {}
    with torch.inference_mode(False), torch.no_grad():
        for info, value in zip(infos, arguments, strict=True):
            if info.kind in ("user", "scalar"):
                given[info.name] = value.detach().clone() if isinstance(value, Tensor) else value
    return FillingCall(key, position, given, parameter_names(infos))


def given_inputs(
    infos: Sequence[InputInfo], constants: Collection[int], arguments: Sequence[Any], filling: FillingCall
) -> list[Any] | str:
    """The flat inputs with which a graph makes a recorded call of another one.

    Args:
        infos: of its inputs.
        constants: positions of inputs that are fixed in the graph.
        arguments: of its call now; parameters are taken from these.
        filling: the recorded call.

    Returns:
        The inputs, or the reason why the recorded ones are not those of this graph. Python numbers that are not known
        are those of the call now.
    """
    found = list(arguments)
    for position, info in enumerate(infos):
        if info.kind not in ("user", "scalar") or position in constants:
            continue
        now = arguments[position]
        if info.name not in filling.inputs:
            if isinstance(now, Tensor):
                return f"its graph did not read {info.name}"
            # Fixed in that graph, as the first value of every Python number. The result tells whether it was this one.
            continue
        then = filling.inputs[info.name]
        if _form(then) != _form(now):
            return f"{info.name} was {_form(then)} then and is {_form(now)} now"
        found[position] = then
    return found


def _form(value: Any) -> str:
    """What a value is, without its content."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}"
