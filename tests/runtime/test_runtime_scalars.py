"""Scalar inputs of an edit must be the recorded ones."""

from __future__ import annotations

import pytest
import torch

from fisedit_compile.errors import ScalarMismatchError
from fisedit_compile.runtime import Runtime
from fisedit_compile.runtime.scalars import ScalarCheck
from support.fake_network import FakeNetwork, inputs, left_half, run


def recorded(count: int) -> tuple[Runtime, FakeNetwork]:
    runtime = Runtime()
    network = FakeNetwork(runtime)
    with runtime.record("base"):
        run(network, inputs(count))
    return runtime, network


def test_other_scalars_are_refused_at_the_call() -> None:
    runtime, network = recorded(3)
    calls = inputs(3)
    calls[1] = (calls[1][0], torch.tensor(11.0))
    with pytest.raises(ScalarMismatchError, match="call 1 of network, scalar input 0: expected 10.0.*got 11.0"):
        with runtime.edit("base", mask=left_half()):
            run(network, calls)
    assert network.last is not None and network.last.scalars[0] == 0.0


@pytest.mark.parametrize(
    ("before", "now", "text"),
    [
        ([1], [1, 2], "1 scalar inputs"),
        ([1], [2], "expected 1 .*got 2"),
        ([torch.tensor(1.0)], [1.0], "got 1.0"),
        ([torch.tensor(1.0)], [torch.tensor([1.0])], r"got shape \[1\]"),
        ([torch.tensor(1.0)], [torch.tensor(1)], "got shape .* int64"),
        ([torch.tensor([1, 2])], [torch.tensor([1, 3])], r"\[1, 2\].*\[1, 3\]"),
        (
            [torch.arange(9000)],
            [torch.ones(9000, dtype=torch.int64)],
            r"expected shape \[9000\] int64 on cpu that begins with \[0, 1, 2, 3, 4, 5, 6, 7\] as .* with \[1, 1,",
        ),
    ],
)
def test_scalar_forms(before: list[object], now: list[object], text: str) -> None:
    check = ScalarCheck("base")
    check.compare("call 0", before, before)  # type: ignore[arg-type]
    with pytest.raises(ScalarMismatchError, match=text):
        check.compare("call 0", before, now)  # type: ignore[arg-type]


def test_scalars_on_a_device_are_read_at_the_end_and_the_first_is_named() -> None:
    check = ScalarCheck("base")
    check.finish()
    for call, (before, now) in enumerate([(1.0, 1.0), (2.0, 2.5), (3.0, 3.5)]):
        check.compare_later(f"call {call}", torch.tensor([before]), torch.tensor([now]))
        if call == 0:
            check.finish()
    with pytest.raises(ScalarMismatchError, match="call 1"):
        check.finish()


def test_an_edit_reads_device_scalars_when_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScalarCheck, "readable", staticmethod(lambda scalar: False))
    runtime, network = recorded(3)
    calls = inputs(3)
    with runtime.edit("base", mask=left_half()):
        run(network, calls)
    calls[1] = (calls[1][0], torch.tensor(11.0))
    finished = False
    with pytest.raises(ScalarMismatchError, match="call 1 of network, scalar input 0"):
        with runtime.edit("base", mask=left_half(), save_as="v2"):
            run(network, calls)
            finished = True
    assert finished and runtime.bases == ("base",)


def test_recorded_scalars_are_copies() -> None:
    runtime, network = recorded(1)
    calls = inputs(2)
    time = torch.tensor(0.0)
    with runtime.record("base"):
        network(calls[0][0], time)
        time += 10
        network(calls[1][0], time)
    with runtime.edit("base", mask=left_half()):
        run(network, calls)


def test_nan_is_what_it_was() -> None:
    """Not a number differs from itself: a message would show the same on both sides."""
    scalars = [torch.tensor([1.0, float("nan")]), float("nan"), torch.tensor(float("nan"))]
    check = ScalarCheck("base")
    check.compare(
        "call 0", scalars, [scalar.clone() if isinstance(scalar, torch.Tensor) else scalar for scalar in scalars]
    )
    check.compare_later("call 1", scalars[0], scalars[0].clone())
    check.finish()
    with pytest.raises(ScalarMismatchError, match="expected nan .* got 1.0"):
        check.compare("call 2", [float("nan")], [1.0])
