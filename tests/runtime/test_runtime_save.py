"""Edits that become bases: what is copied, what is shared, what is counted, what a failure leaves."""

from __future__ import annotations

import pytest
import torch

from fisedit_compile.errors import BudgetError, CallMismatchError, GraphError, OptionError
from fisedit_compile.runtime import Runtime
from fisedit_compile.runtime.base import Base, RecordedCall, storage_of
from support.fake_network import FakeNetwork, edit_phase, inputs, left_half, run

Calls = list[tuple[torch.Tensor, torch.Tensor]]


def recorded(runtime: Runtime | None = None, count: int = 2) -> tuple[Runtime, FakeNetwork]:
    runtime = runtime or Runtime()
    network = FakeNetwork(runtime)
    with runtime.record("base"):
        run(network, inputs(count))
    return runtime, network


def changed(count: int = 2, amount: float = 1.0) -> Calls:
    return [(x + amount, time) for x, time in inputs(count)]


def calls_of(runtime: Runtime, network: FakeNetwork, name: str) -> list[RecordedCall]:
    """The recorded calls, seen the way a compiled network sees them."""
    seen = []
    with runtime.edit(name, mask=torch.zeros(4, 6)):
        for x, time in inputs(2):
            network(x, time)
            assert network.last is not None
            seen.append(network.last)
    return seen


def test_saved_base_holds_the_mixed_maps() -> None:
    runtime, network = recorded()
    before = [{name: call[name].clone() for name in call} for call in calls_of(runtime, network, "base")]
    with runtime.edit("base", mask=left_half(), save_as="v2"):
        outputs = run(network, changed())
    assert runtime.bases == ("base", "v2")
    for ordinal, call in enumerate(calls_of(runtime, network, "v2")):
        h, output = network.dense(*changed()[ordinal])
        for name, dense in (("h", h), ("output:0", output)):
            assert torch.equal(call[name][..., :3], dense[..., :3])
            assert torch.equal(call[name][..., 3:], before[ordinal][name][..., 3:])
        assert torch.equal(call["output:0"], outputs[ordinal])
        assert torch.equal(call["mean"], before[ordinal]["mean"] + 1)
    for ordinal, call in enumerate(calls_of(runtime, network, "base")):
        assert all(torch.equal(call[name], before[ordinal][name]) for name in call)


def test_saved_base_keeps_the_memory_layout() -> None:
    runtime, network = recorded()
    with runtime.edit("base", mask=left_half(), save_as="v2"):
        run(network, changed())
    for base, saved in zip(calls_of(runtime, network, "base"), calls_of(runtime, network, "v2"), strict=True):
        assert base["h"].stride() == saved["h"].stride() and base["output:0"].stride() == saved["output:0"].stride()


def test_padding_rows_are_not_written() -> None:
    runtime, network = recorded()
    mask = torch.zeros(2, 4, 6)
    mask[0, 0, 0] = 1
    mask[1, :, :4] = 1
    with runtime.edit("base", mask=mask, save_as="v2"):
        run(network, changed())
    base, saved = calls_of(runtime, network, "base")[0], calls_of(runtime, network, "v2")[0]
    different = (base["h"] != saved["h"]).any(1)
    assert torch.equal(different, mask > 0)


def test_an_empty_mask_shares_everything() -> None:
    runtime, network = recorded()
    stored = runtime.stats.bytes_stored
    with runtime.edit("base", mask=torch.zeros(4, 6), save_as="v2"):
        run(network, changed())
    assert runtime.stats.bytes_stored == stored
    for base, saved in zip(calls_of(runtime, network, "base"), calls_of(runtime, network, "v2"), strict=True):
        assert all(base[name] is saved[name] for name in base)
    runtime.drop("base")
    assert runtime.stats.bytes_stored == stored
    runtime.drop("v2")
    assert runtime.stats.bytes_stored == 0


def test_unchanged_sites_are_shared_and_count_once() -> None:
    runtime, network = recorded(count=1)
    stored = runtime.stats.bytes_stored
    h, mean, _ = network.sites
    with runtime.edit("base", mask=left_half(), save_as="v2"):
        phase = edit_phase(runtime)
        call = phase.begin(network.key, [network.weight], [torch.tensor(0.0)])
        with phase.running(call):
            plan = phase.plan(network.spec)
            assert plan is not None
            updates = [torch.ones(2, 12, 3), None, None]
            sites = phase.updated_sites(call, network.sites, updates, plan)
            assert sites["mean"] is call["mean"] and sites["output:0"] is call["output:0"]
            assert storage_of(sites["h"]) != storage_of(call["h"])
            phase.commit(network.key, sites, network.sites)
    assert runtime.stats.bytes_stored == stored + h.bytes


