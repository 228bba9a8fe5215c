"""The guard against silent falls to eager is there wherever it is needed, and nowhere else."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisedit_compile as fisedit
from fisedit_compile.errors import CallMismatchError
from fisedit_compile.private import dynamo
from fisedit_compile.runtime import Runtime, recompiles
from support.fake_network import FakeNetwork, inputs, run

FRESH = """
import sys
import torch
import fisedit_compile as fisedit
from torch import nn

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x, t):
        return torch.relu(self.convolution(x)) * t

def compiled(**settings):
    network = Network().requires_grad_(False)
    return torch.compile(network, backend="fisedit", options={"runtime": runtime}, **settings)

runtime = fisedit.Runtime()
assert "fisedit_compile.backend" not in sys.modules
"""
SIZES = """
torch._dynamo.config.recompile_limit = 2
with runtime.record("sizes") as run:
    network = compiled(dynamic=False)
    for width in range(5, 9):
        network(torch.ones(1, 3, 11, width), torch.tensor(2))
    assert run.calls == 4, run.calls
assert torch._dynamo.config.recompile_limit == 2
"""
INTEGERS = """
x, mask, steps = torch.ones(1, 3, 11, 13), torch.zeros(11, 13), (9, 7, 5, 9)
mask[2:5, 3:7] = 1
with runtime.record("integers"):
    network = compiled()
    for step in steps:
        network(x, step)
with runtime.edit("integers", mask=mask):
    for step in steps:
        network(x + 1, step)
