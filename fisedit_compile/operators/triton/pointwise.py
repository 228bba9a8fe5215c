"""Chains of pointwise operators, printed as Triton source: what a kernel does to values on their way in or out.

A chain starts from the values a kernel holds, float32 tiles ``[rows, channels]``, and each step combines the current
value with numbers and operands. An operand is a tensor that broadcasts to ``[B, N, C]``; its kind says along what.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

#: How an operand broadcasts: a value a channel ``[C]``, one a sample and channel ``[B, 1, C]``, or one each
#: ``[B, N, C]``.
KINDS = ("channel", "sample", "rows")


@dataclass(frozen=True)
class Current:
    """The value the chain has so far."""


@dataclass(frozen=True)
class Operand:
    """The chain's operand of this number."""

    number: int


Argument = Current | Operand | float
CURRENT = Current()


@dataclass(frozen=True)
class Step:
    """One operator of a chain: a name of :data:`FORMULAS` and its arguments."""

    operator: str
    arguments: tuple[Argument, ...] = (CURRENT,)


#: Triton expressions of the operators; ``{0}`` and ``{1}`` are their arguments, float32.
FORMULAS: dict[str, str] = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "neg": "-{0}",
    "silu": "{0} * tl.sigmoid({0})",
    "sigmoid": "tl.sigmoid({0})",
    "relu": "tl.maximum({0}, 0.0)",
    "gelu": "0.5 * {0} * (1.0 + tl.erf({0} * 0.7071067811865476))",
    # tanh(u) is 2 * sigmoid(2 * u) - 1.
    "gelu_tanh": "{0} * tl.sigmoid(1.5957691216057308 * ({0} + 0.044715 * {0} * {0} * {0}))",
    "tanh": "2.0 * tl.sigmoid(2.0 * {0}) - 1.0",
}

#: The same operators on tensors, for the reference.
MEANINGS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "neg": torch.neg,
    "silu": torch.nn.functional.silu,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda values: torch.nn.functional.gelu(values, approximate="tanh"),
    "tanh": torch.tanh,
}

#: Operator overloads with one spelling; gelu has two, by its keyword.
OVERLOADS: dict[Any, str] = {
    aten.add.Tensor: "add",
    aten.sub.Tensor: "sub",
    aten.mul.Tensor: "mul",
    aten.div.Tensor: "div",
    aten.neg.default: "neg",
    aten.silu.default: "silu",
    aten.sigmoid.default: "sigmoid",
    aten.relu.default: "relu",
    aten.tanh.default: "tanh",
}


def operator_name(target: Any, keywords: dict[str, Any]) -> str | None:
    """The name of an operator overload called with these keyword arguments; None when no formula computes it."""
    if target is aten.gelu.default:
        approximate = keywords.get("approximate", "none")
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)
    if any(value != 1 for name, value in keywords.items() if name == "alpha") or set(keywords) - {"alpha"}:
        return None
    return OVERLOADS.get(target)


@dataclass(frozen=True)
class Chain:
    """Steps, and the kinds of the operands they name."""

    steps: tuple[Step, ...] = ()
    kinds: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.steps)

    def __str__(self) -> str:
        return " -> ".join(self._describe(step) for step in self.steps) or "nothing"

    def _describe(self, step: Step) -> str:
        others = [
            f"{self.kinds[argument.number]} {argument.number}" if isinstance(argument, Operand) else f"{argument:g}"
            for argument in step.arguments
            if not isinstance(argument, Current)
        ]
        return f"{step.operator}({', '.join(others)})" if others else step.operator

    def check(self) -> None:
        """Refuse a chain that cannot be written as code.

        Raises:
            ValueError: an unknown operator, kind or operand, or a number that has no literal.
        """
        for kind in self.kinds:
            if kind not in KINDS:
                raise ValueError(f"unknown kind of operand {kind!r}; expected one of {', '.join(KINDS)}")
        for step in self.steps:
            if step.operator not in FORMULAS:
                raise ValueError(f"unknown operator {step.operator!r}; expected one of {', '.join(FORMULAS)}")
            for argument in step.arguments:
                if isinstance(argument, Operand) and not 0 <= argument.number < len(self.kinds):
                    raise ValueError(f"step {step.operator} reads operand {argument.number} of {len(self.kinds)}")
                if isinstance(argument, int | float) and not math.isfinite(argument):
                    raise ValueError(f"step {step.operator} has the number {argument}")