def test_a_dense_call_inside_a_saved_edit_is_stored_as_recorded() -> None:
    runtime, network = recorded()
    with runtime.edit("base", save_as="v2") as edit:
        first = network(*changed()[0])
        edit.set_mask(left_half())
        network(*changed()[1])
    saved = calls_of(runtime, network, "v2")
    assert torch.equal(saved[0]["output:0"], first)
    assert torch.equal(saved[0]["h"], network.dense(*changed()[0])[0])
    assert runtime.stats.calls["dense"] == 1


def test_chains_of_edits_and_replacing_the_edited_base() -> None:
    runtime, network = recorded()
    with runtime.edit("base", mask=left_half(), save_as="base"):
        run(network, changed())
    with runtime.edit("base", mask=~left_half(), save_as="base"):
        outputs = run(network, changed())
    assert runtime.bases == ("base",)
    assert runtime.stats.bytes_stored == 2 * runtime.bytes_needed(network.sites)
    for (x, time), output in zip(changed(), outputs, strict=True):
        assert torch.equal(output, network.dense(x, time)[1])


def test_a_failed_save_leaves_no_base_and_the_old_ones_whole() -> None:
    runtime, network = recorded()
    with runtime.edit("base", mask=left_half(), save_as="v2"):
        run(network, changed())
    stored = runtime.stats.bytes_stored
    output = calls_of(runtime, network, "v2")[1]["output:0"].clone()
    for save_as in ("v2", "v3"):
        with pytest.raises(ArithmeticError), runtime.edit("base", mask=left_half(), save_as=save_as):
            run(network, changed(1, 2.0))
            network.fails = True
            run(network, changed(2, 2.0)[1:])
        with pytest.raises(CallMismatchError), runtime.edit("base", mask=left_half(), save_as=save_as):
            run(network, changed(1, 2.0))
    assert runtime.bases == ("base", "v2") and runtime.stats.bytes_stored == stored
    assert torch.equal(calls_of(runtime, network, "v2")[1]["output:0"], output)


def test_every_call_must_be_committed() -> None:
    runtime, network = recorded(count=1)
    with pytest.raises(GraphError, match="not all of them were committed"), runtime.edit("base", save_as="v2"):
        edit_phase(runtime).begin(network.key, [network.weight], [torch.tensor(0.0)])


def test_inference_mode_leaves_ordinary_tensors() -> None:
    runtime, network = recorded()
    with torch.inference_mode(), runtime.edit("base", mask=left_half(), save_as="v2"):
        run(network, [(x.clone(), time.clone()) for x, time in changed()])
    for call in calls_of(runtime, network, "v2"):
        assert not any(tensor.is_inference() for tensor in call.stored())


@pytest.mark.parametrize("dense", [False, True])
def test_budget_of_a_saved_edit(dense: bool) -> None:
    needed = Runtime().bytes_needed(FakeNetwork(Runtime()).sites)
    runtime, network = recorded(Runtime(budget=3 * needed))
    mask = None if dense else left_half()
    with pytest.raises(BudgetError, match="saving .* for base 'v2'"), runtime.edit("base", mask=mask, save_as="v2"):
        run(network, changed())
    assert runtime.bases == ("base",) and runtime.stats.bytes_stored == 2 * needed
    with runtime.edit("base", mask=torch.zeros(4, 6), save_as="v2"):
        run(network, changed())
    assert runtime.bases == ("base", "v2")


def test_bases_that_share_tensors_share_the_lock() -> None:
    parent = Base("base")
    assert Base("v2", parent=parent).lock is parent.lock is not Base("other").lock


def test_name_of_a_saved_base_is_checked() -> None:
    runtime, _ = recorded()
    with pytest.raises(OptionError), runtime.edit("base", save_as=""):
        pytest.fail("the context must not be entered")


def test_the_edited_base_may_be_dropped_meanwhile() -> None:
    runtime, network = recorded()
    with runtime.edit("base", mask=left_half(), save_as="v2"):
        network(*changed()[0])
        runtime.drop("base")
        assert runtime.stats.bytes_stored == runtime.bytes_needed(network.sites)
        network(*changed()[1])
    assert runtime.bases == ("v2",)
    assert runtime.stats.bytes_stored == 2 * runtime.bytes_needed(network.sites)
