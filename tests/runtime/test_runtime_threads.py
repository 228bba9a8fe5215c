"""Several threads: contexts belong to threads, edits of one base take turns, the budget is shared."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from fisedit_compile.errors import BudgetError, CallMismatchError
from fisedit_compile.runtime import Runtime
from support.fake_network import FakeNetwork, edit_phase, inputs, run

THREADS = 6
PATIENCE = 60.0


def together(work: Callable[[int], object], count: int = THREADS) -> list[object]:
    """Run ``work(0)``, ``work(1)``, ... in threads that start at the same moment."""
    barrier = threading.Barrier(count)

    def start(number: int) -> object:
        barrier.wait(PATIENCE)
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return [future.result(PATIENCE) for future in [pool.submit(start, number) for number in range(count)]]


def test_a_context_belongs_to_its_thread() -> None:
    runtime = Runtime()
    network = FakeNetwork(runtime)
    with runtime.record("base"):
        run(network, inputs(1))
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(runtime.phase).result(PATIENCE) is None
            x, time = inputs(1)[0]
            assert torch.equal(pool.submit(network, x, time).result(PATIENCE), network.dense(x, time)[1])
    assert runtime.stats.calls["record"] == 1


def test_threads_edit_one_base_each_with_its_mask() -> None:
    runtime = Runtime()
    network = FakeNetwork(runtime)
    with runtime.record("base"):
        recorded = run(network, inputs(4))

    def edit(number: int) -> list[torch.Tensor]:
        mask = torch.zeros(4, 6)
        mask[:, number] = 1
        with runtime.edit("base", mask=mask, save_as=f"v{number}"):
            return run(network, [(x + number + 1, time) for x, time in inputs(4)])

    for number, outputs in enumerate(together(edit)):
        for (x, time), output, base in zip(inputs(4), outputs, recorded, strict=True):  # type: ignore[call-overload]
            expected = base.clone()
            expected[..., number] = network.dense(x + number + 1, time)[1][..., number]
            assert torch.equal(output, expected)
    assert set(runtime.bases) == {"base", *(f"v{number}" for number in range(THREADS))}
    assert runtime.stats.calls["edit"] == 4 * THREADS
    for name in runtime.bases:
        runtime.drop(name)
    assert runtime.stats.bytes_stored == 0


def test_calls_of_one_base_never_overlap_and_those_of_two_bases_may() -> None:
    runtime = Runtime()
    network = FakeNetwork(runtime)
    for name in ("one", "two"):
        with runtime.record(name):
            run(network, inputs(1))
    time = torch.tensor(0.0)

    def blocked_while_other_edits(name: str) -> bool:
        """Whether a call on ``name`` waits while another thread is within a call on base ``one``."""
        entered = threading.Event()

        def call() -> None:
            with runtime.edit(name, mask=torch.ones(4, 6)):
                phase = edit_phase(runtime)
                with phase.running(phase.begin(network.key, [network.weight], [time])):
                    entered.set()

        with runtime.edit("one", mask=torch.ones(4, 6)):
            phase = edit_phase(runtime)
            with phase.running(phase.begin(network.key, [network.weight], [time])):
                thread = threading.Thread(target=call)
                thread.start()
                waited = not entered.wait(0.3 if name == "one" else PATIENCE)
        thread.join(PATIENCE)
        assert entered.is_set()
        return waited

    assert blocked_while_other_edits("one")
    assert not blocked_while_other_edits("two")


def test_threads_share_the_budget() -> None:
    needed = Runtime().bytes_needed(FakeNetwork(Runtime()).sites)
    runtime = Runtime(budget=3 * needed)
    networks = [FakeNetwork(runtime) for _ in range(THREADS)]

    def record(number: int) -> bool:
        try:
            with runtime.record(f"base {number}"):
                run(networks[number], inputs(1))
        except BudgetError:
            return False
        return True

    succeeded = together(record)
    assert sum(map(bool, succeeded)) == 3
    assert len(runtime.bases) == 3 and runtime.stats.bytes_stored == 3 * needed


def test_a_failure_in_one_thread_leaves_the_others_alone() -> None:
    runtime = Runtime()
    network = FakeNetwork(runtime)
    with runtime.record("base"):
        run(network, inputs(3))

    def edit(number: int) -> str:
        try:
            with runtime.edit("base", mask=torch.ones(4, 6)):
                run(network, inputs(2 if number % 2 else 3))
        except CallMismatchError:
            return "failed"
        return "done"

    assert together(edit) == ["done", "failed"] * (THREADS // 2)
