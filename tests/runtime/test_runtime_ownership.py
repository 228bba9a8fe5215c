"""What a base owns: copies where memory is somebody else's, the memory layout, the storage type, the byte count."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from fisedit_compile.errors import BudgetError, CallMismatchError, GraphError, OptionError
from fisedit_compile.options import parse_bytes
from fisedit_compile.runtime import Domain, ProgramKey, RecordedCall, Runtime, Site
from fisedit_compile.runtime.base import Ledger, own_tensor, storage_of, stored_dtype, write_rows
from support.fake_network import DOMAIN, MAP_ORDER, FakeNetwork, inputs, left_half, record_phase, run

SPATIAL = Site("site", "spatial", DOMAIN, MAP_ORDER, 2, (2, 3, 4, 6), torch.float32)
VALUE = Site("value", "value", None, (), 0, (2, 3, 4, 6), torch.float32)
STATISTIC = Site("x:norm_partials:32", "spatial", DOMAIN, MAP_ORDER, 2, (2, 3, 4, 6), torch.float32, lossless=True)
OUTPUT = Site("output:0", "spatial", DOMAIN, MAP_ORDER, 2, (2, 3, 4, 6), torch.float32, lossless=True)
NOBODY: frozenset[int] = frozenset()


def random_map() -> torch.Tensor:
    return torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("site", [SPATIAL, VALUE, OUTPUT], ids=lambda site: site.name)
def test_protected_memory_is_copied(site: Site) -> None:
    tensor = random_map().contiguous(memory_format=torch.channels_last)
    kept = own_tensor(tensor, site, None, NOBODY)
    assert storage_of(kept) == storage_of(tensor)
    copy = own_tensor(tensor, site, None, frozenset([storage_of(tensor)]))
    assert storage_of(copy) != storage_of(tensor)
    assert torch.equal(copy, tensor) and copy.stride() == tensor.stride()


@pytest.mark.parametrize("site", [SPATIAL, VALUE, OUTPUT], ids=lambda site: site.name)
def test_a_part_does_not_hold_the_whole(site: Site) -> None:
    whole = torch.randn(4, 3, 4, 6)
    owned = own_tensor(whole[1:3], site, None, NOBODY)
    assert owned.untyped_storage().nbytes() == owned.nbytes
    assert torch.equal(owned, whole[1:3])


@pytest.mark.parametrize("site", [SPATIAL, VALUE, OUTPUT], ids=lambda site: site.name)
def test_expanded_elements_get_memory_of_their_own(site: Site) -> None:
    expanded = torch.randn(1, 3, 1, 6).expand(2, 3, 4, 6)
    owned = own_tensor(expanded, site, None, NOBODY)
    assert torch.equal(owned, expanded)
    owned[0, 0, 0, 0] += 1
    assert (owned != expanded).sum() == 1


def test_spatial_sites_lie_as_rows_and_others_as_they_came() -> None:
    tensor = random_map()
    stored = own_tensor(tensor, SPATIAL, None, NOBODY)
    assert torch.equal(stored, tensor) and stored.shape == tensor.shape
    assert stored.permute(MAP_ORDER).is_contiguous()
    assert own_tensor(tensor, OUTPUT, None, NOBODY).stride() == tensor.stride()
    assert own_tensor(tensor, VALUE, None, NOBODY).stride() == tensor.stride()


def test_inference_tensors_become_ordinary_and_history_is_cut() -> None:
    with torch.inference_mode():
        tensors = [own_tensor(random_map(), site, None, NOBODY) for site in (SPATIAL, VALUE, OUTPUT)]
    assert not any(tensor.is_inference() for tensor in tensors)
    for tensor in tensors:
        tensor.add_(0)
    leaf = random_map().requires_grad_()
    assert not own_tensor(leaf * 2, VALUE, None, NOBODY).requires_grad


@pytest.mark.parametrize(
    ("site", "dtype", "storage", "stored"),
    [
        (SPATIAL, torch.float32, torch.float16, torch.float16),
        (SPATIAL, torch.float32, torch.bfloat16, torch.bfloat16),
        (SPATIAL, torch.float32, None, torch.float32),
        (SPATIAL, torch.bfloat16, torch.float16, torch.bfloat16),
        (SPATIAL, torch.float16, torch.float32, torch.float16),
        (SPATIAL, torch.int64, torch.float16, torch.int64),
        (VALUE, torch.float32, torch.float16, torch.float32),
        (OUTPUT, torch.float32, torch.float16, torch.float32),
        (STATISTIC, torch.float32, torch.float16, torch.float32),
    ],
)
def test_storage_narrows_spatial_sites_only(
    site: Site, dtype: torch.dtype, storage: torch.dtype | None, stored: torch.dtype
) -> None:
    assert stored_dtype(site, dtype, storage) == stored
    assert own_tensor((random_map() * 8).to(dtype), site, storage, NOBODY).dtype == stored


def test_storage_type_is_used_and_counted() -> None:
    runtime = Runtime(storage=torch.float16)
    network = FakeNetwork(runtime)
    with runtime.record("base"):
        outputs = run(network, inputs(1))
    h, mean, output = network.sites
    assert runtime.bytes_needed(network.sites) == h.bytes // 2 + mean.bytes + output.bytes
    assert runtime.stats.bytes_stored == runtime.bytes_needed(network.sites)
    with runtime.edit("base", mask=torch.zeros(4, 6)):
        assert torch.equal(run(network, inputs(1))[0], outputs[0])
        assert network.last is not None and network.last["h"].dtype == torch.float16


@pytest.mark.parametrize("storage", [torch.int8, torch.float64, "float16"])
def test_other_storage_types_are_refused(storage: object) -> None:
    with pytest.raises(OptionError, match="storage must be None or one of"):
        Runtime(storage=storage)  # type: ignore[arg-type]


def test_the_caller_may_overwrite_inputs_and_outputs() -> None:
    runtime = Runtime()
    network = FakeNetwork(runtime)
    x, time = inputs(1)[0]
    with runtime.record("base"):
        output = network(x, time)
        expected = output.clone()
        output.zero_()
    with runtime.edit("base", mask=torch.zeros(4, 6)):
        result = network(x, time)
        assert torch.equal(result, expected)
        result.zero_()
    with runtime.edit("base", mask=torch.zeros(4, 6)):
        assert torch.equal(network(x, time), expected)


def test_sites_that_are_one_tensor_stay_one_and_count_once() -> None:
    runtime = Runtime()
    key, parameter = ProgramKey("graph", ()), torch.nn.Parameter(torch.ones(1))
    sites = [Site(name, "spatial", Domain(2, 4), (0, 1, 2), 1, (1, 8, 16), torch.float32) for name in ("key", "value")]
    whole = torch.randn(1, 8, 32)
    tensors = {"key": whole[..., :16], "value": whole[..., :16]}
    with runtime.record("base"):
        phase = record_phase(runtime)
        phase.begin(key, [parameter], [], 0)
        phase.commit(key, tensors, sites)
    assert runtime.stats.bytes_stored == 1 * 8 * 16 * 4


def test_wrong_sites_are_a_defect() -> None:
    runtime = Runtime()
    network = FakeNetwork(runtime)
    h, mean, output = network.sites
    for tensors in (
        {"h": torch.zeros(h.shape)},
        {"h": torch.zeros(1), "mean": torch.zeros(2), "output:0": torch.ones(1)},
    ):
        with pytest.raises(GraphError), runtime.record("base"):
            phase = record_phase(runtime)
            phase.begin(network.key, [network.weight], [], 0)
            phase.commit(network.key, tensors, network.sites)
    assert runtime.stats.bytes_stored == 0 and runtime.bases == ()


def test_dropping_frees_the_memory() -> None:
    runtime = Runtime()
    network = FakeNetwork(runtime)
    with runtime.record("base"):
        run(network, inputs(2))
    with runtime.edit("base", mask=left_half()):
        run(network, inputs(2))
    assert network.last is not None
    tensor = weakref.ref(network.last["h"])
    network.last = None
    gc.collect()
    assert tensor() is not None
    runtime.drop("base")
    gc.collect()
    assert tensor() is None and runtime.stats.bytes_stored == 0 and runtime.bases == ()


def test_recorded_call_counts_what_is_taken() -> None:
    call = RecordedCall({"a": torch.zeros(4), "b": torch.zeros(8)}, ())
    reader = call.reader()
    assert reader["a"] is call.reader()["a"] and len(reader) == 2 and list(reader) == ["a", "b"]
    assert reader.bytes_loaded == 16 and call.bytes_loaded == 0 and call.bytes == 48


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("space_rank", [1, 2])
@pytest.mark.parametrize("batch_of_index", [1, 2])
def test_write_rows(dtype: torch.dtype, space_rank: int, batch_of_index: int) -> None:
    stored = random_map().to(dtype)
    site = SPATIAL
    if space_rank == 1:
        site = Site("site", "spatial", DOMAIN, (0, 2, 1), 1, (2, 3, 24), torch.float32)
        stored = stored.flatten(2)
    index = torch.tensor([[0, 7, 23], [5, 9, 1]])[:batch_of_index]
    valid = torch.tensor([[True, True, False], [True, True, True]])[:batch_of_index]
    rows = torch.randn(2, 3, 3)
    rows[0, 2] = float("nan")
    if batch_of_index == 1:
        rows[1, 2] = float("nan")
    expected = stored.flatten(2).clone()
    for sample in range(2):
        for number in range(3):
            if valid[sample % batch_of_index, number]:
                expected[sample, :, index[sample % batch_of_index, number]] = rows[sample, number].to(dtype)
    before = stored.clone()
    result = write_rows(stored, site, rows, index, valid)
    assert torch.equal(result.flatten(2), expected) and result.dtype == dtype
    assert torch.equal(stored, before)
    assert torch.equal(write_rows(stored, site, rows[:, :0], index[:, :0], None), before)


@pytest.mark.parametrize(
    ("text", "count"),
    [(None, None), (5, 5), ("5", 5), ("8GB", 8 * 10**9), ("1.5 MiB", 1572864), ("2g", 2 * 10**9), ("3 KiB", 3072)],
)
def test_budgets(text: int | str | None, count: int | None) -> None:
    assert parse_bytes("budget", text) == count


@pytest.mark.parametrize("budget", [0, -1, "0", "much", "5 XB", "-3GB", "5iB", True, 1.5])
def test_wrong_budgets(budget: object) -> None:
    with pytest.raises(OptionError, match="budget must be"):
        parse_bytes("budget", budget)  # type: ignore[arg-type]


def test_bytes_set_aside_count_until_given_back() -> None:
    ledger = Ledger(100)
    ledger.reserve(60, "one", ())
    with pytest.raises(BudgetError, match="existing bases: none"):
        ledger.reserve(60, "two", ())
    ledger.unreserve(60)
    ledger.reserve(100, "three", ())


def test_budget_is_checked_before_computing_and_the_unfinished_base_is_dropped() -> None:
    runtime = Runtime()
    needed = runtime.bytes_needed(FakeNetwork(runtime).sites)
    runtime = Runtime(budget=3 * needed)
    network = FakeNetwork(runtime)
    with runtime.record("old"):
        run(network, inputs(1))
    with pytest.raises(
        BudgetError, match=rf"call 2 of network.*'new' needs .*\({needed} bytes\).*existing bases: 'old'"
    ):
        with runtime.record("new"):
            run(network, inputs(2))
            network.fails = True  # would raise ArithmeticError if it computed
            run(network, inputs(1))
    assert network.fails
    assert runtime.bases == ("old",) and runtime.stats.bytes_stored == needed
    network.fails = False
    with runtime.record("new"):
        run(network, inputs(2))
    assert runtime.stats.bytes_stored == 3 * needed == runtime.budget


def test_a_swallowed_budget_error_still_fails_the_recording() -> None:
    runtime = Runtime(budget=1)
    network = FakeNetwork(runtime)
    with pytest.raises(CallMismatchError, match="budget"), runtime.record("new"):
        with pytest.raises(BudgetError):
            run(network, inputs(1))
    assert runtime.bases == () and runtime.stats.bytes_stored == 0


def test_more_bytes_than_announced_are_noticed() -> None:
    runtime = Runtime(budget=100)
    network = FakeNetwork(runtime)
    stores = dict(zip(("h", "mean", "output:0"), (torch.zeros(site.shape) for site in network.sites), strict=True))
    with pytest.raises(BudgetError), runtime.record("base"):
        phase = record_phase(runtime)
        phase.begin(network.key, [network.weight], [], 10)
        phase.commit(network.key, stores, network.sites)
    assert runtime.stats.bytes_stored == 0
