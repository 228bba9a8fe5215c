"""Record and edit as a user calls them: several calls, networks and edits, masks that come late, edits of edits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisedit_compile as fisedit
from fisedit_compile.errors import MaskError
from fisedit_compile.executing import executable
from fisedit_compile.executing.prologues import InvariantMemo
from support.composite_networks import COMPOSITES
from support.diffusers_networks import DIFFUSERS
from support.harness import MaskRecipe, compile_network, compiled, dense_outputs, outputs_of, reference_of
from support.networks import Network
from support.shape_networks import BLOCKS
from support.tape import only_operators
from support.tolerances import assert_identical, assert_near

ALL = {network.name: network for network in (*BLOCKS, *COMPOSITES, *DIFFUSERS)}
RAGGED, PIXEL = MaskRecipe("ragged", 3), MaskRecipe("pixel", 40)
RECTANGLE, SPARSE = MaskRecipe("rectangle", 4), MaskRecipe("sparse", 5)


@pytest.mark.parametrize("name", ["transformer block", "group norm", "many outputs", "flip", "skip network strided"])
@pytest.mark.parametrize("norm", ["exact", "cached"])
def test_an_edit_of_an_edit_is_the_reference_twice(name: str, norm: str) -> None:
    case = compile_network(ALL[name], norm=norm, traced_once=True)
    first, second, third = case.mask(RECTANGLE), case.mask(SPARSE), case.mask(RAGGED)
    recording = case.recording
    for number, mask in enumerate((first, second, third), start=1):
        inputs = case.network.inputs(number)
        before = "base" if number == 1 else f"edit {number - 1}"
        with case.runtime.edit(before, mask=mask, save_as=f"edit {number}"):
            outputs = case.call(inputs)
        recording = case.reference.edit(recording, inputs, mask)
        case.assert_all_near(outputs, recording.outputs, f"edit {number}")
    assert tuple(case.runtime.bases) == ("base", "edit 1", "edit 2", "edit 3")
    # No base has suffered from the edits of it, and dropping one leaves those that came of it whole.
    case.runtime.drop("edit 1")
    inputs = case.network.inputs(1)
    case.assert_all_near(case.edit(inputs, first), case.expected(inputs, first), "the base after its edits")
    again = case.reference.edit(recording, case.network.inputs(5), first)
    outputs = case.edit(case.network.inputs(5), first, base="edit 3")
    case.assert_all_near(outputs, again.outputs, "the last edit")


def test_an_edit_saved_under_its_own_name_replaces_the_base() -> None:
    case = compile_network(ALL["resnet block"], traced_once=True)
    mask, inputs = case.mask(RAGGED), case.network.inputs(1)
    with case.runtime.edit("base", mask=mask, save_as="base"):
        case.call(inputs)
    recording = case.reference.edit(case.recording, inputs, mask)
    other, later = case.mask(RECTANGLE), case.network.inputs(2)
    assert tuple(case.runtime.bases) == ("base",)
    expected = case.reference.edit(recording, later, other).outputs
    case.assert_all_near(case.edit(later, other), expected, "after replacement")


def test_a_saved_edit_with_an_empty_mask_is_the_base() -> None:
    case = compile_network(ALL["self-attention"], traced_once=True)
    with case.runtime.edit("base", mask=torch.zeros(4, 4), save_as="copy"):
        case.call(case.network.inputs(1))
    mask, inputs = case.mask(RAGGED), case.network.inputs(2)
    case.assert_all_near(case.edit(inputs, mask, base="copy"), case.expected(inputs, mask), "edit of the copy")


def test_a_saved_dense_call_is_a_base() -> None:
    case = compile_network(ALL["transformer block"], traced_once=True)
    with case.runtime.edit("base", save_as="dense"):
        outputs = case.call(case.network.inputs(1))
    case.assert_all_near(outputs, dense_outputs(case.network, 1), "dense")
    recording = case.reference.record(case.network.inputs(1))
    mask, inputs = case.mask(RAGGED), case.network.inputs(2)
    expected = case.reference.edit(recording, inputs, mask).outputs
    case.assert_all_near(case.edit(inputs, mask, base="dense"), expected, "edit of the dense edit")


@pytest.mark.parametrize("packing", ["auto", False])
def test_a_full_mask_runs_the_dense_network(packing: str | bool) -> None:
    case = compile_network(ALL["transformer block"], packing=packing)
    full, inputs = case.mask(MaskRecipe("full")), case.network.inputs(1)
    with nullcontext() if packing else only_operators():
        for output, expected in zip(case.edit(inputs, full), dense_outputs(case.network, 1), strict=True):
            if packing:
                assert_near(output, expected, "what the network itself computes, but for rounding")
            else:
                assert_identical(output, expected, "what the network itself computes")
    stats = case.runtime.stats
    assert (stats.calls["edit"], stats.calls["dense"]) == (0, 1)
    assert set(stats.density.values()) == {1.0}


@pytest.mark.parametrize("options", [{"norm": "cached"}, {"convolution": "rows"}], ids=str)
def test_a_full_mask_runs_sparsely_where_that_is_something_else(options: dict[str, str]) -> None:
    case = compile_network(ALL["resnet block"], traced_once=True, **options)
    full, inputs = case.mask(MaskRecipe("full")), case.network.inputs(1)
    case.assert_all_near(case.edit(inputs, full), case.expected(inputs, full), "the reference of these options")
    assert (case.runtime.stats.calls["edit"], case.runtime.stats.calls["dense"]) == (1, 0)


def test_a_saved_edit_of_a_full_mask_is_a_base() -> None:
    case = compile_network(ALL["transformer block"], traced_once=True)
    with case.runtime.edit("base", mask=case.mask(MaskRecipe("full")), save_as="whole"):
        case.call(case.network.inputs(1))
    recording = case.reference.record(case.network.inputs(1))
    mask, inputs = case.mask(RAGGED), case.network.inputs(2)
    expected = case.reference.edit(recording, inputs, mask).outputs
    case.assert_all_near(case.edit(inputs, mask, base="whole"), expected, "edit of the whole")


def test_a_full_mask_of_another_batch_is_refused() -> None:
    case = compile_network(ALL["transformer block"], traced_once=True)
    masks = torch.ones(case.network.batch + 1, *case.network.resolution, dtype=torch.bool)
    with pytest.raises(MaskError, match="masks for 3 samples"):
        case.edit(case.network.inputs(1), masks)


def test_what_depends_on_the_prompt_is_told_by_the_prompt_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparing weights with copies of them at every call would cost more than is spared."""
    told: list[tuple[Tensor, ...]] = []

    class Memo(InvariantMemo):
        def get(self, inputs: Sequence[Any], compute: Callable[[], Sequence[Tensor]]) -> tuple[Tensor, ...]:
            told.append(tuple(inputs))
            return super().get(inputs, compute)

    monkeypatch.setattr(executable, "InvariantMemo", Memo)
    case = compile_network(ALL["sd15"], packing=False, traced_once=True)
    inputs = case.network.inputs(1)
    case.edit(inputs, case.mask(RAGGED))
    (prompt,) = told[0]
    assert any(prompt.shape == value.shape and torch.equal(prompt.cpu(), value) for value in inputs[1:])