def add_bias(chain: Chain) -> Chain:
    """The chain behind the addition of a bias, which becomes operand 0."""
    bias = Step("add", (CURRENT, Operand(0)))
    moved = tuple(
        Step(
            step.operator,
            tuple(Operand(part.number + 1) if isinstance(part, Operand) else part for part in step.arguments),
        )
        for step in chain.steps
    )
    return Chain((bias, *moved), ("channel", *chain.kinds))


def parameters(chain: Chain, prefix: str) -> list[str]:
    """Names of the kernel parameters of a chain's operands: of each one its pointer and the strides of its kind."""
    names = []
    for number, kind in enumerate(chain.kinds):
        names.append(f"{prefix}{number}")
        if kind != "channel":
            names.append(f"{prefix}{number}_sample")
        if kind == "rows":
            names.append(f"{prefix}{number}_row")
    return names


def parameter_comments(chain: Chain, prefix: str) -> list[str]:
    """One line of a signature for each parameter, with what it means."""
    shapes = {"channel": "[C]", "sample": "[1 or B, 1, C]", "rows": "[B, N, C]"}
    lines = []
    for name in parameters(chain, prefix):
        number, _, stride = name.removeprefix(prefix).partition("_")
        meaning = f"elements from {stride} to {stride}" if stride else f"pointer, {shapes[chain.kinds[int(number)]]}"
        lines.append(f"{name},  # {meaning}")
    return lines


def print_function(chain: Chain, name: str, prefix: str) -> str:
    """A Triton function ``name(values, sample, row, channel, mask, operands...)`` that applies the chain.

    ``values`` are float32 ``[R, C]``; ``sample`` and ``row`` are int64 ``[R]``, ``channel`` int ``[C]``, ``mask`` bool
    ``[R, C]``, False where operands must not be read.
    """
    chain.check()
    signature = ["values,  # float32 [R, C]", "sample,  # int64 [R], number of the sample"]
    signature += ["row,  # int64 [R], number of the row within its sample", "channel,  # [C]", "mask,  # bool [R, C]"]
    signature += parameter_comments(chain, prefix)
    lines = ["@triton.jit", f"def {name}(", *(f"    {line}" for line in signature), "):"]
    for number, kind in enumerate(chain.kinds):
        lines.append(f"    address_{number} = {prefix}{number} + channel[None, :]")
        if kind != "channel":
            lines.append(f"    address_{number} += (sample * {prefix}{number}_sample)[:, None]  # [R, C]")
        if kind == "rows":
            lines.append(f"    address_{number} += (row * {prefix}{number}_row)[:, None]")
        lines.append(f"    value_{number} = tl.load(address_{number}, mask=mask, other=0.0).to(tl.float32)")
    for step in chain.steps:
        lines.append(f"    values = {FORMULAS[step.operator].format(*map(_spell, step.arguments))}")
    return "\n".join([*lines, "    return values", ""])


def _spell(argument: Argument) -> str:
    if isinstance(argument, Current):
        return "values"
    if isinstance(argument, Operand):
        return f"value_{argument.number}"
    return repr(float(argument)) if argument >= 0 else f"({float(argument)!r})"


def operand_kind(tensor: Tensor, batch: int, rows: int, channels: int) -> str | None:
    """How a tensor broadcasts to ``[batch, rows, channels]``; None when in a way no kernel reads."""
    shape = tuple(tensor.shape)
    if shape in ((channels,), (1, channels), (1, 1, channels)):
        return "channel" if len(shape) < 3 else "sample"
    if shape == (batch, rows, channels) and rows != 1:
        return "rows"
    return "sample" if shape == (batch, 1, channels) else None


def operand_arguments(chain: Chain, operands: Sequence[Tensor], prefix: str) -> dict[str, Any]:
    """Values of :func:`parameters`, in their order; operands have their channels side by side."""
    arguments: dict[str, Any] = {}
    for number, (kind, tensor) in enumerate(zip(chain.kinds, operands, strict=True)):
        arguments[f"{prefix}{number}"] = tensor
        if kind != "channel":
            arguments[f"{prefix}{number}_sample"] = tensor.stride(0) if tensor.shape[0] > 1 else 0
        if kind == "rows":
            arguments[f"{prefix}{number}_row"] = tensor.stride(1)
    return arguments


def apply_chain(chain: Chain, values: Tensor, operands: Sequence[Tensor]) -> Tensor:
    """The chain on tensors: ``values`` ``[B, N, C]`` float32 -> the same shape; the meaning of the printed code."""
    for step in chain.steps:
        arguments = [
            values
            if isinstance(argument, Current)
            else operands[argument.number].float()
            if isinstance(argument, Operand)
            else argument
            for argument in step.arguments
        ]
        values = MEANINGS[step.operator](*arguments)
    return values
