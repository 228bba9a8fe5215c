"""Wrong use is a clear error, never a wrong picture, and leaves the runtime as it was."""

from __future__ import annotations

from typing import Any, cast

import numpy
import pytest
import torch
from torch import Tensor, nn

import fisedit_compile as fisedit
from fisedit_compile.errors import (
    BudgetError,
    CallMismatchError,
    FisEditError,
    GradientError,
    MaskError,
    ScalarMismatchError,
    UnknownBaseError,
    WeightsChangedError,
)
from support.composite_networks import COMPOSITES
from support.harness import Case, MaskRecipe, compile_network, compiled
from support.networks import Network
from support.shape_networks import BLOCKS
from support.tolerances import assert_identical, assert_near

ALL = {network.name: network for network in (*BLOCKS, *COMPOSITES)}
MASK = torch.zeros(13, 9)
MASK[3:6, 2:5] = 1


@pytest.fixture
def case() -> Case:
    """A recorded network of two convolutions."""
    return compile_network(ALL["two convolutions"])


def assert_still_right(case: Case) -> None:
    """The base still gives the reference's edit."""
    inputs = case.network.inputs(1)
    case.assert_all_near(case.edit(inputs, MASK), case.expected(inputs, MASK), "after the error")


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.full((13, 9), float("nan")), "NaN"),
        (torch.zeros(0, 9), "0"),
        (torch.zeros(9), "rank 1"),
        (torch.zeros(1, 2, 13, 9), "rank 4"),
        (numpy.zeros((13, 9, 3, 2)), "rank 4"),
    ],
)
def test_a_mask_that_is_none(case: Case, mask: Any, message: str) -> None:
    with pytest.raises(MaskError, match=message):
        with case.runtime.edit("base", mask=mask):
            raise AssertionError("the context was entered")
    assert_still_right(case)


def test_a_mask_whose_batch_does_not_divide(case: Case) -> None:
    with pytest.raises(MaskError, match="3"), case.runtime.edit("base", mask=torch.ones(3, 13, 9)):
        case.call(case.network.inputs(1))
    assert_still_right(case)


def test_a_base_that_does_not_exist(case: Case) -> None:
    with pytest.raises(UnknownBaseError, match="'nothing'.*'base'"), case.runtime.edit("nothing", mask=MASK):
        raise AssertionError("the context was entered")
    with pytest.raises(KeyError):
        case.runtime.drop("nothing")
    case.runtime.drop("base")
    assert case.runtime.bases == ()
    with pytest.raises(UnknownBaseError), case.runtime.edit("base", mask=MASK):
        raise AssertionError("the context was entered")


def test_a_record_without_a_call(case: Case) -> None:
    with pytest.raises(CallMismatchError), case.runtime.record("nothing"):
        pass
    assert case.runtime.bases == ("base",)


def test_another_number_of_calls_than_announced(case: Case) -> None:
    with pytest.raises(CallMismatchError), case.runtime.record("two", calls=2):
        case.call(case.network.inputs(1))
    assert case.runtime.bases == ("base",)


def test_fewer_calls_than_recorded(case: Case) -> None:
    with pytest.raises(CallMismatchError), case.runtime.edit("base", mask=MASK, save_as="next"):
        pass
    assert case.runtime.bases == ("base",)
    assert_still_right(case)


def test_more_calls_than_recorded(case: Case) -> None:
    with pytest.raises(CallMismatchError, match="1"), case.runtime.edit("base", mask=MASK, save_as="next"):
        case.call(case.network.inputs(1))
        case.call(case.network.inputs(1))
    assert case.runtime.bases == ("base",)
    assert_still_right(case)


def test_another_resolution(case: Case) -> None:
    with pytest.raises(CallMismatchError), case.runtime.edit("base", mask=MASK):
        case.call((torch.randn(2, 8, 11, 7),))
    assert_still_right(case)


def test_another_network(case: Case) -> None:
    other = ALL["convolution 1x1"].module()
    module = compiled(other, case.runtime)
    with pytest.raises(CallMismatchError), case.runtime.edit("base", mask=MASK), torch.no_grad():
        module(*case.network.inputs(1))
    assert_still_right(case)


def test_an_error_of_the_caller_leaves_no_base(case: Case) -> None:
    with pytest.raises(ZeroDivisionError), case.runtime.record("next"):
        case.call(case.network.inputs(1))
        _ = 1 // 0
    with pytest.raises(ZeroDivisionError), case.runtime.record("base"):
        case.call(case.network.inputs(1))
        _ = 1 // 0
    with pytest.raises(ZeroDivisionError), case.runtime.edit("base", mask=MASK, save_as="next"):
        case.call(case.network.inputs(1))
        _ = 1 // 0
    assert case.runtime.bases == ("base",)
    assert case.runtime.phase() is None
    assert_still_right(case)


def test_recording_again_replaces(case: Case) -> None:
    with case.runtime.record("base"):
        recorded = case.call(case.network.inputs(5))
    with case.runtime.edit("base", mask=torch.zeros(3, 3)):
        (output,) = case.call(case.network.inputs(1))
    assert_identical(output, recorded[0], "the new recording")


def test_contexts_do_not_nest(case: Case) -> None:
    with case.runtime.edit("base", mask=MASK):
        with pytest.raises(FisEditError), case.runtime.record("inner"):
            raise AssertionError("the context was entered")
        case.call(case.network.inputs(1))
    assert_still_right(case)