def record_steps(network: Network, steps: int) -> tuple[fisedit.Runtime, nn.Module]:
    """Record several calls; call ``i`` has the inputs of seed ``i``."""
    runtime = fisedit.Runtime()
    module = compiled(network.module(), runtime)
    with runtime.record("base", calls=steps):
        for step in range(steps):
            outputs_of(module, network.inputs(step))
    return runtime, module


@pytest.mark.parametrize("name", ["transformer block", "residual inputs"])
def test_the_nth_call_edits_the_nth_recorded_call(name: str) -> None:
    network = ALL[name]
    runtime, module = record_steps(network, 3)
    reference = reference_of(network)
    mask = RAGGED.draw(network.resolution)
    with runtime.edit("base", mask=mask) as run:
        for step in range(3):
            inputs = network.inputs(10 + step)
            expected = reference.edit(reference.record(network.inputs(step)), inputs, mask).outputs
            for output, wanted in zip(outputs_of(module, inputs), expected, strict=True):
                assert_near(output, wanted, f"step {step}")
        assert run.calls == 3
    assert runtime.stats.calls["record"] == 3
    assert runtime.stats.calls["edit"] == 3


def test_a_mask_may_come_late_and_change() -> None:
    network = ALL["transformer block"]
    runtime, module = record_steps(network, 4)
    reference = reference_of(network)
    last = RAGGED.draw(network.resolution)
    masks = [None, None, PIXEL.draw(network.resolution), last]
    with runtime.edit("base") as run:
        for step, mask in enumerate(masks):
            inputs = network.inputs(10 + step)
            if mask is not None:
                run.set_mask(mask)
            (output,) = outputs_of(module, inputs)
            (expected,) = reference.edit(reference.record(network.inputs(step)), inputs, mask).outputs
            assert_near(output, expected, f"step {step}")
    assert run.density == pytest.approx(float(last.float().mean()))


