"""Networks that fill at their first call what they keep, and are recorded there: another graph edits them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisedit_compile as fisedit
from fisedit_compile.errors import BudgetError, CallMismatchError, FisEditError, WeightsChangedError
from fisedit_compile.private.dynamo import INTEGERS_CHOOSE_GRAPHS
from support.harness import compiled
from support.tolerances import assert_identical, assert_near

SIZE = (13, 9)
MASK = torch.zeros(SIZE, dtype=torch.bool)
MASK[3:8, 2:7] = True

needs_aligned_integers = pytest.mark.skipif(
    not INTEGERS_CHOOSE_GRAPHS, reason="this PyTorch chooses graphs for integers by what ran last: they are refused"
)


class Network(nn.Module):
    """A convolution of the picture, by a table that the first call makes, and by the time."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv = nn.Conv2d(4, 3, 3, padding=1).requires_grad_(False)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        result: Tensor = self.conv(x) * self.table(x) * time.cos()
        return result

    def table(self, x: Tensor) -> Tensor:
        """``[1, 3, 1, 1]``."""
        raise NotImplementedError

    def forget(self) -> None:
        """Be as before the first call."""
        raise NotImplementedError


class Attribute(Network):
    def __init__(self) -> None:
        super().__init__()
        self.kept: Tensor | None = None

    def table(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = torch.arange(1.0, 4.0, device=x.device).reshape(1, 3, 1, 1)
        return self.kept

    def forget(self) -> None:
        self.kept = None


class BySize(Network):
    """As the tables of positions of many transformers: one for each size."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[tuple[int, int], Tensor] = {}

    def table(self, x: Tensor) -> Tensor:
        size = (x.shape[2], x.shape[3])
        if size not in self.tables:
            self.tables[size] = torch.linspace(size[0], size[1], 3, device=x.device).view(1, 3, 1, 1)
        return self.tables[size]

    def forget(self) -> None:
        self.tables.clear()


class OfTheInput(Network):
    """The table is made of what the first call is given: a graph that returns a part of the map besides."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: Tensor | None = None

    def table(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = x[:1, :3].amax((2, 3), keepdim=True)
        return self.kept

    def forget(self) -> None:
        self.kept = None


class Flag(Network):
    """Nothing but a flag tells the first call from the others."""

    def __init__(self) -> None:
        super().__init__()
        self.warm = False

    def table(self, x: Tensor) -> Tensor:
        ones = x.new_ones(1, 3, 1, 1)
        if self.warm:
            return ones * 2
        self.warm = True
        return ones + 1

    def forget(self) -> None:
        self.warm = False


NETWORKS: list[Callable[[], Network]] = [Attribute, BySize, OfTheInput, Flag]


def pictures(seed: int, calls: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(2, 4, *SIZE, generator=generator), torch.tensor(0.1 * call)) for call in range(calls)]


def run(network: nn.Module, calls: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [network(x, time) for x, time in calls]


def check(module: Network, edited: list[Tensor], recorded: list[Tensor], seeds: tuple[int, int], mask: Tensor) -> None:
    """An edit of the calls of the first seed by those of the second is right."""
    pairs = zip(pictures(seeds[0], len(edited)), pictures(seeds[1], len(edited)), strict=True)
    for now, before, ((old, time), (new, _)) in zip(edited, recorded, pairs, strict=True):
        assert_identical(now[..., ~mask], before[..., ~mask], "outside the mask")
        assert_near(now[..., mask], module(torch.where(mask, new, old), time)[..., mask], "inside the mask")
        assert not torch.equal(now, before)


@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("make", NETWORKS)
@torch.no_grad()
def test_a_recording_of_the_first_call_is_edited(make: Callable[[], Network], calls: int) -> None:
    module, runtime = make(), fisedit.Runtime()
    network = compiled(module, runtime)
    with runtime.record("base"):
        recorded = run(network, pictures(1, calls))
    for mask in (MASK, ~MASK):
        with runtime.edit("base", mask=mask):
            check(module, run(network, pictures(2, calls)), recorded, (1, 2), mask)
    with runtime.edit("base", mask=torch.zeros(SIZE)):
        for now, before in zip(run(network, pictures(2, calls)), recorded, strict=True):
            assert_identical(now, before, "empty mask")
    with runtime.edit("base", mask=MASK):
        for now, before in zip(run(network, pictures(1, calls)), recorded, strict=True):
            assert_near(now, before, "unchanged inputs")
    with runtime.edit("base", mask=torch.ones(SIZE)):
        for now, (x, time) in zip(run(network, pictures(2, calls)), pictures(2, calls), strict=True):
            assert_near(now, module(x, time), "full mask")
    assert runtime.stats.calls == {"record": calls, "edit": 4 * calls, "dense": calls}


@torch.no_grad()
def test_an_edit_of_it_is_edited_in_turn() -> None:
    module, runtime = Attribute(), fisedit.Runtime()
    network = compiled(module, runtime)
    with runtime.record("base"):
        recorded = run(network, pictures(1, 3))
    with runtime.edit("base", mask=MASK, save_as="second"):
        first = run(network, pictures(2, 3))
    check(module, first, recorded, (1, 2), MASK)
    other = torch.zeros(SIZE, dtype=torch.bool)
    other[9:12, 1:6] = True
    with runtime.edit("second", mask=other):
        second = run(network, pictures(3, 3))
    for now, before, (x, time), (y, _), (z, _) in zip(second, first, *(pictures(s, 3) for s in (1, 2, 3)), strict=True):
        assert_identical(now[..., ~other], before[..., ~other], "outside the second mask")
        mixed = torch.where(other, z, torch.where(MASK, y, x))
        assert_near(now[..., other], module(mixed, time)[..., other], "inside the second mask")


@torch.no_grad()
def test_an_edit_that_fills_again_is_lined_up_as_it_was_recorded() -> None:
    module, runtime = Attribute(), fisedit.Runtime()
    network = compiled(module, runtime)
    with runtime.record("base"):
        recorded = run(network, pictures(1, 3))
    with runtime.edit("base", mask=MASK):
        check(module, run(network, pictures(2, 3)), recorded, (1, 2), MASK)
    module.forget()
    with runtime.edit("base", mask=MASK):
        check(module, run(network, pictures(2, 3)), recorded, (1, 2), MASK)


@torch.no_grad()
def test_what_is_kept_counts_and_is_given_back() -> None:
    module, runtime = Attribute(), fisedit.Runtime()
    network = compiled(module, runtime)
    with runtime.record("base"):
        run(network, pictures(1, 2))
    size = runtime.stats.bytes_stored
    assert runtime.bytes_of("base") == size
    with runtime.edit("base", mask=MASK):
        run(network, pictures(2, 2))
    grown = runtime.stats.bytes_stored
    assert grown > size and runtime.bytes_of("base") >= grown
    with runtime.edit("base", mask=MASK, save_as="base"):
        run(network, pictures(2, 2))
    runtime.drop("base")
    assert runtime.stats.bytes_stored == 0


@torch.no_grad()
def test_the_inputs_of_the_first_call_may_be_written_over() -> None:
    module, runtime = Attribute(), fisedit.Runtime()
    network = compiled(module, runtime)
    given = pictures(1, 1)
    with runtime.record("base"):
        recorded = run(network, given)
    given[0][0].zero_()
    with runtime.edit("base", mask=MASK):
        check(module, run(network, pictures(2, 1)), recorded, (1, 2), MASK)


@pytest.mark.parametrize("calls", [1, 3])
@torch.no_grad()
def test_what_was_exchanged_since_is_refused(calls: int) -> None:
    """Another table than the one that the first call made is none of the recording."""
    module, runtime = Attribute(), fisedit.Runtime()
    network = compiled(module, runtime)
    with runtime.record("base"):
        run(network, pictures(1, calls))
    assert module.kept is not None
    module.kept = module.kept * 1.01
    with pytest.raises(FisEditError) as caught:
        with runtime.edit("base", mask=MASK):
            run(network, pictures(2, calls))
    if calls == 1:  # the table of later calls is compared itself
        message = str(caught.value)
        assert "the network as it is now returns something else" in message
        assert "Call the network once before it is recorded" in message


@torch.no_grad()
def test_other_weights_are_noticed() -> None:
    module, runtime = Attribute(), fisedit.Runtime()
    network = compiled(module, runtime)
    with runtime.record("base"):
        run(network, pictures(1, 1))
    module.conv.weight.data[0, 0, 0, 0] += 1e-7
    with pytest.raises(WeightsChangedError):
        with runtime.edit("base", mask=MASK):
            run(network, pictures(2, 1))


class Drawn(Attribute):
    """Random numbers make it a graph that runs as a whole."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return super().forward(x + torch.rand_like(x), time)


class Another(Flag):
    """The second call computes something else than the first."""

    def table(self, x: Tensor) -> Tensor:
        return super().table(x) if not self.warm else x.new_full((1, 3, 1, 1), 5.0)


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize(
    ("make", "reason"), [(Drawn, "not run twice"), (Another, "returns something else")], ids=["random", "another"]
)
@torch.no_grad()
def test_what_cannot_be_computed_again_is_refused_and_says_what_helps(
    make: Callable[[], Network], reason: str, calls: int
) -> None:
    module, runtime = make(), fisedit.Runtime()
    network = compiled(module, runtime)
    with runtime.record("base"):
        run(network, pictures(1, calls))
    with pytest.raises(CallMismatchError) as caught:
        with runtime.edit("base", mask=MASK):
            run(network, pictures(2, calls))
    message = str(caught.value)
    if calls == 1 or reason != "not run twice":
        assert "In its first call inside record the network filled something that it keeps" in message
        assert reason in message and "Call the network once before it is recorded" in message
    # What is advised works.
    with runtime.record("again"):
        recorded = run(network, pictures(1, calls))
    with runtime.edit("again", mask=MASK):
        edited: Any = run(network, pictures(2, calls))
    for now, before in zip(edited, recorded, strict=True):
        assert_identical(now[..., ~MASK], before[..., ~MASK], "outside the mask")


class Numbered(Attribute):
    """The time is a Python number, of whose first value the first graph is made."""

    def forward(self, x: Tensor, time: int) -> Tensor:  # type: ignore[override]
        return super().forward(x, torch.tensor(time).float())


@needs_aligned_integers
@pytest.mark.parametrize("calls", [1, 3])
@torch.no_grad()
def test_numbers_that_the_first_graph_fixed(calls: int) -> None:
    module, runtime = Numbered(), fisedit.Runtime()
    network = compiled(module, runtime)
    times = [981, 721, 41][:calls]
    old, new = ([x for x, _ in pictures(seed, calls)] for seed in (1, 2))
    with runtime.record("base"):
        recorded = [network(x, time) for x, time in zip(old, times, strict=True)]
    with pytest.raises(CallMismatchError):
        with runtime.edit("base", mask=MASK):
            for x, time in zip(new, [980, 721, 41], strict=False):
                network(x, time)
    with runtime.edit("base", mask=MASK):
        edited = [network(x, time) for x, time in zip(new, times, strict=True)]
    for now, before, x, y, time in zip(edited, recorded, old, new, times, strict=True):
        assert_identical(now[..., ~MASK], before[..., ~MASK], "outside the mask")
        assert_near(now[..., MASK], module(torch.where(MASK, y, x), time)[..., MASK], "inside the mask")
    with pytest.raises(CallMismatchError):
        with runtime.edit("base", mask=MASK):
            for x, time in zip(new, [980, 721, 41], strict=False):
                network(x, time)


@torch.no_grad()
def test_two_networks_of_a_class_that_fill() -> None:
    """Each has a table and weights of its own; none stands in for the other."""
    modules, runtime = [Attribute(), Attribute()], fisedit.Runtime()
    modules[1].conv.weight.data.mul_(-1)
    networks = [compiled(module, runtime) for module in modules]
    (old, time), (new, _) = pictures(1, 1)[0], pictures(2, 1)[0]
    with runtime.record("base"):
        recorded = [network(old, time) for network in networks]
    expected = [module(torch.where(MASK, new, old), time) for module in modules]
    with runtime.edit("base", mask=MASK):
        edited = [network(new, time) for network in networks]
    for now, before, wanted in zip(edited, recorded, expected, strict=True):
        assert_identical(now[..., ~MASK], before[..., ~MASK], "outside the mask")
        assert_near(now[..., MASK], wanted[..., MASK], "inside the mask")
    with pytest.raises(CallMismatchError, match="a cache that it fills at its first call"):
        with runtime.edit("base", mask=MASK):
            networks[1](new, time)


@pytest.mark.parametrize("lowering", ["plain", "inductor"])
@torch.no_grad()
def test_samples_with_masks_of_their_own(lowering: str) -> None:
    module, runtime = BySize(), fisedit.Runtime(storage=torch.float16)
    network = compiled(module, runtime, lowering=lowering)
    (old, time), (new, _) = pictures(1, 1)[0], pictures(2, 1)[0]
    with runtime.record("base"):
        recorded = network(old, time)
    mask = torch.stack([MASK, torch.zeros_like(MASK)])
    mask[1, 0, 3:] = True
    with runtime.edit("base", mask=mask):
        edited = network(new, time)
    inside = mask[:, None].expand(edited.shape)
    assert_identical(edited[~inside], recorded[~inside], "outside the mask")
    expected = module(torch.where(mask[:, None], new, old), time)
    assert_near(edited[inside], expected[inside], "inside the mask", dtype=torch.float16)


@torch.no_grad()
def test_what_is_kept_needs_room_in_the_budget() -> None:
    sizes = []
    for module in (Attribute(), Attribute()):
        runtime = fisedit.Runtime()
        network = compiled(module, runtime)
        if sizes:
            run(module, pictures(0, 1))  # called before
        with runtime.record("base"):
            run(network, pictures(1, 1))
        sizes.append(runtime.stats.bytes_stored)
    assert sizes[0] > sizes[1]
    runtime = fisedit.Runtime(budget=sizes[1] + 8)
    network = compiled(Attribute(), runtime)
    with pytest.raises(BudgetError):
        with runtime.record("base"):
            run(network, pictures(1, 1))
    assert runtime.stats.bytes_stored == 0