"""


class Convolving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, padding=1)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:
            raise LookupError("of the user's")
        return torch.relu(self.convolution(x))


def picture(width: int) -> Tensor:
    return torch.ones(2, 3, 11, width)


def settings() -> dict[str, Any]:
    """What the guard changes."""
    names = ("recompile_limit", "fail_on_recompile_limit_hit", "suppress_errors")
    return {name: getattr(torch._dynamo.config, name) for name in names}


@pytest.mark.parametrize("part", ["sizes", "integers"])
def test_a_process_that_imports_nothing_else_has_the_guard(part: str) -> None:
    """The network is compiled inside the first recording, as sessions do it."""
    if part == "integers" and not dynamo.INTEGERS_CHOOSE_GRAPHS:
        pytest.skip("this PyTorch chooses graphs for integers by what ran last: they are refused")
    script = FRESH + {"sizes": SIZES, "integers": INTEGERS}[part]
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)


def test_contexts_that_end_out_of_order_leave_no_setting_behind() -> None:
    before = settings()
    first, second = Runtime(), Runtime()
    for last in (first, second):
        entered = {runtime: runtime.record("base") for runtime in (first, second)}
        for context in entered.values():
            context.__enter__()
        strict = settings()
        assert strict["fail_on_recompile_limit_hit"] and strict["recompile_limit"] >= recompiles.GRAPHS
        for runtime in (first, second):
            run(FakeNetwork(runtime), inputs(1))
        other = second if last is first else first
        entered[other].__exit__(None, None, None)
        assert settings() == strict, "still needed"
        entered[last].__exit__(None, None, None)
        assert settings() == before


def test_what_the_user_sets_inside_stays() -> None:
    with torch._dynamo.config.patch(recompile_limit=5):
        with strict():
            torch._dynamo.config.recompile_limit = 100
        assert torch._dynamo.config.recompile_limit == 100
    with torch._dynamo.config.patch(recompile_limit=100):
        with strict():
            assert torch._dynamo.config.recompile_limit == 100, "the user's limit is greater"


@contextmanager
def strict() -> Iterator[None]:
    """A recording of one call."""
    runtime = Runtime()
    with runtime.record("base"):
        run(FakeNetwork(runtime), inputs(1))
        yield


@pytest.mark.skipif(not dynamo.SETTINGS_PER_THREAD, reason="this PyTorch has one setting for all threads")
def test_other_threads_keep_their_settings() -> None:
    """One thread enters while another calls, and leaves before it."""
    before, seen = settings(), []
    entered, looked = threading.Event(), threading.Event()

    def inside() -> None:
        with strict():
            entered.set()
            looked.wait(30)
        seen.append(settings())

    thread = threading.Thread(target=inside)
    with strict():
        here = settings()
        thread.start()
        assert entered.wait(30) and settings() == here
        looked.set()
        thread.join()
        assert settings() == here
    assert settings() == before and seen == [before]


def compiled_ways(runtime: Runtime) -> dict[str, Callable[[], Callable[[Tensor], Tensor]]]:
    """Ways to compile a network."""
    settings: dict[str, Any] = {"backend": "fisedit", "options": {"runtime": runtime}, "dynamic": False}

    def in_place() -> Callable[[Tensor], Tensor]:
        network = Convolving()
        network.compile(**settings)
        return network

    def function() -> Callable[[Tensor], Tensor]:
        network = Convolving()
        return torch.compile(lambda x: network(x), **settings)

    return {"module": lambda: torch.compile(Convolving(), **settings), "in place": in_place, "function": function}


@pytest.mark.parametrize("way", ["module", "in place", "function"])
def test_calls_that_reach_no_graph_are_errors(way: str) -> None:
    """The limit was reached outside of the contexts: Dynamo never tries this code again."""
    runtime = Runtime()
    compiled = compiled_ways(runtime)[way]()
    with torch._dynamo.config.patch(recompile_limit=2), torch.no_grad():
        for width in (5, 6, 7):
            compiled(picture(width))
        with runtime.record("known"):
            compiled(picture(5))
        with pytest.raises(CallMismatchError, match="came to none of its graphs"), runtime.record("unknown"):
            compiled(picture(5))
            compiled(picture(8))
        # Also where somebody catches the error of the call.
        with pytest.raises(CallMismatchError, match="came to none"), runtime.record("caught"):
            compiled(picture(5))
            with pytest.raises(CallMismatchError):
                compiled(picture(8))
        mask = torch.zeros(11, 5)
        mask[2:4, 2:4] = 1
        with runtime.edit("known", mask=mask):
            compiled(picture(5))
        with pytest.raises(CallMismatchError, match="came to none"), runtime.edit("known", mask=mask):
            compiled(picture(8))
        # Outside, eager calls are nobody's business.
        compiled(picture(8))
    assert runtime.bases == ("known",)


def test_a_network_that_is_told_to_run_eagerly_is_an_error() -> None:
    runtime = Runtime()
    compiled = torch.compile(Convolving(), backend="fisedit", options={"runtime": runtime})
    with torch.no_grad(), runtime.record("base"):
        compiled(picture(5))
    with pytest.raises(CallMismatchError, match="torch.compiler.set_stance"), torch.no_grad(), runtime.record("other"):
        compiled(picture(5))
        with torch.compiler.set_stance("force_eager"):
            compiled(picture(5))


def test_what_was_compiled_with_equal_options_is_seen_too() -> None:
    """It shares the graphs, so that nothing is compiled for it."""
    runtime = Runtime()
    first, second = (torch.compile(Convolving(), backend="fisedit", options={"runtime": runtime}) for _ in range(2))
    with pytest.raises(CallMismatchError, match="came to none"), torch.no_grad(), runtime.record("base"):
        for compiled in (first, second):
            compiled(picture(5))
        with torch.compiler.set_stance("force_eager"):
            second(picture(5))


def test_errors_of_the_network_leave_as_they_are() -> None:
    runtime = Runtime()
    network = Convolving()
    compiled = torch.compile(network, backend="fisedit", options={"runtime": runtime})
    with torch.no_grad():
        with runtime.record("base"):
            compiled(picture(5))
        network.fails = True
        with torch.compiler.set_stance("force_eager"), pytest.raises(LookupError), runtime.record("other"):
            compiled(picture(5))
        network.fails = False
        with runtime.record("in a handler"):
            try:
                raise KeyError
            except KeyError:
                compiled(picture(5))
        with pytest.raises(CallMismatchError), runtime.record("in a handler"):
            try:
                raise KeyError
            except KeyError:
                with torch.compiler.set_stance("force_eager"):
                    compiled(picture(5))


def test_the_guard_is_part_of_every_context() -> None:
    assert not hasattr(fisedit.Runtime, "hooks")
