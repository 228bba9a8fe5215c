"""Capturing a graph by the form of its inputs: when, what is copied, and when it is left alone."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fisedit_compile.executing import replay
from fisedit_compile.executing.replay import (
    KEPT,
    Captured,
    CudaCapturer,
    ReplayedGraph,
    Roles,
    capturer_for,
    difference,
    is_dense,
)
from support.tape import TapeCapturer
from support.tolerances import assert_identical

#: Inputs: a weight (held), a table (stable), a latent (copied), a number.
ROLES = Roles(count=4, held=frozenset({0}), stable=frozenset({1}))


def compute(weight: Tensor, table: Tensor, latent: Tensor, number: float) -> tuple[Tensor, None]:
    return latent[table] * weight + number, None


class Setting:
    """A graph that is captured, its inputs, and how often it ran."""

    def __init__(self, run: Callable[..., Sequence[Any]] = compute, capturer: TapeCapturer | None = None) -> None:
        self.capturer = capturer or TapeCapturer()
        self.runs = 0
        self._run = run
        self.graph = ReplayedGraph(self.run, ROLES, self.capturer, "the test graph")
        self.weight = torch.tensor([2.0, 3.0])

    def run(self, *inputs: Any) -> Sequence[Any]:
        self.runs += 1
        return self._run(*inputs)

    def check(self, seed: int, table: Tensor, number: float = 1.0) -> None:
        """One call, compared with what it must compute."""
        latent = torch.randn(5, 2, generator=torch.Generator().manual_seed(seed))
        result, nothing = self.graph(self.weight, table, latent, number)
        assert_identical(result, compute(self.weight, table, latent, number)[0], f"call {seed}")
        assert nothing is None
        result.fill_(float("nan"))


def test_the_second_call_is_captured_and_later_ones_only_replayed() -> None:
    setting, table = Setting(), torch.tensor([0, 3])
    setting.check(0, table)
    assert (setting.capturer.captures, setting.capturer.replays, setting.runs) == (0, 0, 1)
    setting.check(1, table)
    # Once for the launches one by one that the replay is compared with, once for the capture.
    assert (setting.capturer.captures, setting.capturer.replays, setting.runs) == (1, 1, 3)
    setting.check(2, table)
    assert (setting.capturer.replays, setting.runs) == (2, 4)
    for seed in range(3, 6):
        setting.check(seed, torch.tensor([1, seed - 1]))
    assert (setting.capturer.captures, setting.capturer.replays, setting.runs) == (1, 5, 4)


def test_other_forms_are_captured_by_themselves() -> None:
    setting = Setting()
    for table in (torch.tensor([0, 3]), torch.tensor([4, 1, 0])):
        for seed in range(3):
            setting.check(seed, table)
    assert setting.capturer.captures == 2
    for number in (2.0, 3.0):
        # Numbers are part of captured launches.
        setting.check(7, torch.tensor([0, 3]), number)
    assert setting.capturer.captures == 2


def test_forms_share_static_tensors_and_know_what_is_in_them() -> None:
    setting = Setting()
    tables = [torch.tensor([0, 3]), torch.tensor([4, 1, 0]), torch.tensor([2, 1])]
    for seed in range(12):
        # The first and the last table share memory, the latent all of them.
        setting.check(seed, tables[seed % 3])
    assert setting.capturer.captures == 2
    assert len(setting.graph._statics) == 3


def test_a_parameter_that_moved_is_another_form() -> None:
    setting, table = Setting(), torch.tensor([0, 3])
    for seed in range(4):
        setting.check(seed, table)
    setting.weight.data = torch.tensor([5.0, 7.0])
    for seed in range(4):
        setting.check(seed, table)
    assert setting.capturer.captures == 2


def test_a_parameter_changed_in_place_is_read_where_it_is() -> None:
    setting, table = Setting(), torch.tensor([0, 3])
    for seed in range(4):
        setting.check(seed, table)
    setting.weight.data += 1.0
    setting.check(5, table)
    assert setting.capturer.captures == 1


def test_what_anybody_may_change_is_copied_at_every_call() -> None:
    setting, table = Setting(), torch.tensor([0, 3])
    latent = torch.ones(5, 2)
    for _ in range(5):
        latent.data += 1.0
        result, _ = setting.graph(setting.weight, table, latent, 0.0)
        assert_identical(result, latent[table] * setting.weight)
    assert setting.capturer.replays == 4


def test_only_a_few_forms_are_kept() -> None:
    setting = Setting()
    for _ in range(2):
        for count in range(1, KEPT + 2):
            setting.check(count, torch.zeros(count, dtype=torch.int64))
    assert setting.capturer.captures == 0
    setting.check(0, torch.zeros(KEPT + 1, dtype=torch.int64))
    assert setting.capturer.captures == 1


def test_what_cannot_be_captured_runs_as_before_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    def reads_back(weight: Tensor, table: Tensor, latent: Tensor, number: float) -> tuple[Tensor, None]:
        return compute(weight, table, latent, number + 0.0 * latent.sum().item())

    setting, table = Setting(reads_back), torch.tensor([0, 3])
    with caplog.at_level(logging.WARNING):
        for seed in range(4):
            setting.check(seed, table)
    assert setting.capturer.replays == 0
    (record,) = [record for record in caplog.records if record.name == "fisedit_compile.executing.replay"]
    assert "the test graph runs without CUDA graphs" in record.message and "reads a value back" in record.message


class Forgetful(TapeCapturer):
    """Its replays compute nothing, from the given one on."""

    def __init__(self, works: int) -> None:
        super().__init__()
        self._works = works

    def capture(self, run: Callable[[], Sequence[Any]]) -> Captured:
        captured = super().capture(run)

        def replay() -> None:
            if self.replays < self._works:
                captured.replay()

        return Captured(replay, captured.outputs)


@pytest.mark.parametrize("works", [0, 1])
def test_a_wrong_replay_is_noticed_and_never_returned(works: int, caplog: pytest.LogCaptureFixture) -> None:
    setting, table = Setting(capturer=Forgetful(works)), torch.tensor([0, 3])
    with caplog.at_level(logging.WARNING):
        for seed in range(5):
            setting.check(seed, table)
    assert setting.capturer.replays == works
    assert "a replay differs from launches one by one" in caplog.text


def test_tensors_on_another_device_are_not_captured() -> None:
    setting = Setting(lambda weight, table, latent, number: (weight, None))
    for _ in range(3):
        setting.graph(setting.weight, torch.tensor([0]), torch.empty(5, 2, device="meta"), 1.0)
    assert setting.capturer.captures == 0
    assert setting.graph.refusal == "input 2 lies on meta, not on cpu"


def test_nothing_is_captured_while_somebody_else_captures() -> None:
    setting, table = Setting(), torch.tensor([0, 3])
    setting.capturer.busy = True
    for seed in range(4):
        setting.check(seed, table)
    assert setting.capturer.captures == 0
    setting.capturer.busy = False
    for seed in range(4):
        setting.check(seed, table)
    assert setting.capturer.captures == 1


def test_deleted_weights_are_not_kept() -> None:
    class Forgetting(TapeCapturer):
        """As a CUDA graph, it keeps no tensors but results."""

        def capture(self, run: Callable[[], Sequence[Any]]) -> Captured:
            self.captures += 1
            outputs = run()
            return Captured(lambda: None, outputs)

    setting, table = Setting(capturer=Forgetting()), torch.tensor([0, 3])
    for _ in range(3):
        setting.check(1, table)
    assert setting.capturer.captures == 1 and setting.graph.refusal is None
    alive = weakref.ref(setting.weight)
    del setting.weight
    gc.collect()
    assert alive() is None


def test_casts_of_autocast_are_captured() -> None:
    """Autocast keeps casts of weights for its region; a captured graph would read them after it."""

    def multiply(weight: Tensor, table: Tensor, latent: Tensor, number: float) -> tuple[Tensor, None]:
        return torch.nn.functional.linear(latent[table], weight), None

    graph = ReplayedGraph(multiply, ROLES, TapeCapturer(), "the test graph")
    weight, table = torch.nn.Parameter(torch.randn(3, 2)), torch.tensor([0, 3])
    for region in range(3):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for _ in range(3):
                latent = torch.randn(5, 2)
                result, _ = graph(weight, table, latent, 1.0)
                assert_identical(result, multiply(weight, table, latent, 1.0)[0], f"region {region}")
        weight.data += 1.0
    assert graph.refusal is None
    assert torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("form", ["expanded", "part"])
def test_inputs_with_gaps_and_overlaps_are_made_dense(form: str) -> None:
    strides = []

    def noting(weight: Tensor, table: Tensor, latent: Tensor, number: float) -> tuple[Tensor, None]:
        strides.append(latent.stride())
        return compute(weight, table, latent, number)

    graph = ReplayedGraph(noting, ROLES, TapeCapturer(), "the test graph")
    weight, table = torch.tensor([2.0, 3.0]), torch.tensor([0, 3])
    for seed in range(4):
        whole = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
        latent = whole[:, :1].expand(5, 2) if form == "expanded" else whole[:, 1:3]
        result, _ = graph(weight, table, latent, 1.0)
        assert_identical(result, compute(weight, table, latent, 1.0)[0], f"call {seed}")
    assert set(strides) == {(2, 1)}


@pytest.mark.parametrize(
    ("tensor", "dense"),
    [
        (torch.empty(2, 3, 4), True),
        (torch.empty(2, 3, 4).permute(2, 0, 1), True),
        (torch.empty(2, 3, 4)[:, :, 1:], False),
        (torch.empty(2, 1).expand(2, 3), False),
        (torch.empty(()), True),
        (torch.empty(0, 5)[:, ::2], True),
        (torch.empty(4, 1, 2).as_strided((4, 1, 2), (2, 99, 1)), True),
    ],
)
def test_dense_tensors_are_told(tensor: Tensor, dense: bool) -> None:
    assert is_dense(tensor.shape, tensor.stride()) is dense


def test_values_of_held_numbers_on_the_processor_are_part_of_the_form() -> None:
    class Elsewhere(TapeCapturer):
        device = torch.device("meta")

    graph = ReplayedGraph(lambda weight, table, latent, number: (None,), ROLES, Elsewhere(), "the test graph")
    empty = torch.empty(1, device="meta")
    for value in (0.5, 0.5, 0.8):
        graph(torch.tensor(value), empty, empty, 1.0)
    assert graph.refusal is None and len(graph._forms) == 2
    graph(torch.tensor([0.5]), empty, empty, 1.0)
    assert graph.refusal == "input 0 lies on cpu, not on meta"


def test_captures_are_usable_in_and_outside_of_inference_mode() -> None:
    setting, table = Setting(), torch.tensor([0, 3])
    for seed in range(6):
        with torch.inference_mode(seed % 2 == 1):
            setting.check(seed, table)
    assert setting.capturer.replays == 5


def fails() -> Sequence[Any]:
    raise RuntimeError("this cannot be captured")


def test_a_capture_that_failed_is_followed_by_one_that_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only that makes older releases of PyTorch draw random numbers again."""
    log: list[str] = []

    @contextmanager
    def graph(graph: object, pool: int, *given: object, **keywords: object) -> Iterator[None]:
        log.append(f"begin {pool}")
        yield
        log.append(f"end {pool}")

    pools = iter(range(9))
    names = ("CUDAGraph", "Stream", "current_stream")
    fakes = {name: mock.MagicMock() for name in names} | {"device": lambda device: nullcontext(), "graph": graph}
    fakes |= {"graph_pool_handle": lambda: next(pools), "set_stream": lambda stream: log.append("stream")}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(replay, "end_failed_capture", lambda device, pool: log.append(f"tell {pool}"))
    capturer = CudaCapturer(torch.device("meta"))
    with pytest.raises(RuntimeError, match="this cannot be captured"):
        capturer.capture(fails)
    assert log == ["begin 0", "end 0", "begin 0", "stream", "tell 0", "begin 1", "end 1"]
    # Garbage that is collected during a capture may end it.
    assert gc.isenabled() and capturer.capture(lambda: [gc.isenabled()]).outputs == [False] and gc.isenabled()
    assert log[7:] == ["begin 1", "end 1"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_goes_on_after_a_capture_that_failed() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    capturer, values, stream = CudaCapturer(device), torch.ones(8, device=device), torch.cuda.current_stream()
    for _ in range(2):
        with pytest.raises(RuntimeError):
            capturer.capture(lambda: [values * values.sum().item()])
        assert torch.cuda.current_stream() == stream and capturer.available()
        # Both refuse while they believe that a capture goes on.
        assert torch.rand(4, device=device).isfinite().all()
        torch.cuda.empty_cache()
        captured = capturer.capture(lambda: [values * 2.0])
        values.fill_(3.0)
        captured.replay()
        assert captured.outputs[0].tolist() == [6.0] * 8


def test_processors_capture_nothing() -> None:
    assert capturer_for([torch.device("cpu")]) is None
    assert capturer_for([]) is None


@pytest.mark.parametrize(
    ("value", "expected", "reason"),
    [
        (torch.ones(2), torch.ones(2), None),
        (torch.ones(2), torch.ones(3), "output 0 is torch.float32 [2], not torch.float32 [3]"),
        (torch.ones(2).half(), torch.ones(2), "output 0 is torch.float16 [2], not torch.float32 [2]"),
        (torch.ones(2), torch.ones(2) * 1.001, "output 0 is off by 0.001, its largest value is 1"),
        (torch.ones(2), torch.ones(2) * (1 + 1e-6), None),
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")]), None),
        (torch.tensor([0.0, float("nan")]), torch.tensor([0.0, 0.0]), "output 0 is off by 0, its largest value is 0"),
        (torch.tensor([1]), torch.tensor([2]), "output 0 is another"),
        (torch.empty(0), torch.empty(0), None),
        (None, None, None),
    ],
)
def test_differences_are_told(value: Any, expected: Any, reason: str | None) -> None:
    assert difference([value], [expected]) == reason
