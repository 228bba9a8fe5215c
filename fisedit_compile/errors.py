"""Every error the package raises on purpose. Each message says what was expected, what came, and what to do."""


class FisEditError(Exception):
    """Base class of all errors raised by fisedit-compile.

    Args:
        fact: what was expected, and what came.
        advice: what to do, apart where it depends on who asks: the user of a runtime can do other things than that of
            an edit session, who never sees the runtime.
    """

    def __init__(self, fact: str = "", *, advice: str = "") -> None:
        super().__init__(f"{fact}; {advice}" if advice else fact)
        self.fact = fact
        self.advice = advice

    def reword(self, fact: str, advice: str) -> None:
        """Say the same in other words."""
        self.fact, self.advice = fact, advice
        self.args = (f"{fact}; {advice}" if advice else fact,)


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


class GraphError(FisEditError, RuntimeError):
    """A graph breaks an invariant of the compiler: a defect of the package, never of the user's model."""
