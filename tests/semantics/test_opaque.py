"""Networks that cannot be traced run as a whole, and what they return keeps the recording outside the mask."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import fisedit_compile as fisedit
from fisedit_compile.errors import BudgetError, CallMismatchError, ScalarMismatchError, WeightsChangedError
from support.harness import compiled
from support.opaque_networks import BATCH, HEIGHT, KINDS, WIDTH, Recorded, Untraceable, draw, mix, some_mask
from support.reference import Reference, flatten
from support.tolerances import assert_identical, assert_near

FULL, EMPTY = torch.ones(HEIGHT, WIDTH), torch.zeros(HEIGHT, WIDTH)
#: An input that the network overwrites is the caller's own: nothing of it is kept.
AS_GIVEN = "overwritten input"
RANDOM = ("dropout", "noise")
#: Networks that are not the same at every call.
CHANGING = ("buffer", *RANDOM)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != AS_GIVEN])
def test_any_mask_is_one_operator_without_a_rule(kind: str) -> None:
    case = Recorded(KINDS[kind])
    case.check(some_mask(), draw(2))
    case.check(some_mask(BATCH, 3), draw(3))
    assert case.runtime.stats.calls == {"record": 1, "edit": 2, "dense": 0}
    assert set(case.runtime.stats.density) == {f"{HEIGHT}x{WIDTH}"}


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_mask_is_the_recording_and_runs_nothing(kind: str) -> None:
    case = Recorded(KINDS[kind])
    x, buffers = draw(2), {name: value.clone() for name, value in case.module.named_buffers()}
    with case.runtime.edit("base", mask=EMPTY), torch.no_grad():
        state = torch.get_rng_state()
        (output,) = flatten(case.network(x))
        assert torch.equal(torch.get_rng_state(), state), "random numbers were drawn"
    assert_identical(output, *case.outputs)
    assert_identical(x, draw(2), "the input")
    for name, value in case.module.named_buffers():
        assert_identical(value, buffers[name], name)
    output.add_(1.0)
    assert_identical(case.edit(EMPTY, draw(2))[0], *case.outputs, "after writing to an earlier result")


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_mask_is_the_dense_network(kind: str) -> None:
    case = Recorded(KINDS[kind])
    expected = case.call(draw(2), module=case.twin())
    assert_near(*case.edit(FULL, draw(2)), *expected, "a full mask")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in CHANGING])
def test_unchanged_inputs_are_the_recording(kind: str) -> None:
    case = Recorded(KINDS[kind])
    assert_near(*case.edit(some_mask(), draw(1)), *case.outputs, "unchanged inputs")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != AS_GIVEN])
def test_an_edit_of_an_edit(kind: str) -> None:
    case = Recorded(KINDS[kind])
    mixed, outputs = case.check(some_mask(), draw(2), save_as="second")
    case.check(some_mask(seed=4), draw(3), base="second", before=mixed, recorded=outputs)
    assert_identical(*case.edit(EMPTY, draw(3), base="second", save_as="third"), *outputs)
    case.check(some_mask(seed=5), draw(4), base="third", before=mixed, recorded=outputs)
    case.check(some_mask(), draw(2)), "the first base is as it was"


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_saved_before_the_mask_is_known_is_a_base(kind: str) -> None:
    case = Recorded(KINDS[kind])
    expected = case.call(draw(2), module=case.twin())
    outputs = case.edit(None, draw(2), save_as="dense")
    assert_near(*outputs, *expected, "dense")
    assert_identical(*case.edit(EMPTY, draw(3), base="dense"), *outputs)
    if kind != AS_GIVEN:
        case.check(some_mask(), draw(3), base="dense", before=(draw(2),), recorded=outputs)


@torch.no_grad()
def test_an_input_changed_in_place_is_the_callers() -> None:
    """The network gets the new picture itself and overwrites it as it does in eager PyTorch; its output is masked."""
    case = Recorded(KINDS[AS_GIVEN])
    mask, x, same = some_mask(), draw(2), draw(2)
    expected = case.twin()(same)
    with case.runtime.edit("base", mask=mask):
        output = case.network(x)
    assert_identical(x, same, "the overwritten input")
    assert_identical(output, mix(output, *case.outputs, mask), "outside the mask")
    assert_near(output, mix(expected, *case.outputs, mask))


def test_guidance_with_a_mask_for_each_picture() -> None:
    """Two pictures in two branches: the masks of the pictures are repeated."""
    for kind in ("dropout", "checkpoint"):
        torch.compiler.reset()
        case = Recorded(KINDS[kind], draw(1, 2 * BATCH, 3, HEIGHT, WIDTH))
        case.check(some_mask(BATCH, 7), draw(2, 2 * BATCH, 3, HEIGHT, WIDTH))


def in_training(compute: Callable[..., Any]) -> Callable[..., Any]:
    """``compute`` of a network with dropout before it: all but the dropout can be traced."""
    return lambda net, x: compute(net, functional.dropout(x, 0.3, training=True))


def in_checkpoint(compute: Callable[..., Any]) -> Callable[..., Any]:
    """``compute`` in a checkpoint: nothing but its inputs and outputs is known."""
    return lambda net, x: checkpoint(lambda y: compute(net, y), x, use_reentrant=False)


OUTPUTS: dict[str, Callable[..., Any]] = {
    "other types": lambda net, x: (net.both(x).argmax(1, keepdim=True), net.both(x) > 0, net.both(x).double()),
    "half": lambda net, x: net.coarse(x),
    "double": lambda net, x: functional.interpolate(net.first(x), scale_factor=2.0),
    "valid": lambda net, x: functional.conv2d(x, net.first.weight),
    "vector": lambda net, x: net.first(x).mean((2, 3)),
    "several": lambda net, x: (net.both(x), x.mean((1, 2, 3)), net.coarse(x), net.first(x).flatten(2).transpose(1, 2)),
}


@pytest.mark.parametrize("within", [in_training, in_checkpoint])
@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_of_every_form(name: str, within: Callable[..., Any]) -> None:
    """Maps at other resolutions and tokens are masked; a vector is the network's own, computed of the mixed input."""
    case = Recorded(within(OUTPUTS[name]))
    mixed, outputs = case.check(some_mask(), draw(2), save_as="second")
    case.check(some_mask(BATCH, 3), draw(3), base="second", before=mixed, recorded=outputs)
    for output, recorded in zip(case.edit(EMPTY, draw(2)), case.outputs, strict=True):
        assert_identical(output, recorded, "empty mask")


