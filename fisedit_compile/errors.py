"""Every error the package raises on purpose. Each message says what was expected, what came, and what to do."""

from __future__ import annotations

from typing import ClassVar


class FisEditError(Exception):
    """Base class of all errors raised by fisedit-compile.

    Below it a traceback has a line that says where the documentation explains the class.

    Args:
        fact: what was expected, and what came.
        advice: what to do, apart where it depends on who asks: the user of a runtime can do other things than that of
            an edit session, who never sees the runtime.
    """

    #: Whether it is in the user's hands, so that the documentation has something to advise.
    explained: ClassVar[bool] = True

    def __init__(self, fact: str = "", *, advice: str = "") -> None:
        super().__init__(f"{fact}; {advice}" if advice else fact)
        self.fact = fact
        self.advice = advice
        if self.explained:
            # A note and no part of the message: the command line and sessions show the message alone.
            self.add_note(f"About {type(self).__name__}, what causes it and what to do: {catalogue_entry(type(self))}")

    def reword(self, fact: str, advice: str) -> None:
        """Say the same in other words."""
        self.fact, self.advice = fact, advice
        self.args = (f"{fact}; {advice}" if advice else fact,)


def catalogue_entry(kind: type[FisEditError]) -> str:
    """Where the documentation explains an error: a file of the project, and the anchor in it.

    Classes that other modules derive are explained with the class of this module that they are derived from.
    """
    own = next(parent for parent in kind.__mro__ if parent.__module__ == __name__)
    return f"docs/errors.md#{own.__name__.lower()}"


class OptionError(FisEditError, ValueError):
    """An option of the backend, the runtime or the command line is unknown or has an invalid value."""


class MaskError(FisEditError, ValueError):
    """A mask has zero size, the wrong rank, NaN values, or a batch that does not divide the network's batch."""


class UnknownBaseError(FisEditError, KeyError):
    """The named base was never recorded, or was dropped."""

    def __str__(self) -> str:
        # KeyError prints the repr of its argument; a message for people must not be quoted.
        return str(self.args[0]) if self.args else ""


class CallMismatchError(FisEditError, RuntimeError):
    """The calls of an edit do not line up with the recorded calls: other graph, too many calls, or too few."""


class ScalarMismatchError(CallMismatchError):
    """A scalar input (for example the timestep) differs from the one of the recorded call."""


class WeightsChangedError(FisEditError, RuntimeError):
    """The network's parameters are not the ones the base was recorded with."""


class BudgetError(FisEditError, MemoryError):
    """A recording would need more memory than the runtime's byte budget."""


class GradientError(FisEditError, RuntimeError):
    """An input requires grad inside record or edit, which run without autograd."""


class PipelineError(FisEditError, ValueError):
    """The pipeline, or an argument given to an EditSession, cannot be used."""


class MissingPackageError(FisEditError, ImportError):
    """A package that only a part of fisedit-compile needs is not installed.

    Args:
        package: its name, as it is installed.
        purpose: what needs it: "edit sessions".
        extra: of fisedit-compile that brings it; "" for what fisedit-compile itself brings.
    """

    def __init__(self, package: str, purpose: str, extra: str = "") -> None:
        wanted = f"'fisedit-compile[{extra}]'" if extra else package
        super().__init__(
            f"the package {package} is not installed, which this needs: {purpose}", advice=f"run: pip install {wanted}"
        )
        self.name = package


class GraphError(FisEditError, RuntimeError):
    """A graph breaks an invariant of the compiler: a defect of the package, never of the user's model."""

    explained = False
