"""What a compiled graph does in each phase, with a program written by hand."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fisedit_compile.errors import (
    GradientError,
    WeightsChangedError,
)
from fisedit_compile.executing import executable as executable_module
from fisedit_compile.executing.executable import Executable
from fisedit_compile.executing.prologues import prologues
from support.executable_setting import CHANNELS, MASK, PICTURE, Setting, dense, mixed, program_of
from support.tolerances import assert_identical


@pytest.fixture
def setting() -> Iterator[Setting]:
    prologues.clear()
    yield Setting()
    prologues.clear()


def test_outside_of_contexts_it_is_the_dense_graph_with_autograd(setting: Setting) -> None:
    output = setting(0)
    output.sum().backward()
    assert setting.weight.grad is not None
    assert_identical(output.detach(), setting.dense(0))


def test_recording_and_editing(setting: Setting) -> None:
    with setting.runtime.record("base"):
        recorded = [setting(0, time) for time in (1.0, 2.0)]
    assert not recorded[0].requires_grad
    assert_identical(recorded[1], setting.dense(0, 2.0), "recording is dense")
    with setting.runtime.edit("base", mask=MASK) as run:
        edited = [setting(5, time) for time in (1.0, 2.0)]
        assert run.density == pytest.approx(4 / 20)
    for number, time in enumerate((1.0, 2.0)):
        assert_identical(edited[number], mixed(setting.dense(5, time), recorded[number]), f"call {number}")
        assert not edited[number].requires_grad
    assert setting.runtime.stats.calls == {"record": 2, "edit": 2, "dense": 0}


def test_an_empty_mask_gives_copies_of_the_recorded_outputs(setting: Setting) -> None:
    setting.record()
    for _ in range(2):
        with setting.runtime.edit("base", mask=torch.zeros(3, 3)):
            output = setting(5)
        assert_identical(output, setting.dense(0))
        output.fill_(7.0)


def test_the_recording_does_not_share_memory_with_inputs_or_outputs(setting: Setting) -> None:
    x = torch.randn(PICTURE)
    before = dense(x, setting.weight.detach(), torch.tensor(1.0))[0].clone()
    with setting.runtime.record("base"):
        (output,) = setting.graph(x, setting.weight, torch.tensor(1.0))
        output.zero_()
        x.zero_()
    with setting.runtime.edit("base", mask=torch.zeros(3, 3)):
        assert_identical(setting(1), before)


def test_calls_are_dense_until_the_mask_is_known(setting: Setting) -> None:
    setting.record(1.0, 2.0)
    with setting.runtime.edit("base") as run:
        first = setting(5, 1.0)
        run.set_mask(MASK)
        second = setting(5, 2.0)
    assert_identical(first, setting.dense(5, 1.0))
    assert_identical(second, mixed(setting.dense(5, 2.0), setting.dense(0, 2.0)))
    assert setting.runtime.stats.calls == {"record": 2, "edit": 1, "dense": 1}


@pytest.mark.parametrize("kind", ["sparse", "empty", "dense"])
def test_a_saved_edit_is_a_base(setting: Setting, kind: str) -> None:
    setting.record()
    mask = {"sparse": MASK, "empty": torch.zeros_like(MASK), "dense": None}[kind]
    with setting.runtime.edit("base", mask=mask, save_as="next"):
        saved = setting(5)
    with setting.runtime.edit("next", mask=torch.zeros(2, 2)):
        assert_identical(setting(9), saved, "what was saved")
    with setting.runtime.edit("next", mask=~MASK):
        assert_identical(setting(9), mixed(setting.dense(9), saved, ~MASK), "an edit of the saved edit")
    with setting.runtime.edit("base", mask=torch.zeros(2, 2)):
        assert_identical(setting(9), setting.dense(0), "the first base stays")


def test_different_masks_for_the_samples_of_a_batch(setting: Setting) -> None:
    setting.record()
    masks = torch.stack([MASK, torch.zeros_like(MASK)])
    masks[1, 0, 0] = True
    with setting.runtime.edit("base", mask=masks):
        output = setting(5)
    assert_identical(output, mixed(setting.dense(5), setting.dense(0), masks[:, None]))


def test_an_output_that_is_a_recorded_tensor_is_copied() -> None:
    setting = Setting(program_of(returns_recorded=True))
    setting.record()
    for _ in range(2):
        with setting.runtime.edit("base", mask=MASK):
            output = setting(5)
        assert_identical(output, setting.dense(0))
        output.fill_(7.0)


@pytest.mark.parametrize("context", ["record", "edit"])
def test_an_input_that_requires_grad_is_refused(setting: Setting, context: str) -> None:
    setting.record()
    entered = setting.runtime.record("next") if context == "record" else setting.runtime.edit("base", mask=MASK)
    with pytest.raises(GradientError, match="input x requires grad"), entered:
        setting.graph(torch.randn(PICTURE, requires_grad=True), setting.weight, torch.tensor(1.0))
    assert setting.runtime.bases == ("base",)


def counting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the lowered graphs, as they are lowered."""
    names: list[str] = []
    lower = executable_module.Executable._lower

    def counted(self: Executable, name: str) -> Callable[..., Any]:
        names.append(name)
        return lower(self, name)

    monkeypatch.setattr(executable_module.Executable, "_lower", counted)
    return names