#: Networks of one operator: what is masked inside the reference is masked at the borders of the whole as well.
SINGLE: dict[str, Callable[..., Any]] = {
    "convolution": lambda net, x: net.first(x),
    "half": lambda net, x: net.coarse(x),
    "mean": lambda net, x: x.mean((2, 3)),
}


@pytest.mark.parametrize("name", SINGLE)
def test_one_operator_is_the_masked_reference(name: str) -> None:
    case = Recorded(in_checkpoint(SINGLE[name]))
    plain = Untraceable(SINGLE[name]).requires_grad_(False)
    plain.load_state_dict(case.module.state_dict())
    reference = Reference(plain, case.inputs)
    recording = reference.record(case.inputs)
    for seed in range(3):
        mask, inputs = some_mask(seed % 2 + 1, seed), (draw(2 + seed),)
        expected = reference.edit(recording, inputs, mask).outputs
        assert_near(*case.edit(mask, *inputs), *expected, "against the reference")


def last(net: Untraceable, x: Tensor) -> Tensor:
    return functional.dropout(net.both(x.permute(0, 3, 1, 2)), 0.3, training=True).permute(0, 2, 3, 1)


@torch.no_grad()
def test_channels_last_pictures() -> None:
    """What can be traced up to a random operator tells how its inputs and outputs lie."""
    case = Recorded(last, draw(1, BATCH, HEIGHT, WIDTH, 3))
    mask = some_mask()
    (output,) = case.edit(mask, draw(2, BATCH, HEIGHT, WIDTH, 3))
    outside = ~mask[0, None, ..., None].expand(output.shape)
    assert_identical(output[outside], case.outputs[0][outside], "outside the mask")
    assert not torch.equal(output, *case.outputs)
    assert set(case.runtime.stats.density) == {f"{HEIGHT}x{WIDTH}"}


