"""Errors that leave a session advise what the user of a session can do."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch

import fisedit_compile
from fisedit_compile.errors import BudgetError, CallMismatchError, FisEditError, WeightsChangedError
from fisedit_compile.executing.executable import PASS_A_TENSOR
from fisedit_compile.options import NUMBERS_HINT, without_hints
from fisedit_compile.pipelines.wording import in_session_words, session_words
from fisedit_compile.runtime import Runtime
from support.fake_network import FakeNetwork, inputs, left_half, run

OF_RUNTIMES = (
    "tokens=",
    "dynamic=False",
    "packing",
    "Runtime(",
    "runtime.",
    "options=",
    "option tokens",
    "option content",
    "torch.compile",
    "record again",
    "record the base",
    "number of steps",
)


def recorded() -> tuple[Runtime, FakeNetwork]:
    runtime = Runtime()
    network = FakeNetwork(runtime)
    with runtime.record("generation-1"):
        run(network, inputs(3))
    return runtime, network


def too_few(runtime: Runtime, network: FakeNetwork) -> None:
    with runtime.edit("generation-1", mask=left_half()):
        run(network, inputs(2))


def too_many(runtime: Runtime, network: FakeNetwork) -> None:
    with runtime.edit("generation-1", mask=left_half()):
        run(network, inputs(4))


def other_times(runtime: Runtime, network: FakeNetwork) -> None:
    with runtime.edit("generation-1", mask=left_half()):
        run(network, [(x, time + 1) for x, time in inputs(3)])


def other_weights(runtime: Runtime, network: FakeNetwork) -> None:
    with torch.no_grad():
        for parameter in (network.weight,):
            parameter.add_(1)
    with runtime.edit("generation-1", mask=left_half()):
        run(network, inputs(3))


def no_room(runtime: Runtime, network: FakeNetwork) -> None:
    runtime._store.ledger.budget = 1
    with runtime.record("generation-2"):
        run(network, inputs(3))


def nothing(runtime: Runtime, network: FakeNetwork) -> None:
    with runtime.record("generation-2"):
        pass


@pytest.mark.parametrize(
    ("wrong", "advice"),
    [
        (too_few, "the run was cancelled"),
        (too_many, "the run was cancelled"),
        (other_times, "timesteps"),
        (other_weights, "put the network's weights back"),
        (no_room, r"undo\(\) or reset\(\)"),
        (nothing, "the run was cancelled"),
    ],
)
def test_errors_of_the_runtime_get_the_words_of_sessions(wrong: Any, advice: str) -> None:
    with pytest.raises(FisEditError, match=advice) as caught, session_words():
        wrong(*recorded())
    assert not [word for word in OF_RUNTIMES if word in str(caught.value)]
    assert "base 'generation-1'" not in str(caught.value)


def test_users_of_a_runtime_are_told_what_they_can_do() -> None:
    with pytest.raises(BudgetError, match=r"raise Runtime\(budget=\.\.\.\), drop a base with runtime\.drop"):
        no_room(*recorded())
    with pytest.raises(
        CallMismatchError, match="a run that was cancelled cannot be kept; edit with the number of steps"
    ):
        too_few(*recorded())


def test_notes_on_python_numbers_are_for_users_of_a_runtime() -> None:
    error = CallMismatchError("base 'edit-2' has no such call", advice="record again")
    error.add_note(f"t came as a Python number; {PASS_A_TENSOR}")
    error.add_note("this graph runs densely")
    with pytest.raises(CallMismatchError) as caught, session_words():
        raise error
    assert caught.value is error and error.__notes__[1:] == ["this graph runs densely"]
    assert error.__notes__[0].endswith("docs/errors.md#callmismatcherror")
    assert str(error).startswith("the picture 'edit-2' has no such call; the run was cancelled")


def test_what_a_session_says_itself_stays() -> None:
    for error in (WeightsChangedError("as it is"), ValueError("of the pipeline")):
        with pytest.raises(type(error)) as caught, session_words():
            raise error
        assert str(caught.value) in ("as it is", "of the pipeline")
    assert in_session_words("base 'first' stays") == "base 'first' stays"


def test_pipelines_advise_nothing_that_a_session_does_not_take() -> None:
    """Every text of an error in the package of sessions."""
    folder = Path(fisedit_compile.__file__).parent / "pipelines"
    found = []
    for path in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and node.exc is not None:
                texts = (part.value for part in ast.walk(node.exc) if isinstance(part, ast.Constant))
                text = " ".join(text for text in texts if isinstance(text, str))
                found += [
                    (path.name, node.lineno, word) for word in OF_RUNTIMES if word in text.replace("prompt_tokens=", "")
                ]
    assert not found


def test_reasons_of_dense_graphs_end_before_advice_on_options() -> None:
    plain = "none of its inputs is a picture or a feature map"
    x = torch.zeros(1, 12, 4)
    report = fisedit_compile.explain(torch.nn.Linear(4, 4), x)
    reason = next(graph.reason for graph in report.graphs if graph.reason)
    assert reason.startswith(plain) and "option tokens" in reason and without_hints(reason) == plain
    assert without_hints(f"sizes{NUMBERS_HINT} t, ...: compile with dynamic=False") == "sizes"
