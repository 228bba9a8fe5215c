"""Recordings on the host: equal to those on the device, complete when a context ends, on their way one call ahead."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fisedit_compile.errors import OptionError
from fisedit_compile.runtime import Runtime, tiers
from fisedit_compile.runtime.tiers import Loading, offload
from support.fake_network import FakeNetwork, inputs, left_half, run
from support.lanes import LateLane
from support.tolerances import assert_identical

CALLS = 4


@pytest.fixture
def lane(monkeypatch: pytest.MonkeyPatch) -> Iterator[LateLane]:
    """All tensors are taken for those of a device, with this lane to the host."""
    late = LateLane()
    monkeypatch.setattr(tiers, "lane_for", lambda device: late)
    yield late


def recorded(tier: str = "host") -> FakeNetwork:
    network = FakeNetwork(Runtime(tier=tier))
    with network.runtime.record("base"):
        run(network, inputs(CALLS))
    return network


def edited(network: FakeNetwork, mask: Tensor | None, base: str = "base", save_as: str | None = None) -> list[Tensor]:
    with network.runtime.edit(base, mask=mask, save_as=save_as):
        return run(network, [(x + 1.0, time) for x, time in inputs(CALLS)])


def stored(network: FakeNetwork, name: str) -> list[Tensor]:
    return list(network.runtime._store.bases[name].tensors())


@pytest.mark.parametrize("mask", [left_half(), left_half(2), torch.zeros(4, 6), torch.ones(4, 6), None])
def test_edits_are_those_of_recordings_on_the_device(lane: LateLane, mask: Tensor | None) -> None:
    outputs = [edited(recorded(tier), mask) for tier in ("device", "host")]
    for here, there in zip(*outputs, strict=True):
        assert_identical(there, here)
    assert "out" in lane.log


def test_a_recording_is_complete_when_its_context_ends(lane: LateLane) -> None:
    network, here = recorded(), recorded("device")
    for there, expected in zip(stored(network, "base"), stored(here, "base"), strict=True):
        assert lane.holds(there)
        assert there.stride() == expected.stride()
        assert_identical(there, expected)
    assert network.runtime.stats.bytes_stored >= here.runtime.stats.bytes_stored


def test_the_next_call_is_on_its_way_and_not_waited_for(lane: LateLane) -> None:
    network = recorded()
    lane.log.clear()
    edited(network, left_half())
    assert lane.log == ["in 0", "in 1", "wait 0", "in 2", "wait 1", "in 3", "wait 2", "wait 3"]


def test_dense_calls_bring_nothing(lane: LateLane) -> None:
    network = recorded()
    lane.log.clear()
    with network.runtime.edit("base") as edit:
        calls = inputs(CALLS)
        run(network, calls[:2])
        assert lane.log == []
        edit.set_mask(left_half())
        run(network, calls[2:])
    assert lane.log == ["in 0", "in 1", "wait 0", "wait 1"]


def test_an_empty_mask_brings_what_it_returns_and_nothing_ahead(lane: LateLane) -> None:
    network = recorded()
    lane.log.clear()
    edited(network, torch.zeros(4, 6))
    assert lane.log == ["in 0", "wait 0", "in 1", "wait 1", "in 2", "wait 2", "in 3", "wait 3"]


@pytest.mark.parametrize("mask", [left_half(), torch.zeros(4, 6), None])
def test_saved_edits_lie_on_the_host_too(lane: LateLane, mask: Tensor | None) -> None:
    network, here = recorded(), recorded("device")
    for each in (network, here):
        edited(each, mask, save_as="second")
    for there, expected in zip(stored(network, "second"), stored(here, "second"), strict=True):
        assert lane.holds(there)
        assert_identical(there, expected)
    again = [edited(each, left_half(), base="second") for each in (network, here)]
    for there, expected in zip(*again, strict=True):
        assert_identical(there, expected)


def test_a_saved_edit_without_changes_shares_everything(lane: LateLane) -> None:
    network = recorded()
    before = network.runtime.stats.bytes_stored
    with network.runtime.edit("base", mask=torch.zeros(4, 6), save_as="same"):
        for _, time in inputs(CALLS):
            phase = network.runtime.phase()
            call = phase.begin(network.key, [network.weight], [time])
            with phase.running(call):
                assert phase.plan(network.spec) is None
                phase.commit(network.key, dict(zip(call, call.stored(), strict=True)), network.sites)
    assert network.runtime.stats.bytes_stored == before
    network.runtime.drop("base")
    assert network.runtime.stats.bytes_stored == before
    first = edited(network, left_half(), base="same")
    for there, expected in zip(first, edited(recorded("device"), left_half()), strict=True):
        assert_identical(there, expected)


def test_dropping_gives_all_bytes_back(lane: LateLane) -> None:
    network = recorded()
    edited(network, left_half(), save_as="second")
    for name in network.runtime.bases:
        network.runtime.drop(name)
    assert network.runtime.stats.bytes_stored == 0


def test_tensors_keep_shapes_strides_and_types(lane: LateLane) -> None:
    shared = torch.randn(3, 5)
    tensors = {
        "map": torch.randn(2, 4, 6, 3).permute(0, 3, 1, 2),
        "half": torch.randn(7).half(),
        "number": torch.tensor(3),
        "none": torch.empty(0, 4),
        "flag": torch.tensor([True, False, True]),
        "one": shared,
        "same": shared,
    }
    parked = offload(tensors, lane)
    lane.finish()
    assert parked["one"] is parked["same"]
    loading = Loading(parked, lane)
    for name, tensor in tensors.items():
        for found in (parked[name], loading[name]):
            assert found.stride() == tensor.stride() and found.dtype == tensor.dtype
            assert_identical(found, tensor, name)
        assert loading[name].data_ptr() != parked[name].data_ptr() or tensor.numel() == 0


def test_what_lies_elsewhere_than_on_the_device_stays_there(lane: LateLane, monkeypatch: pytest.MonkeyPatch) -> None:
    number, map = torch.tensor(3.0), torch.randn(4)
    monkeypatch.setattr(lane, "takes", lambda tensor: tensor is map)
    parked = offload({"number": number, "map": map}, lane)
    lane.finish()
    assert parked["number"] is number
    loading = Loading(parked, lane)
    assert loading["number"] is number
    assert_identical(loading["map"], map)


def test_a_look_ahead_without_memory_leaves_the_call_where_it_was(
    lane: LateLane, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, calls = recorded(), inputs(CALLS)
    expected = edited(recorded("device"), left_half())
    copy_in, asked = lane.copy_in, []

    def sometimes(sources: list[Tensor]) -> object:
        asked.append(len(sources))
        if len(asked) == 2:
            raise torch.OutOfMemoryError("no room")
        return copy_in(sources)

    monkeypatch.setattr(lane, "copy_in", sometimes)
    with network.runtime.edit("base", mask=left_half()):
        with pytest.raises(torch.OutOfMemoryError):
            network(calls[0][0] + 1.0, calls[0][1])
        for (x, time), wanted in zip(calls, expected, strict=True):
            assert_identical(network(x + 1.0, time), wanted)


def test_blocks_are_small_and_few(lane: LateLane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "BLOCK", 1000)
    parked = offload({str(number): torch.full((50,), float(number)) for number in range(10)}, lane)
    parked |= offload({"large": torch.arange(400.0)}, lane)
    lane.finish()
    sizes = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in parked.values()}
    # Four tensors of 256 bytes each, padding included, to a block; what is larger than a block has one of its own.
    assert sorted(sizes.values()) == [2 * 256, 4 * 256, 4 * 256, 1600]
    for number in range(10):
        assert_identical(parked[str(number)], torch.full((50,), float(number)))


def test_on_a_processor_the_host_is_the_device() -> None:
    network = recorded("host")
    for there, here in zip(edited(network, left_half()), edited(recorded("device"), left_half()), strict=True):
        assert_identical(there, here)
    assert network.runtime.tier == "host"
    assert network.runtime.expendable().tier == "host"


def test_other_tiers_are_refused() -> None:
    with pytest.raises(OptionError, match="tier must be one of 'device', 'host', got 'disk'"):
        Runtime(tier="disk")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_copies_of_a_gpu_are_ordered() -> None:
    """The device is kept busy, and what is freed is overwritten, so a copy that came too early or late would show."""
    device = torch.device("cuda", torch.cuda.current_device())
    lane = tiers.CudaLane(device)
    busy = torch.randn(4096, 4096, device=device)
    for number in range(20):
        tensor = torch.full((1 << 22,), -1.0, device=device)
        for _ in range(4):
            busy = (busy @ busy).clamp(-1, 1)
        tensor.fill_(float(number))
        parked = offload({"tensor": tensor}, lane)
        del tensor
        torch.full((1 << 22,), float("nan"), device=device)
        loading = Loading(parked, lane)
        assert bool((loading["tensor"] == number).all())
        lane.finish()
        assert bool((parked["tensor"] == number).all())