#: Views of the last kind are errors in eager PyTorch for the other forms.
LYING = [("dropout", "channels last"), ("dropout", "a part"), ("dropout", "expanded"), ("views", "expanded")]


@pytest.mark.parametrize(("kind", "form"), LYING)
@torch.no_grad()
def test_inputs_that_lie_otherwise(kind: str, form: str) -> None:
    """Views in the graph were chosen by the strides of its inputs."""
    case = Recorded(KINDS[kind])
    torch.compiler.reset()

    def lay(value: Tensor) -> Tensor:
        if form == "channels last":
            return value.contiguous(memory_format=torch.channels_last)
        if form == "expanded":
            return value[:1].expand(value.shape)
        return functional.pad(value, (2, 1, 1, 0))[..., 1:, 2:-1]

    runtime = fisedit.Runtime()
    network = compiled(case.module, runtime)
    mask, old, new = some_mask(BATCH), lay(draw(1)), lay(draw(2))
    torch.manual_seed(11)
    with runtime.record("base"):
        recorded = network(old)
    torch.manual_seed(11)
    with runtime.edit("base", mask=mask):
        output = network(new)
    (expected,) = case.call(mix(new, old, mask), module=case.module)
    assert_near(output, mix(expected, recorded, mask), form)


def test_half_precision_storage_and_the_budget() -> None:
    case = Recorded(KINDS["dropout"], storage=torch.float16)
    held = draw(1).numel() * 2 + case.outputs[0].nbytes
    assert case.runtime.stats.bytes_stored == held, "the input in half precision and the output as it is"
    output, mask = case.edit(some_mask(), draw(2))[0], some_mask()
    zeros = torch.zeros_like(output)
    assert_identical(mix(zeros, output, mask), mix(zeros, case.outputs[0], mask), "outside the mask")
    assert case.runtime.stats.bytes_loaded > 0
    for budget in (held, held - 1):
        runtime = fisedit.Runtime(storage=torch.float16, budget=budget)
        network = compiled(case.module, runtime)
        refused = nullcontext() if budget == held else pytest.raises(BudgetError)
        with refused, runtime.record("base"), torch.no_grad():
            network(draw(1))