def test_a_late_mask_with_a_saved_result() -> None:
    network = ALL["group norm"]
    runtime, module = record_steps(network, 2)
    reference = reference_of(network)
    first, second = RAGGED.draw(network.resolution), RECTANGLE.draw(network.resolution)
    with runtime.edit("base", save_as="next") as run:
        outputs_of(module, network.inputs(10))
        run.set_mask(first)
        outputs_of(module, network.inputs(11))
    recordings = [
        reference.record(network.inputs(10)),
        reference.edit(reference.record(network.inputs(1)), network.inputs(11), first),
    ]
    with runtime.edit("next", mask=second):
        for step, recording in enumerate(recordings):
            (output,) = outputs_of(module, network.inputs(20 + step))
            (expected,) = reference.edit(recording, network.inputs(20 + step), second).outputs
            assert_near(output, expected, f"step {step}")


def test_two_networks_and_two_instances_in_one_context() -> None:
    """Two instances of one class may share compiled code, yet have weights and recordings of their own."""
    one, two = ALL["self-attention"], ALL["transformer block"]
    runtime = fisedit.Runtime()
    twin_weights = one.module()
    for parameter in twin_weights.parameters():
        parameter.mul_(0.7)
    modules = [one.module(), two.module(), twin_weights]
    networks = [one, two, one]
    references = [reference_of(one), reference_of(two), type(reference_of(one))(twin_weights, one.inputs(0))]
    calls = [compiled(module, runtime) for module in modules]
    order = [0, 1, 2, 2, 0]
    with runtime.record("base"):
        for step, which in enumerate(order):
            outputs_of(calls[which], networks[which].inputs(step))
    mask = RAGGED.draw(one.resolution)
    with runtime.edit("base", mask=mask):
        for step, which in enumerate(order):
            inputs = networks[which].inputs(10 + step)
            recording = references[which].record(networks[which].inputs(step))
            (output,) = outputs_of(calls[which], inputs)
            assert_near(output, references[which].edit(recording, inputs, mask).outputs[0], f"call {step}")


def test_two_runtimes_are_independent() -> None:
    network = ALL["transformer block"]
    first = compile_network(network)
    second = compile_network(network, norm="cached")
    assert second.runtime.bases == ("base",)
    second.runtime.drop("base")
    assert first.runtime.bases == ("base",)
    mask, inputs = first.mask(RAGGED), network.inputs(1)
    with first.runtime.edit("base", mask=mask):
        with second.runtime.record("other"):  # a context of the one does not concern the other's network
            recorded = second.call(inputs)
        second.assert_all_near(recorded, dense_outputs(network, 1), "recorded by the second")
        second.assert_all_near(second.call(inputs), dense_outputs(network, 1), "dense in the second")
        first.assert_all_near(first.call(inputs), first.expected(inputs, mask), "edited by the first")