@pytest.mark.parametrize("change", ["in place", "data", "one element of many"])
def test_changed_weights(case: Case, change: str) -> None:
    parameter = next(parameter for parameter in case.module.parameters() if parameter.dim() == 4)
    kept = parameter.detach().clone()
    if change == "in place":
        parameter.mul_(1.5)
    elif change == "data":
        parameter.data += 1
    else:
        parameter.data[0] += 0.5
    with pytest.raises(WeightsChangedError), case.runtime.edit("base", mask=MASK):
        case.call(case.network.inputs(1))
    parameter.data.copy_(kept)
    assert_still_right(case)


def test_weights_changed_before_recording_again(case: Case) -> None:
    """What is prepared from the weights once must not outlive them."""
    inputs = case.network.inputs(1)
    case.edit(inputs, MASK)
    module = case.network.module()
    for parameter, plain in zip(case.module.parameters(), module.parameters(), strict=True):
        parameter.data += 0.25
        plain.data += 0.25
    with case.runtime.record("base"):
        case.call(case.network.inputs(0))
    with case.runtime.edit("base", mask=torch.ones(13, 9)):
        outputs = case.call(inputs)
    case.assert_all_near(outputs, (module(*inputs),), "with the new weights")


def test_a_changed_timestep() -> None:
    case = compile_network(ALL["timed"])
    x, timestep = case.network.inputs(1)
    with pytest.raises(ScalarMismatchError), case.runtime.edit("base", mask=MASK):
        case.call((x, timestep + 1))
    assert_still_right(case)


def test_a_changed_numpy_number_of_the_module() -> None:
    """It is no parameter whose identity tells, so its value is compared."""
    case = compile_network(ALL["number attributes"])
    inner = cast(Any, case.module)._orig_mod
    kept, inner.numpy_number = inner.numpy_number, numpy.float64(7.0)
    with pytest.raises(ScalarMismatchError, match="record again"), case.runtime.edit("base", mask=MASK):
        case.call(case.network.inputs(1))
    inner.numpy_number = kept
    assert_still_right(case)


@pytest.mark.parametrize("context", ["record", "edit"])
def test_an_input_that_requires_a_gradient(case: Case, context: str) -> None:
    (x,) = case.network.inputs(1)
    entered = case.runtime.record("next") if context == "record" else case.runtime.edit("base", mask=MASK)
    with pytest.raises(GradientError), entered:
        case.module(x.requires_grad_())
    assert case.runtime.bases == ("base",)
    assert_still_right(case)


def test_a_budget_that_does_not_suffice() -> None:
    network: Network = ALL["self-attention"]
    runtime = fisedit.Runtime(budget=1000)
    module = compiled(network.module(), runtime)
    with pytest.raises(BudgetError, match="1000|1,000|1.0 KiB|1000 B"), runtime.record("base"), torch.no_grad():
        module(*network.inputs(0))
    assert runtime.bases == ()
    assert runtime.stats.bytes_stored == 0


def test_an_unknown_option_lists_the_valid_ones() -> None:
    network = ALL["two convolutions"]
    with pytest.raises(Exception, match="valid options are runtime, norm, lowering"):
        torch.compile(network.module(), backend="fisedit", options={"speed": 11})(*network.inputs(0))
    with pytest.raises(Exception, match="exact, cached"):
        torch.compile(network.module(), backend="fisedit", options={"norm": "wrong"})(*network.inputs(0))


def test_a_call_in_another_thread_is_dense(case: Case) -> None:
    from threading import Thread

    results: list[tuple[Tensor, ...]] = []
    inputs = case.network.inputs(1)
    with case.runtime.edit("base", mask=MASK):
        thread = Thread(target=lambda: results.append(case.call(inputs)))
        thread.start()
        thread.join()
        outputs = case.call(inputs)
    with torch.no_grad():
        case.assert_all_near(results[0], (case.network.module()(*inputs),), "the other thread")
    case.assert_all_near(outputs, case.expected(inputs, MASK), "this thread")


def test_one_compiled_network_many_masks_is_used_by_the_test() -> None:
    """The recipes of masks give masks that are neither empty nor full where they should not be."""
    for seed in range(20):
        for kind in ("pixel", "border", "rectangle", "ragged", "per-sample", "one sample"):
            mask = MaskRecipe(kind, seed).draw((13, 9), 2)
            assert mask.any() and not mask.all(), (kind, seed)


class Adapted(nn.Module):
    """A convolution with an adapter of low rank, whose scale is a Python number of the module, as in peft."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.down, self.up = nn.Conv2d(8, 2, 1, bias=False), nn.Conv2d(2, 8, 1, bias=False)
        self.scaling = {"default": 0.7}

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.enter(x)
        return self.leave(hidden + self.up(self.down(hidden)) * self.scaling["default"])


@pytest.mark.parametrize("seen_before", [False, True])
@torch.no_grad()
def test_another_scale_of_an_adapter(seen_before: bool) -> None:
    """It is a constant of another graph, or, once the compiler has seen it change, an input that is compared."""
    torch.manual_seed(0)
    network, runtime = Adapted().requires_grad_(False), fisedit.Runtime()
    module = compiled(network, runtime)
    base, new = torch.randn(2, 3, 13, 9), torch.randn(2, 3, 13, 9)
    for scale in (0.1, 0.4, 0.7) if seen_before else (0.7,):
        network.scaling["default"] = scale
        module(base)
    with runtime.record("base"):
        recorded = module(base)
    network.scaling["default"] = 0.3
    error, message = (ScalarMismatchError, "0.7.*0.3") if seen_before else (CallMismatchError, "scale of an adapter")
    with pytest.raises(error, match=message), runtime.edit("base", mask=MASK):
        module(new)
    network.scaling["default"] = 0.7
    if seen_before:
        with runtime.edit("base", mask=MASK):
            assert_near(module(base), recorded, "with the scale that was recorded")
