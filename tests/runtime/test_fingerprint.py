"""Recognising parameters: by identity, by a sample of their content and by the sum of all of it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisedit_compile.errors import WeightsChangedError
from fisedit_compile.runtime import Fingerprint, Runtime
from fisedit_compile.runtime.fingerprint import SAMPLES, Weights, sample, sample_positions, total
from support.fake_network import FakeNetwork, edit_phase, inputs, left_half, record_phase, run


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(5,), (320, 640), (64, 32, 3, 3), (1,), ()]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


@pytest.mark.parametrize("number", range(5))
def test_adding_to_data_is_seen(number: int) -> None:
    taken = parameters()
    weights = Weights(taken)
    weights.verify(taken, "base")
    version, pointer = taken[number]._version, taken[number].data_ptr()
    taken[number].data += 1
    assert (taken[number]._version, taken[number].data_ptr()) == (version, pointer)
    with pytest.raises(WeightsChangedError, match=f"content of 1 of 5 tensors changed, first parameter {number}"):
        weights.verify(taken, "base")
    taken[number].data.copy_(parameters()[number])
    weights.verify(taken, "base")


def test_replaced_data_is_seen_unless_it_is_the_same() -> None:
    taken = parameters()
    weights = Weights(taken)
    taken[1].data = taken[1].data.clone()
    weights.verify(taken, "base")
    taken[1].data = torch.randn(320, 640)
    with pytest.raises(WeightsChangedError, match="first parameter 1"):
        weights.verify(taken, "base")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda data: data.half(), r"parameter 1 was \[320, 640\] float32 on cpu and is \[320, 640\] float16"),
        (lambda data: data.t().contiguous(), r"is \[640, 320\]"),
        (lambda data: data.to("meta"), "on meta now"),
    ],
)
def test_another_form_is_seen(change: object, text: str) -> None:
    taken = parameters()
    weights = Weights(taken)
    taken[1].data = torch.zeros(0)  # data of another type is only taken by a parameter without elements
    changed = torch.nn.Parameter(change(parameters()[1].data))  # type: ignore[operator]
    before, now = Fingerprint.take(parameters()), Fingerprint.take([taken[0], changed, *taken[2:]])
    assert text.replace("\\", "") in str(before.difference(now)) and before != now
    with pytest.raises(WeightsChangedError, match="parameter 1 was"):
        weights.verify(taken, "base")


def test_a_low_rank_change_of_a_few_columns_is_seen() -> None:
    weight = torch.nn.Parameter(torch.randn(640, 640))
    before = Fingerprint.take([weight])
    weight.data[:, 100:160] += torch.randn(640, 1) @ torch.randn(1, 60)
    assert before.difference(Fingerprint.take([weight])) is not None


def test_positions_are_spread_over_rows_and_columns() -> None:
    for height, width in ((64, 64), (320, 320), (1280, 5120)):
        positions = sample_positions(height * width, torch.device("cpu"))
        assert len(positions.unique()) == SAMPLES and int(positions.max()) < height * width
        assert len((positions % width).unique()) > 0.55 * SAMPLES
        assert len((positions // width * 16 // height).unique()) == 16
    assert sample_positions(5, torch.device("cpu")).tolist() == [0, 1, 2, 3, 4]


@given(data=st.data())
def test_a_change_of_any_single_element_is_seen(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int8]))
    # Small enough for bfloat16 to tell a number from the next integer.
    storage = torch.randn(1000).mul(20).to(dtype)
    weight = storage[data.draw(st.integers(0, 9)) :]
    before = Fingerprint.take([torch.zeros(3), weight])
    place = data.draw(st.integers(0, len(weight) - 1))
    weight.data[place] += 1
    now = Fingerprint.take([torch.zeros(3), weight])
    assert "1 of 2 tensors changed, first parameter 1" in str(before.difference(now))
    assert before.digest != now.digest
    weight.data[place] -= 1
    if dtype is torch.int8:
        assert before == Fingerprint.take([torch.zeros(3), weight])


@pytest.mark.parametrize("offset", range(3))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 21])
def test_totals_are_sums_of_all_bits(offset: int, count: int) -> None:
    values = torch.randint(-(2**31), 2**31, (count + offset,), dtype=torch.int64).to(torch.int32)[offset:]
    expected = 0
    whole = 0 if offset % 2 else count - count % 2
    for first in range(0, whole, 2):
        expected += (int(values[first]) & 0xFFFFFFFF) + (int(values[first + 1]) << 32)
    expected += int(values[whole:].sum())
    assert (int(total(values.view(torch.float32))) - expected) % 2**64 == 0


def test_only_a_sample_is_gathered() -> None:
    assert sample(torch.randn(1000, 1000)).numel() == SAMPLES
    assert sample(torch.randn(7)).numel() == 7
    assert sample(torch.randn(0, 3)).numel() == 0


def test_nan_equals_itself_and_signed_zeros_differ() -> None:
    tensor = torch.tensor([float("nan"), 0.0])
    assert Fingerprint.take([tensor]) == Fingerprint.take([tensor.clone()])
    assert Fingerprint.take([tensor]) != Fingerprint.take([tensor * -1])


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.int64,
        torch.uint8,
        torch.bool,
        torch.complex64,
    ],
)
def test_every_type(dtype: torch.dtype) -> None:
    tensor = (torch.arange(600) % 7).to(torch.float32).to(dtype).view(20, 30)
    before = Fingerprint.take([tensor])
    assert before == Fingerprint.take([tensor.clone()])
    assert before != Fingerprint.take([torch.zeros(20, 30).to(dtype)])


def test_layouts() -> None:
    weight = torch.randn(64, 32, 3, 3).contiguous(memory_format=torch.channels_last)
    assert torch.equal(sample(weight), sample(weight.permute(0, 2, 3, 1)))
    whole = torch.zeros(100, 100)
    part = whole[:, ::2]
    before = Fingerprint.take([part])
    whole[:, 1::2] = 1
    assert before == Fingerprint.take([part])
    whole[:, ::2] = 1
    assert before != Fingerprint.take([part])
    sparse = torch.eye(30).to_sparse()
    assert Fingerprint.take([sparse]) == Fingerprint.take([sparse.clone()]) != Fingerprint.take([2 * sparse])


class Wrapped(torch.Tensor):
    """A wrapper tensor as quantisation libraries make them."""

    content: torch.Tensor

    @staticmethod
    def __new__(cls, content: torch.Tensor) -> Wrapped:
        made = torch.Tensor._make_wrapper_subclass(cls, content.shape, dtype=content.dtype)
        made.content = content
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["content"], None

    @classmethod
    def __torch_dispatch__(cls, *arguments: object) -> object:
        raise AssertionError("a wrapper's content must be read from its inner tensors")


def test_wrapper_tensors_are_looked_into() -> None:
    inner = torch.randn(10, 10)
    before = Fingerprint.take([Wrapped(inner)])
    assert before == Fingerprint.take([Wrapped(inner)])
    inner += 1
    assert before != Fingerprint.take([Wrapped(inner)])


def test_digest_is_equal_for_equal_parameters_only() -> None:
    first, second = Fingerprint.take(parameters()), Fingerprint.take(parameters())
    assert first.digest == second.digest and hash(first) == hash(second) and len(first.digest) == 32
    changed = parameters()
    changed[2].data -= 1
    assert Fingerprint.take(changed).digest != first.digest
    assert Fingerprint.take(changed[:2]) != first


def test_inference_mode_makes_no_difference() -> None:
    taken = parameters()
    with torch.inference_mode():
        weights = Weights(taken)
        weights.verify(taken, "base")
    weights.verify(taken, "base")


def test_parameters_are_not_kept_alive_and_their_numbers_prove_nothing() -> None:
    taken = parameters()
    weights = Weights(taken)
    reference = weakref.ref(taken[1])
    assert weights.alive
    taken[1] = parameters()[1]  # the same content in another object
    gc.collect()
    assert reference() is None and not weights.alive
    with pytest.raises(WeightsChangedError, match="parameter 1 of shape .* is not the recorded tensor"):
        weights.verify(taken, "base")
    with pytest.raises(WeightsChangedError, match="with 5 parameters, got 4"):
        weights.verify(taken[:4], "base")


def test_edit_refuses_changed_weights_once_per_context() -> None:
    runtime = Runtime()
    network = FakeNetwork(runtime)
    with runtime.record("base"):
        run(network, inputs(2))
    with torch.no_grad(), pytest.raises(WeightsChangedError, match="since base 'base' was recorded"):
        network.weight.data += 1
        with runtime.edit("base", mask=left_half()):
            run(network, inputs(2))
    network.weight.data -= 1
    with runtime.edit("base", mask=left_half()):
        run(network, inputs(2))
        fingerprint = edit_phase(runtime).fingerprint(network.key)
    assert fingerprint == Fingerprint.take([network.weight])
    with runtime.record("again"):
        run(network, inputs(1))
        assert record_phase(runtime).fingerprint(network.key) == fingerprint


def test_a_base_does_not_keep_the_network_alive() -> None:
    runtime = Runtime()
    network = FakeNetwork(runtime)
    with runtime.record("base"):
        run(network, inputs(1))
    reference = weakref.ref(network.weight)
    del network
    gc.collect()
    assert reference() is None and runtime.bases == ("base",)


def test_another_memory_format_is_no_other_content() -> None:
    network = torch.nn.Conv2d(4, 6, 3)
    weights = Weights(list(network.parameters()))
    network.to(memory_format=torch.channels_last)
    with pytest.raises(
        WeightsChangedError, match=r"the memory format of 1 of 2 tensors .* first of parameter 0"
    ) as caught:
        weights.verify(list(network.parameters()), "base")
    assert "content" not in str(caught.value)
    network.to(memory_format=torch.contiguous_format)
    weights.verify(list(network.parameters()), "base")


def test_a_kernel_of_one_pixel_has_one_memory_format() -> None:
    network = torch.nn.Conv2d(4, 6, 1)
    weights = Weights(list(network.parameters()))
    network.weight.data = network.weight.data.as_strided((6, 4, 1, 1), (4, 1, 4, 4))
    weights.verify(list(network.parameters()), "base")
