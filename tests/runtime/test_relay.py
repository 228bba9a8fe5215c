"""One compiled network for several runtimes, thread by thread."""

from __future__ import annotations

import copy
import threading

import pytest
import torch

from fisedit_compile.errors import FisEditError
from fisedit_compile.runtime import Relay, Runtime
from support.fake_network import FakeNetwork, inputs, run


def test_the_runtime_in_use_is_asked() -> None:
    relay, first, second = Relay(), Runtime(), Runtime(storage=torch.float16)
    network = FakeNetwork(relay)
    for runtime, calls in ((first, inputs(2)), (second, inputs(1))):
        with runtime.record("base"), relay.using(runtime):
            run(network, calls)
    assert [runtime.stats.calls["record"] for runtime in (first, second)] == [2, 1]
    assert first.stats.bytes_stored == 2 * first.bytes_needed(network.sites)
    assert second.stats.bytes_stored == second.bytes_needed(network.sites) < first.bytes_needed(network.sites)
    mask = torch.ones(1, 1)
    with first.edit("base", mask=mask), relay.using(first):
        with relay.using(second):
            run(network, inputs(1))
        run(network, inputs(2))
    assert [runtime.stats.calls["edit"] for runtime in (first, second)] == [2, 0], "the innermost one did not edit"


def test_it_ends_with_an_error_too() -> None:
    relay, runtime = Relay(), Runtime()
    with pytest.raises(KeyError), relay.using(runtime):
        raise KeyError
    with pytest.raises(FisEditError, match="no runtime is in use"):
        relay.bytes_needed([])


def test_threads_use_runtimes_of_their_own() -> None:
    relay, runtime = Relay(), Runtime()
    seen: list[object] = []

    def ask() -> None:
        seen.append(relay.phase())

    with runtime.record("a"), relay.using(runtime):
        run(FakeNetwork(relay), inputs(1))
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        assert relay.phase() is not None
    assert seen == [None]


def test_a_copy_of_a_network_asks_the_same() -> None:
    relay = Relay()
    assert copy.deepcopy(relay) is relay
