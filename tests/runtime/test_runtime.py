"""Contexts of a runtime: ordinals, masks, what is checked at a call and what at the end."""

from __future__ import annotations

import weakref

import pytest
import torch

from fisedit_compile.errors import (
    CallMismatchError,
    FisEditError,
    GraphError,
    MaskError,
    OptionError,
    UnknownBaseError,
    WeightsChangedError,
)
from fisedit_compile.runtime import EditPhase, ProgramKey, RecordPhase, Runtime, default_runtime
from support.fake_network import DOMAIN, FakeNetwork, edit_phase, inputs, left_half, record_phase, run


def recorded(count: int = 3, name: str = "base", batch: int = 2) -> tuple[Runtime, FakeNetwork, list[torch.Tensor]]:
    runtime = Runtime()
    network = FakeNetwork(runtime, batch=batch)
    with runtime.record(name):
        outputs = run(network, inputs(count, batch=batch))
    return runtime, network, outputs


def other(calls: list[tuple[torch.Tensor, torch.Tensor]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(x + 1, time) for x, time in calls]


def test_phase_follows_the_context() -> None:
    runtime, network, _ = recorded()
    assert runtime.phase() is None
    with runtime.record("again"):
        assert isinstance(runtime.phase(), RecordPhase)
        run(network, inputs(1))
    assert runtime.phase() is None
    with runtime.edit("again"):
        assert isinstance(runtime.phase(), EditPhase)
        run(network, inputs(1))
    assert runtime.phase() is None
    assert runtime.bases == ("base", "again")


def test_ith_call_uses_ith_recorded_call() -> None:
    runtime, network, outputs = recorded(4)
    changed = other(inputs(4))
    with runtime.edit("base", mask=left_half()) as edit:
        for ordinal, (x, time) in enumerate(changed):
            result = network(x, time)
            dense = network.dense(x, time)[1]
            assert torch.equal(result[..., 3:], outputs[ordinal][..., 3:])
            assert torch.equal(result[..., :3], dense[..., :3])
            assert not torch.equal(result[..., :3], outputs[ordinal][..., :3])
        assert edit.calls == 4
        assert edit.density == 0.5


def test_dense_until_the_mask_is_known_and_ordinals_go_on() -> None:
    runtime, network, outputs = recorded(3)
    changed = other(inputs(3))
    with runtime.edit("base") as edit:
        assert edit.mask is None and edit.density is None
        assert torch.equal(network(*changed[0]), network.dense(*changed[0])[1])
        edit.set_mask(left_half())
        result = network(*changed[1])
        assert torch.equal(result[..., 3:], outputs[1][..., 3:])
        edit.set_mask(torch.zeros(4, 6))
        assert torch.equal(network(*changed[2]), outputs[2])
    assert runtime.stats.calls == {"record": 3, "edit": 2, "dense": 1}


def test_empty_mask_has_no_plan() -> None:
    runtime, network, outputs = recorded()
    with runtime.edit("base", mask=torch.zeros(8, 12)) as edit:
        results = run(network, other(inputs(3)))
    assert network.plans == [None] * 3
    assert edit.density == 0.0
    assert all(torch.equal(result, output) for result, output in zip(results, outputs, strict=True))
    assert runtime.stats.density == {str(DOMAIN): 0.0}


def test_plan_is_built_once_for_a_mask() -> None:
    runtime, network, _ = recorded()
    for _ in range(2):
        with runtime.edit("base", mask=left_half()):
            run(network, inputs(3))
    with runtime.edit("base", mask=~left_half()):
        run(network, inputs(3))
    assert len({id(plan) for plan in network.plans[:6]}) == 1
    assert network.plans[6] is not network.plans[0]


@pytest.mark.parametrize("samples", [1, 2, 4])
def test_mask_batch_divides_network_batch(samples: int) -> None:
    runtime, network, outputs = recorded(batch=4)
    with runtime.edit("base", mask=left_half(samples)):
        results = run(network, other(inputs(3, batch=4)))
    assert torch.equal(results[0][..., 3:], outputs[0][..., 3:])


@pytest.mark.parametrize("empty", [False, True])
def test_mask_batch_is_checked_when_the_network_is_known(empty: bool) -> None:
    runtime, network, _ = recorded(batch=4)
    mask = left_half(3) & (not empty)
    with pytest.raises(MaskError, match="batch"), runtime.edit("base", mask=mask):
        run(network, inputs(3, batch=4))


def test_wrong_mask_is_refused_before_anything_runs() -> None:
    runtime, _, _ = recorded()
    with pytest.raises(MaskError), runtime.edit("base", mask=torch.full((4, 6), float("nan"))):
        pytest.fail("the context must not be entered")
    assert runtime.phase() is None


def test_unknown_base_names_the_existing_ones() -> None:
    runtime, _, _ = recorded(name="one")
    with pytest.raises(UnknownBaseError, match="'two'.*existing bases: 'one'"), runtime.edit("two"):
        pytest.fail("the context must not be entered")
    with pytest.raises(UnknownBaseError, match="existing bases: 'one'"):
        runtime.drop("two")
    runtime.drop("one")
    with pytest.raises(UnknownBaseError, match="existing bases: none"):
        runtime.drop("one")


@pytest.mark.parametrize("name", ["", 3, None])
def test_names_are_texts(name: object) -> None:
    with pytest.raises(OptionError), Runtime().record(name):  # type: ignore[arg-type]
        pytest.fail("the context must not be entered")


def test_nesting_on_one_runtime_is_an_error_and_leaves_the_outer_context_whole() -> None:
    runtime, network, _ = recorded()
    with runtime.record("outer"):
        network(*inputs(2)[0])
        with pytest.raises(FisEditError, match=r"edit\('base'\) inside another record or edit"), runtime.edit("base"):
            pytest.fail("the context must not be entered")
        with pytest.raises(FisEditError, match="inside another record or edit"), runtime.record("inner"):
            pytest.fail("the context must not be entered")
        network(*inputs(2)[1])
    assert runtime.bases == ("base", "outer")


def test_contexts_of_two_runtimes_nest() -> None:
    first, first_network, _ = recorded(2)
    second = Runtime()
    second_network = FakeNetwork(second)
    changed = other(inputs(2))
    with first.edit("base", mask=left_half()), second.record("inside"):
        assert isinstance(first.phase(), EditPhase) and isinstance(second.phase(), RecordPhase)
        run(first_network, changed)
        run(second_network, changed)
        assert first_network.last is not None
    assert second.bases == ("inside",) and first.bases == ("base",)


def test_fewer_calls_than_recorded_is_an_error() -> None:
    runtime, network, _ = recorded(3)
    with pytest.raises(CallMismatchError, match="holds 3 calls of network, the edit made 2"):
        with runtime.edit("base", mask=left_half()):
            run(network, inputs(2))
    with pytest.raises(CallMismatchError, match="made 0"), runtime.edit("base", mask=left_half()):
        pass


def test_more_calls_than_recorded_is_an_error() -> None:
    runtime, network, _ = recorded(2)
    with pytest.raises(CallMismatchError, match="holds 2 calls of network, and the edit makes one more"):
        with runtime.edit("base", mask=left_half()):
            run(network, inputs(3))


def test_every_graph_of_a_base_must_be_called() -> None:
    runtime = Runtime()
    networks = FakeNetwork(runtime, "front"), FakeNetwork(runtime, "back")
    with runtime.record("base", calls=2):
        for x, time in inputs(2):
            networks[1](networks[0](x, time), time)
    with pytest.raises(CallMismatchError, match="calls of back, the edit made 0"), runtime.edit("base", left_half()):
        run(networks[0], inputs(2))


def test_unknown_graph_is_an_error_that_names_both() -> None:
    runtime, _, _ = recorded()
    with pytest.raises(CallMismatchError, match="no calls of stranger; it holds network: 3 calls"):
        with runtime.edit("base", mask=left_half()):
            run(FakeNetwork(runtime, "stranger"), inputs(3))


def test_same_graph_with_other_parameters_is_named_as_such() -> None:
    runtime, network, _ = recorded()
    with pytest.raises(WeightsChangedError, match="other parameters of network"), runtime.edit("base", left_half()):
        run(FakeNetwork(runtime), inputs(3))
    # Once the recorded network is gone, a new parameter may get its number; the weak references tell them apart.
    del network
    with pytest.raises(WeightsChangedError, match="other parameters of network|is not the recorded tensor"):
        with runtime.edit("base", left_half()):
            run(FakeNetwork(runtime), inputs(3))


def test_recording_nothing_is_an_error() -> None:
    runtime = Runtime()
    with pytest.raises(CallMismatchError, match="nothing was recorded for base 'base'"), runtime.record("base"):
        pass
    assert runtime.bases == ()


@pytest.mark.parametrize(
    ("announced", "made", "fits"), [(3, 3, True), (3, 6, True), (3, 2, False), (3, 4, False), (0, 3, False)]
)
def test_announced_number_of_calls(announced: int, made: int, fits: bool) -> None:
    runtime = Runtime()
    network = FakeNetwork(runtime)
    if fits:
        with runtime.record("base", calls=announced):
            run(network, inputs(made))
    else:
        with pytest.raises(CallMismatchError, match=f"announced with {announced} calls.*got {made}"):
            with runtime.record("base", calls=announced):
                run(network, inputs(made))
    assert runtime.bases == (("base",) if fits else ())


def test_a_failed_recording_keeps_the_old_base() -> None:
    runtime, network, outputs = recorded(2)
    stored = runtime.stats.bytes_stored
    with pytest.raises(ArithmeticError), runtime.record("base"):
        run(network, other(inputs(1)))
        network.fails = True
        run(network, other(inputs(1)))
    assert runtime.stats.bytes_stored == stored
    with runtime.edit("base", mask=torch.zeros(4, 6)):
        results = run(network, other(inputs(2)))
    assert torch.equal(results[1], outputs[1])


def test_recording_again_replaces_the_base() -> None:
    runtime, network, _ = recorded(2)
    stored = runtime.stats.bytes_stored
    with runtime.record("base"):
        outputs = run(network, other(inputs(2)))
    assert runtime.stats.bytes_stored == stored
    with runtime.edit("base", mask=torch.zeros(4, 6)):
        assert torch.equal(run(network, inputs(2))[0], outputs[0])


def test_a_swallowed_failure_still_fails_the_recording() -> None:
    runtime = Runtime()
    network = FakeNetwork(runtime)
    with pytest.raises(CallMismatchError, match="call 1 of network failed"), runtime.record("base"):
        run(network, inputs(1))
        network.fails = True
        with pytest.raises(ArithmeticError):
            run(network, inputs(1))
    with pytest.raises(CallMismatchError, match="must have failed"), runtime.record("base"):
        network.fails = True
        with pytest.raises(ArithmeticError):
            run(network, inputs(1))
        run(network, inputs(1))
    assert runtime.bases == () and runtime.stats.bytes_stored == 0


def test_a_swallowed_failure_still_fails_the_edit() -> None:
    runtime, network, _ = recorded(2)
    with pytest.raises(CallMismatchError, match="an earlier call of the edit of base 'base' failed"):
        with runtime.edit("base", mask=left_half()):
            network.fails = True
            with pytest.raises(ArithmeticError):
                run(network, inputs(1))
            run(network, inputs(2))
    with runtime.edit("base", mask=left_half()):
        run(network, inputs(2))


def test_a_run_kept_after_its_context_answers_and_holds_nothing() -> None:
    runtime, network, _ = recorded(1)
    with runtime.record("again") as record:
        run(network, inputs(1))
    with runtime.edit("base", mask=left_half(), save_as="v2") as edit:
        run(network, inputs(1))
    assert network.last is not None
    tensor, network.last = weakref.ref(network.last["h"]), None
    assert (record.name, record.calls) == ("again", 1)
    assert (edit.base, edit.calls, edit.density) == ("base", 1, 0.5) and edit.mask is not None
    with pytest.raises(FisEditError, match="has ended"):
        edit.set_mask(left_half())
    with pytest.raises(FisEditError, match="has ended"):
        edit.align([0])
    assert (record.attention_calls, edit.stabilised_calls) == (0, 0)
    assert tensor() is not None
    del runtime, network.runtime  # freed at once: no reference cycle keeps gigabytes until a collection
    assert tensor() is None


def test_misuse_of_a_phase_is_a_defect() -> None:
    runtime, network, _ = recorded(1)
    with pytest.raises(GraphError, match="without begin"), runtime.record("new"):
        record_phase(runtime).commit(network.key, {}, [])
    with pytest.raises(GraphError, match="before the mask is known"), runtime.edit("base"):
        edit_phase(runtime).plan(network.spec)
    with pytest.raises(GraphError, match="without save_as"), runtime.edit("base"):
        edit_phase(runtime).commit(network.key, {}, [])


def test_stats_are_readable_and_resettable() -> None:
    runtime, network, _ = recorded(2)
    with runtime.edit("base", mask=left_half()):
        run(network, inputs(2))
    stats = runtime.stats
    output_bytes = network.sites[2].bytes
    assert stats.as_dict()["bytes_loaded"] == 2 * output_bytes
    assert stats.bytes_stored == 2 * runtime.bytes_needed(network.sites)
    assert stats.density == {"4x6": 0.5}
    assert all(seconds >= 0 for seconds in stats.seconds.values())
    assert "record 2, edit 2, dense 0" in repr(stats) and "4x6 50.0 %" in repr(stats)
    runtime.reset_stats()
    assert runtime.stats.calls == {"record": 0, "edit": 0, "dense": 0}
    assert runtime.stats.bytes_stored == stats.bytes_stored
    assert stats.calls["record"] == 2
    assert "'base' (2 calls)" in repr(runtime)


def test_keys_compare_without_their_label() -> None:
    assert ProgramKey("a", (1,), "x") == ProgramKey("a", (1,), "y")
    assert len({ProgramKey("a", (1,), "x"), ProgramKey("a", (1,), "y"), ProgramKey("a", (2,), "x")}) == 2
    assert str(ProgramKey("abcdef" * 5, ())) == "graph abcdefabcdef"


def test_default_runtime_is_one() -> None:
    assert default_runtime() is default_runtime()