@pytest.mark.parametrize(
    "options", [{"norm": "cached"}, {"lowering": "inductor"}, {"disable_passes": "resample"}], ids=str
)
def test_options_make_no_difference(options: dict[str, Any]) -> None:
    Recorded(KINDS["checkpoint"], **options).check(some_mask(), draw(2))


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("fisedit_compile")]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("dropout", "aten.dropout.default is random"),
        ("cond", "higher-order operator cond has graphs of its own"),
        ("autocast", "it switches autocast inside the graph"),
        ("buffer", "it changes its inputs in place: count"),
    ],
)
def test_the_reason_is_printed_once_and_explained(kind: str, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    case = Recorded(KINDS[kind])
    case.edit(some_mask(), draw(2))
    (message,) = messages(caplog)
    assert f"runs densely as a whole and is masked at its outputs: {reason}" in message
    report = fisedit.explain(Untraceable(KINDS[kind]), draw(1))
    (miss,) = report.dense_nodes
    assert miss.target == "the whole graph" and miss.reason.startswith(reason)
    assert "1, of which 0 traced" in str(report) and "the whole graph" in str(report)
    assert report.bytes_stored == case.runtime.stats.bytes_stored
    assert report.cost(some_mask()).density == pytest.approx(float(some_mask().float().mean()))
    assert report.sparse_mac_fraction == 0.0


UNMASKED: dict[str, tuple[Callable[..., Any], tuple[int, ...], str]] = {
    "no picture": (lambda net, x: functional.dropout(x, 0.5, training=True), (2, 7, 5), "a picture or a feature map"),
    "doubtful": (in_checkpoint(lambda net, x: torch.fft.fft(x, n=8, dim=1).real), (2, 3, 8, 8), "are positions"),
    "doubtful by its maker": (in_training(lambda net, x: torch.fft.fft(x, n=8, dim=1).real), (2, 3, 8, 8), "select"),
}


@pytest.mark.parametrize("name", UNMASKED)
def test_what_cannot_be_masked_is_dense_and_says_so(name: str, caplog: pytest.LogCaptureFixture) -> None:
    function, shape, reason = UNMASKED[name]
    case = Recorded(function, draw(1, *shape))
    expected = case.call(draw(2, *shape), module=case.twin())
    assert_near(*case.edit(torch.eye(8), draw(2, *shape)), *expected, "dense")
    assert case.runtime.stats.calls == {"record": 1, "edit": 0, "dense": 1}
    (message,) = messages(caplog)
    assert "runs densely and is not masked: " in message and reason in message
    (miss,) = fisedit.explain(case.module, draw(1, *shape)).dense_nodes
    assert miss.target == "the whole graph" and reason in miss.reason


def test_changed_weights_are_noticed_and_changed_buffers_are_not() -> None:
    """What the network itself changes at every call is no weight."""
    case = Recorded(KINDS["batch statistics"])
    before = case.module.norm.running_mean.clone()
    case.edit(some_mask(), draw(2))
    assert not torch.equal(case.module.norm.running_mean, before), "the statistics follow the edit as in eager PyTorch"
    with torch.no_grad():
        case.module.first.weight.data.add_(1.0)
    with pytest.raises(WeightsChangedError):
        case.edit(some_mask(), draw(2))


def test_branches_tell_recordings_apart() -> None:
    """Graphs that differ within a branch only are other graphs."""
    runtime = fisedit.Runtime()

    def build(function: Callable[[Tensor], Tensor]) -> nn.Module:
        return compiled(Untraceable(lambda net, x: torch.cond(x.sum() > 0, function, torch.sin, (x,))), runtime)

    with torch.no_grad():
        first = build(torch.cos)
        with runtime.record("base"):
            first(draw(1))
        torch.compiler.reset()
        with pytest.raises(CallMismatchError), runtime.edit("base", mask=some_mask()):
            build(torch.exp)(draw(1))
        torch.compiler.reset()
        with runtime.edit("base", mask=some_mask()):
            build(torch.cos)(draw(1))


@torch.no_grad()
def test_steps_and_timesteps_line_up() -> None:
    """Call i of an edit is masked by what call i stored; another timestep is an error."""

    def step(net: Untraceable, x: Tensor, time: Tensor) -> Any:
        return checkpoint(lambda y: net.both(y) * time, x, use_reentrant=False)

    runtime = fisedit.Runtime()
    network, mask, times = compiled(Untraceable(step), runtime), some_mask(), [torch.tensor(3.0), torch.tensor(7.0)]
    with runtime.record("base", calls=2):
        recorded = [network(draw(number), time) for number, time in enumerate(times)]
    with runtime.edit("base", mask=mask):
        for number, time in enumerate(times):
            output = network(draw(5 + number), time)
            assert_identical(output, mix(output, recorded[number], mask), "outside the mask")
            assert not torch.equal(output, recorded[number])
    with pytest.raises(ScalarMismatchError), runtime.edit("base", mask=mask):
        network(draw(5), times[1])


def test_logging_of_a_traced_graph_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fisedit_compile"):
        Recorded(lambda net, x: net.both(x)).edit(some_mask(), draw(2))
    assert messages(caplog) == []