def test_graphs_are_lowered_when_they_are_needed(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    names = counting(monkeypatch)
    setting(0)
    assert names == []
    setting.record()
    assert names == ["record"]
    for _ in range(2):
        with setting.runtime.edit("base", mask=MASK):
            setting(0)
    assert names == ["record", "prologue", "edit"]
    with setting.runtime.edit("base", mask=MASK, save_as="next"):
        setting(0)
    assert names == ["record", "prologue", "edit", "edit_save"]


def count_prologues(setting: Setting) -> list[int]:
    """Grows by one at each run of the prologue."""
    runs: list[int] = []
    lowered = setting.executable._lower("prologue")

    def counted(*arguments: Any) -> Any:
        runs.append(1)
        return lowered(*arguments)

    setting.executable._lowered["prologue"] = counted
    return runs


def test_the_prologue_runs_once_for_the_same_weights(setting: Setting) -> None:
    runs = count_prologues(setting)
    for _ in range(3):
        setting.record(1.0, 2.0)
        with setting.runtime.edit("base", mask=MASK):
            setting(5, 1.0)
            setting(5, 2.0)
    assert len(runs) == 1


@pytest.mark.parametrize("change", ["in place", "data"])
def test_changed_weights_are_an_error_and_then_packed_again(setting: Setting, change: str) -> None:
    runs = count_prologues(setting)
    setting.record()
    with setting.runtime.edit("base", mask=MASK):
        setting(5)
    if change == "in place":
        with torch.no_grad():
            setting.weight.mul_(2)
    else:
        setting.weight.data += 1
    with pytest.raises(WeightsChangedError), setting.runtime.edit("base", mask=MASK):
        setting(5)
    setting.record()
    with setting.runtime.edit("base", mask=MASK):
        output = setting(5)
    assert_identical(output, mixed(setting.dense(5), setting.dense(0)))
    assert len(runs) == 2


def test_hoisted_tensors_die_with_the_parameters(setting: Setting) -> None:
    setting.record()
    with setting.runtime.edit("base", mask=MASK):
        setting(5)
    assert len(prologues) == 1
    setting.weight = torch.nn.Parameter(torch.ones(CHANNELS))
    gc.collect()
    assert len(prologues) == 0


def test_one_graph_serves_two_networks(setting: Setting) -> None:
    """Instances of one class share the compiled graph: what is kept belongs to the parameters."""
    first, second = setting.weight, torch.nn.Parameter(torch.tensor([5.0, 6.0, 7.0]))
    with setting.runtime.record("base"):
        setting(0)
        setting.weight = second
        setting(0)
    with setting.runtime.edit("base", mask=MASK):
        output = setting(5)
        assert_identical(output, mixed(setting.dense(5), setting.dense(0)), "second network first")
        setting.weight = first
        output = setting(5)
        assert_identical(output, mixed(setting.dense(5), setting.dense(0)), "first network")
