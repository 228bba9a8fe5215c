"""Dense calls of an edit that take the attention to shared words from the recorded run."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fisedit_compile as fisedit
from fisedit_compile.errors import BudgetError, CallMismatchError, OptionError
from support.harness import Case, compiled, outputs_of, reference_of
from support.networks import ATTENTION, TEXT, Network
from support.opaque_networks import Untraceable, draw, noise
from support.stabilised import stabilised
from support.tolerances import assert_identical, assert_near

KEEPS_DYNAMO = True
BY_NAME = {network.name: network for network in ATTENTION}
NAMES = ("cross-attention", "cross-attention folded heads", "transformer block")
SAME = [list(range(TEXT))] * 2
#: A word is put in, one is taken out, and one is another.
ALIGNMENT = [[0, -1, 1, 2, 4, 5, 6], [0, 1, 2, -1, 4, 5, 6]]


@pytest.fixture(autouse=True, scope="module")
def fresh_dynamo() -> Iterator[None]:
    """For all tests of this file at once, which share their networks."""
    torch.compiler.reset()
    yield
    recorded.cache_clear()
    torch.compiler.reset()


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest) -> Case:
    """See ``recorded``."""
    return recorded(request.param)


@functools.cache
def recorded(name: str) -> Case:
    """A network with a base ``plain``, and a base ``kept`` that has the attention maps of the same call."""
    network, runtime = BY_NAME[name], fisedit.Runtime()
    module, reference = compiled(network.module(), runtime), reference_of(network)
    base = network.inputs(0)
    case = Case(network, module, runtime, reference, torch.float32, reference.record(base))
    with runtime.record("plain"):
        case.recorded = case.call(base)
    with runtime.record("kept", attention_maps=True) as run:
        again = case.call(base)
        assert run.attention_calls == 1
    for output, before in zip(again, case.recorded, strict=True):
        assert_identical(output, before, "recorded with attention maps")
    return case


def changed_prompt(network: Network) -> tuple[Tensor, ...]:
    """The recorded inputs with another prompt."""
    return (*network.inputs(0)[:-1], network.inputs(1)[-1])


def dense_edit(case: Case, inputs: tuple[Tensor, ...], alignment: object) -> tuple[Tensor, ...]:
    with case.runtime.edit("kept", alignment=alignment) as run:
        outputs = case.call(inputs)
        assert run.stabilised_calls == (alignment is not None)
    return outputs


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12, deadline=None)
@given(
    alignment=st.lists(st.lists(st.integers(-1, TEXT - 1), min_size=TEXT, max_size=TEXT), min_size=2, max_size=2),
    seed=st.integers(1, 9),
)
def test_stabilised_calls_are_those_of_the_reference(name: str, alignment: list[list[int]], seed: int) -> None:
    case = recorded(name)
    inputs = case.network.inputs(seed)
    expected = stabilised(case.reference, case.recording, inputs, alignment).outputs
    case.assert_all_near(dense_edit(case, inputs, alignment), expected, f"stabilised by {alignment}")


def test_what_is_shared_decides(case: Case) -> None:
    inputs = changed_prompt(case.network)
    (dense,), (nothing,) = dense_edit(case, inputs, None), dense_edit(case, inputs, [-1] * TEXT)
    assert_near(nothing, dense, "nothing shared")
    (some,), (all_,) = dense_edit(case, inputs, ALIGNMENT), dense_edit(case, inputs, SAME)
    scale = float(dense.abs().max())
    # What the calls differ by is no rounding.
    assert min(float((left - right).abs().max()) for left, right in ((some, dense), (all_, some))) > 1e-3 * scale
    (same,) = dense_edit(case, case.network.inputs(0), SAME)
    assert_near(same, case.recorded[0], "unchanged inputs, all words shared")


def test_a_saved_edit_keeps_the_attention_that_it_had(case: Case) -> None:
    first, second = case.network.inputs(1), case.network.inputs(2)
    with case.runtime.edit("kept", save_as="first", alignment=ALIGNMENT):
        case.call(first)
    once = stabilised(case.reference, case.recording, first, ALIGNMENT)
    with case.runtime.edit("first", alignment=ALIGNMENT):
        outputs = case.call(second)
    case.assert_all_near(outputs, stabilised(case.reference, once, second, ALIGNMENT).outputs, "of an edit")
    mask = torch.zeros(case.network.resolution)
    mask[3:7, 2:6] = 1
    with case.runtime.edit("first", mask=mask, save_as="sparse"):
        outputs = case.call(second)
    case.assert_all_near(outputs, case.reference.edit(once, second, mask).outputs, "sparse behind a stabilised call")
    # Rows do not tell what the attention elsewhere would be.
    with pytest.raises(CallMismatchError, match="no attention maps"), case.runtime.edit("sparse", alignment=ALIGNMENT):
        pass
    with case.runtime.edit("first", mask=torch.zeros_like(mask), save_as="same"):
        case.call(second)
    with case.runtime.edit("same", alignment=ALIGNMENT) as run:
        case.call(second)
        assert run.stabilised_calls == 1
    for name in ("first", "sparse", "same"):
        case.runtime.drop(name)


def test_an_unstabilised_edit_that_is_saved_keeps_its_own(case: Case) -> None:
    first, second = case.network.inputs(1), case.network.inputs(2)
    with case.runtime.edit("kept", save_as="first"):
        case.call(first)
    with case.runtime.edit("first", alignment=ALIGNMENT):
        outputs = case.call(second)
    expected = stabilised(case.reference, case.reference.record(first), second, ALIGNMENT).outputs
    case.assert_all_near(outputs, expected, "of a dense edit")
    case.runtime.drop("first")


@pytest.fixture
def single() -> Case:
    return recorded("cross-attention")


def test_only_dense_calls_are_stabilised(single: Case) -> None:
    inputs = changed_prompt(single.network)
    single.runtime.reset_stats()
    with single.runtime.edit("kept", mask=torch.ones(single.network.resolution), alignment=ALIGNMENT) as run:
        (full,) = single.call(inputs)
        assert run.stabilised_calls == 0
    assert_near(full, dense_edit(single, inputs, None)[0], "a mask of everything")
    assert "dense call: stabilised" not in single.runtime.stats.ways
    dense_edit(single, inputs, ALIGNMENT)
    assert single.runtime.stats.ways["dense call: stabilised"] == 1


def test_maps_are_kept_for_as_long_as_they_are_asked_for(single: Case) -> None:
    runtime, inputs = single.runtime, single.network.inputs(0)
    with runtime.record("two", attention_maps=True) as run:
        single.call(inputs)
        run.keep_attention_maps(False)
        single.call(inputs)
        assert run.attention_calls == 1 and run.attention_failure is None
    assert runtime.bytes_of("two") < 2 * runtime.bytes_of("kept")
    assert runtime.bytes_of("kept") - runtime.bytes_of("plain") == 2 * 2 * 117 * TEXT * 4
    with runtime.edit("two", alignment=ALIGNMENT) as edit:
        single.call(inputs)
        edit.align(None)
        single.call(inputs)
        assert edit.stabilised_calls == 1
    with (
        pytest.raises(CallMismatchError, match="kept no attention maps"),
        runtime.edit("two", alignment=ALIGNMENT),
    ):
        single.call(inputs)
        single.call(inputs)
    runtime.drop("two")


@pytest.mark.parametrize(
    ("alignment", "message"),
    [
        ([0.5] * TEXT, "whole numbers"),
        ([True] * TEXT, "torch.bool"),
        ([], "whole numbers"),
        ([[[0] * TEXT]], "whole numbers"),
        ([TEXT] * TEXT, "from -1 to 6"),
        ([-2] * TEXT, "from -1 to 6"),
    ],
)
def test_what_is_no_alignment_is_refused_before_anything_is_computed(
    single: Case, alignment: object, message: str
) -> None:
    with pytest.raises(OptionError, match=message), single.runtime.edit("kept", alignment=alignment):
        raise AssertionError("the context was entered")


@pytest.mark.parametrize(
    ("alignment", "message"),
    [([0] * 5, "has 5 tokens, and cross-attention of .* has 7"), ([[0] * TEXT] * 3, "3 samples")],
)
def test_alignments_of_other_prompts_are_refused(single: Case, alignment: object, message: str) -> None:
    with pytest.raises(OptionError, match=message), single.runtime.edit("kept", alignment=alignment):
        single.call(single.network.inputs(1))


def test_a_base_without_maps_is_refused(single: Case) -> None:
    with (
        pytest.raises(CallMismatchError, match="no attention maps.*attention_maps=True"),
        single.runtime.edit("plain", alignment=ALIGNMENT),
    ):
        raise AssertionError("the context was entered")


@pytest.mark.parametrize(
    ("name", "reason"), [("self-attention", "no attention of positions to words"), ("joint attention", "joined with")]
)
def test_networks_without_cross_attention_have_nothing_to_keep(name: str, reason: str) -> None:
    network, runtime = BY_NAME[name], fisedit.Runtime()
    module = compiled(network.module(), runtime)
    with pytest.raises(CallMismatchError, match=reason), runtime.record("base", attention_maps=True) as run:
        outputs_of(module, network.inputs(0))
        assert run.attention_calls == 0 and run.attention_failure is not None
    assert runtime.bases == ()


def test_a_graph_that_runs_as_a_whole_says_so() -> None:
    runtime = fisedit.Runtime()
    module = compiled(Untraceable(noise), runtime)
    with pytest.raises(CallMismatchError, match="it runs as a whole"), runtime.record("base", attention_maps=True):
        outputs_of(module, [draw(0, 1, 3, 13, 9)])


def test_maps_count_towards_the_budget(single: Case) -> None:
    runtime = fisedit.Runtime(budget=single.runtime.bytes_of("kept") - 1)
    network = single.network
    module = compiled(network.module(), runtime)
    with runtime.record("plain"):
        outputs_of(module, network.inputs(0))
    runtime.drop("plain")
    with pytest.raises(BudgetError), runtime.record("kept", attention_maps=True):
        outputs_of(module, network.inputs(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    network, runtime = BY_NAME["cross-attention"], fisedit.Runtime()
    module, reference = compiled(network.module(dtype), runtime), reference_of(network, dtype)
    recording = reference.record(network.inputs(0, dtype))
    with runtime.record("base", attention_maps=True):
        outputs_of(module, network.inputs(0, dtype))
    inputs = network.inputs(1, dtype)
    with runtime.edit("base", alignment=ALIGNMENT):
        (output,) = outputs_of(module, inputs)
    assert_near(output, stabilised(reference, recording, inputs, ALIGNMENT).outputs[0], str(dtype))
