"""What an operator is: a name, named arguments, a schema, a shape; and the ways to compute it.

A folder of ``operators`` holds operators that belong together: ``spec.py`` declares them, every other file of one word
implements them and ends in the tuple ``IMPLEMENTATIONS``. ``choosing.py`` decides which implementation runs.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch

LIBRARY = torch.library.Library("fisedit", "DEF")
# The implementations take any strides, so a compiler is free to choose a layout for their inputs.
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)

Arguments = TypeVar("Arguments", bound=tuple[Any, ...])


@dataclass(frozen=True)
class Measuring(Generic[Arguments]):
    """How the implementations of an operator are measured, where it is measured which of them is the fastest.

    Attributes:
        name: under which their times are kept.
        case: from arguments to what times depend on, a named tuple of numbers, texts and truths; None: these arguments
            are not measured.
        timed: from arguments and an implementation's ``run`` to what is timed, which may compute a smaller example.
    """

    name: str
    case: Callable[[Arguments], NamedTuple | None]
    timed: Callable[[Arguments, Callable[[Arguments], Any]], Callable[[], object]]


class Operator(Generic[Arguments]):
    """An operator; those with a shape are ``torch.ops.fisedit.<name>``.

    Attributes:
        name: of the operator.
        arguments: a named tuple, whose docstring says what the operator computes.
        shape: from arguments to empty tensors like the result; None for a stand-in.
        overload: the operator as graphs call it.
        implementations: by rank, the usual one first.
        highest_first: the same from the other end.
        models: by rank, the one that is asked first at the front.
        measuring: None where it is not measured which implementation is the fastest.
        asked: from arguments to the name of the implementation that an option asks for in them, or None.
        counted: under which name choices between several implementations are counted; None: they are not.
    """

    def __init__(
        self,
        name: str,
        arguments: type[Arguments],
        shape: Callable[[Arguments], Any] | None = None,
        *,
        schema: str | None = None,
        stands_for: Any = None,
        measuring: Measuring[Arguments] | None = None,
        asked: Callable[[Arguments], str | None] | None = None,
        counted: str | None = None,
    ) -> None:
        """Declare an operator.

        Args:
            name, arguments, measuring, asked, counted: see above.
            shape: from arguments to empty tensors of the result's shape, dtype and strides; its annotation tells what
                the operator returns.
            schema: what stands behind the name in the schema, where annotations cannot say it: results that have names
                or may be views of arguments. All operators are functional.
            stands_for: an operator of PyTorch that this one computes in lowered graphs, in place of a shape.

        Raises:
            ValueError: there is neither a shape nor an operator that it stands for, or there are both.
        """
        if (shape is None) == (stands_for is None):
            raise ValueError(f"{name} needs either a shape or an operator of PyTorch that it stands for")
        self.name = name
        self.arguments = arguments
        self.shape = shape
        self.implementations: list[Implementation[Arguments]] = []
        self.highest_first: tuple[Implementation[Arguments], ...] = ()
        self.models: list[CostModel[Arguments]] = []
        self.measuring = measuring
        self.asked = asked
        self.counted = counted
        if shape is not None:
            LIBRARY.define(name + (schema or infer_schema(arguments, shape)), tags=TAGS)
            torch.library.register_fake(f"fisedit::{name}", named(arguments, shape), lib=LIBRARY)
            stands_for = getattr(torch.ops.fisedit, name).default
        self.overload = stands_for
        OPERATORS[self.overload] = self

    def __repr__(self) -> str:
        return f"operator {self.name}"

    def add(self, implementation: Implementation[Arguments]) -> None:
        """Add an implementation.

        Raises:
            ValueError: there is one of that name.
        """
        if any(known.name == implementation.name for known in self.implementations):
            raise ValueError(f"{self} has an implementation {implementation.name} already; take another name")
        self.implementations.append(implementation)
        self.implementations.sort(key=lambda known: known.rank)
        self.highest_first = tuple(reversed(self.implementations))


#: By overload.
OPERATORS: dict[Any, Operator[Any]] = {}


def always() -> bool:
    """Whether an implementation can run in this process, of one that always can."""
    return True


@dataclass(frozen=True)
class Implementation(Generic[Arguments]):
    """One way to compute an operator.

    Attributes:
        operator: what it computes.
        name: for records, counts and tests.
        run: takes the operator's named arguments and computes. ``choosing`` is who calls it.
        supports: takes the same; the reason why ``run`` does not compute them, or None. Without it, all are computed.
        rank: 0 for the usual one. Where nothing was measured and no model knows better, the highest runs that supports
            the arguments.
        usable: whether it can run in this process; what cannot is left out of lowered graphs.
        replaces: an implementation that is none where this one supports the arguments.
        counts: whether it counts itself, in more detail, when it is chosen.
    """

    operator: Operator[Arguments]
    name: str
    run: Callable[[Arguments], Any]
    supports: Callable[[Arguments], str | None] | None = None
    rank: int = 0
    usable: Callable[[], bool] = always
    replaces: str | None = None
    counts: bool = False


@dataclass(frozen=True)
class CostModel(Generic[Arguments]):
    """Who knows which implementation is the fastest without measuring.

    Attributes:
        operator: what it knows about.
        expected: takes the operator's named arguments and the names of the implementations that support them; one of
            these names, or None where it does not know.
        rank: the highest is asked first.
    """

    operator: Operator[Arguments]
    expected: Callable[[Arguments, Sequence[str]], str | None]
    rank: int = 0


def named(arguments: type[Arguments], function: Callable[[Arguments], Any]) -> Callable[..., Any]:
    """A function of named arguments as one that takes them one by one."""

    count = len(arguments._fields)  # type: ignore[attr-defined]

    def one_by_one(*given: Any, **by_name: Any) -> Any:
        # This is done for each operator of each call; most arguments come all by position.
        complete = len(given) == count and not by_name
        return function(tuple.__new__(arguments, given) if complete else arguments(*given, **by_name))

    return one_by_one


def infer_schema(arguments: type[tuple[Any, ...]], shape: Callable[..., Any]) -> str:
    """What stands behind an operator's name in its schema, by the annotations of its arguments and of its shape."""

    def prototype() -> None:
        """Only its signature is read."""

    types = typing.get_type_hints(arguments)
    defaults: dict[str, Any] = arguments._field_defaults  # type: ignore[attr-defined]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [
        inspect.Parameter(name, kind, default=defaults.get(name, inspect.Parameter.empty), annotation=annotation)
        for name, annotation in types.items()
    ]
    returned = typing.get_type_hints(shape)["return"]
    prototype.__signature__ = inspect.Signature(parameters, return_annotation=returned)  # type: ignore[attr-defined]
    schema: str = torch.library.infer_schema(prototype, mutates_args=())
    return schema