def test_guidance_in_one_call_or_two() -> None:
    """One call with both branches stacked and a mask tiled, or two calls: the same pictures."""
    network = ALL["transformer block"]  # batch 2
    both = Network("both", network.build, tuple((4, *shape[1:]) for shape in network.shapes))
    base = [network.inputs(0), network.inputs(1)]
    new = [network.inputs(2), network.inputs(3)]
    mask = MaskRecipe("per-sample", 2).draw(network.resolution, 2)
    reference = reference_of(network)
    expected = [
        reference.edit(reference.record(inputs), changed, mask).outputs[0]
        for inputs, changed in zip(base, new, strict=True)
    ]
    runtime = fisedit.Runtime()
    module = compiled(network.module(), runtime)
    with runtime.record("two"):
        for inputs in base:
            outputs_of(module, inputs)
    with runtime.edit("two", mask=mask):
        for number, inputs in enumerate(new):
            assert_near(outputs_of(module, inputs)[0], expected[number], f"call {number} of two")
    torch.compiler.reset()
    module = compiled(both.module(), runtime)
    with runtime.record("one"):
        outputs_of(module, [torch.cat(pair) for pair in zip(*base, strict=True)])
    with runtime.edit("one", mask=mask):
        (output,) = outputs_of(module, [torch.cat(pair) for pair in zip(*new, strict=True)])
    assert_near(output, torch.cat(expected), "one call")


class Broken(nn.Module):
    """A network whose graph Dynamo breaks in two, at a feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if torch.compiler.is_dynamo_compiling():
            torch._dynamo.graph_break()
        return x + self.second(hidden)


def test_a_graph_break_keeps_the_semantics() -> None:
    network = Network("broken", Broken, ((2, 8, 13, 9),))
    case = compile_network(network)
    assert case.runtime.stats.calls["record"] == 2, "the graph did not break"
    for recipe in (RAGGED, PIXEL):
        mask, inputs = case.mask(recipe), network.inputs(1)
        outputs = case.edit(inputs, mask)
        case.assert_outside_untouched(outputs, mask)
        case.assert_all_near(outputs, case.expected(inputs, mask), str(recipe))


def test_edits_leave_the_base_as_it_was() -> None:
    case = compile_network(ALL["transformer block"], traced_once=True)
    mask, inputs = case.mask(RAGGED), case.network.inputs(1)
    first = case.edit(inputs, mask)
    kept = [output.clone() for output in first]
    for seed, recipe in enumerate((PIXEL, RECTANGLE, SPARSE)):
        case.edit(case.network.inputs(5 + seed), case.mask(recipe))
    for output in first:
        output.fill_(7.0)
    for output, before in zip(case.edit(inputs, mask), kept, strict=True):
        assert_identical(output, before, "the same edit again")


def test_the_base_does_not_share_memory_with_the_caller() -> None:
    network = ALL["many outputs"]
    runtime = fisedit.Runtime()
    module = compiled(network.module(), runtime)
    inputs = network.inputs(0)
    with runtime.record("base"):
        outputs = outputs_of(module, inputs)
    wanted = [output.clone() for output in outputs]
    for tensor in (*inputs, *outputs):
        tensor.fill_(float("nan"))
    with runtime.edit("base", mask=torch.zeros(2, 2)):
        again = outputs_of(module, network.inputs(1))
    for output, before in zip(again, wanted, strict=True):
        assert_identical(output, before, "empty mask")
    mask, reference = RAGGED.draw(network.resolution), reference_of(network)
    expected = reference.edit(reference.record(network.inputs(0)), network.inputs(1), mask).outputs
    with runtime.edit("base", mask=mask):
        edited = outputs_of(module, network.inputs(1))
    for output, before in zip(edited, expected, strict=True):
        assert_near(output, before, "ragged mask")
